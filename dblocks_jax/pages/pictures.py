"""Pictures inside a page."""

import base64
import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def base64_png(pixels: UInt8[np.ndarray, "h w c"]) -> str:
    """An image, grey or in colour, as a PNG file in base64."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def data_uri(pixels: UInt8[np.ndarray, "h w c"]) -> str:
    """An image, grey or in colour, as the address of itself."""
    return "data:image/png;base64," + base64_png(pixels)

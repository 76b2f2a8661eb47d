"""Images to files: a grid to look at, single pictures, and the array that programs which score images read."""

import io
import math
import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dblocks_jax.run.errors import UserError

READABLE = 64  # pixels that the side of an image in a grid has at least, about
GAP, GAP_LEVEL = 2, 255  # pixels between images, and how bright they are


def grid(images: UInt8[np.ndarray, "n h w c"], columns: int | None = None) -> UInt8[np.ndarray, "height width c"]:
    """One picture of many, row by row, nearly square if `columns` is not given. Small images are enlarged whole times.

    Raises:
      UserError: there are no images.
    """
    if not len(images):
        raise UserError("there are no images to show")
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    times = max(1, round(READABLE / max(images.shape[1:3])))
    images = images.repeat(times, axis=1).repeat(times, axis=2)
    _, height, width, channels = images.shape
    cells = np.full((rows * columns, height + GAP, width + GAP, channels), GAP_LEVEL, np.uint8)
    cells[: len(images), GAP:, GAP:] = images
    together = cells.reshape(rows, columns, height + GAP, width + GAP, channels).swapaxes(1, 2)
    together = together.reshape(rows * (height + GAP), columns * (width + GAP), channels)
    return np.pad(together, ((0, GAP), (0, GAP), (0, 0)), constant_values=GAP_LEVEL)


def png(image: UInt8[np.ndarray, "h w c"]) -> bytes:
    """A PNG file, grey or colour. The same image gives the same bytes.

    Raises:
      UserError: the image has neither one channel nor three.
    """
    if image.shape[-1] not in (1, 3):
        raise UserError(f"a picture has 1 channel or 3, not {image.shape[-1]}: latents must be decoded first")
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    return file.getvalue()


def write_grid(path: Path, images: UInt8[np.ndarray, "n h w c"], columns: int | None = None) -> Path:
    """`grid` as a PNG at `path`.

    Raises:
      UserError: there are no images, they have neither one channel nor three, or the file cannot be written.
    """
    return write_whole(path, png(grid(images, columns)))


def write_pictures(folder: Path, images: UInt8[np.ndarray, "n h w c"], first: int = 0) -> list[Path]:
    """Each image as a PNG of its own, named by its number, which starts at `first`: 000000.png, 000001.png, ...

    Raises:
      UserError: they have neither one channel nor three, or a file cannot be written.
    """
    return [write_whole(folder / f"{first + i:06d}.png", png(image)) for i, image in enumerate(images)]


def write_samples(path: Path, images: UInt8[np.ndarray, "n h w c"]) -> Path:
    """An .npz with the images as `arr_0`, uint8 [n, h, w, 3], as the usual FID programs read it.

    These know colour only, so grey images get three equal channels. The same images give the same bytes.

    Raises:
      UserError: they have neither one channel nor three, or the file cannot be written.
    """
    if images.shape[-1] not in (1, 3):
        raise UserError(f"a picture has 1 channel or 3, not {images.shape[-1]}: latents must be decoded first")
    file = io.BytesIO()
    np.savez(file, np.broadcast_to(images, (*images.shape[:-1], 3)))  # no date in it: numpy gives all members one
    return write_whole(path, file.getvalue())


def write_whole(path: Path, content: bytes) -> Path:
    """Write a file whole or not at all, and its folder where there is none: `path`.

    Raises:
      UserError: it cannot be written. What was there before is intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return path

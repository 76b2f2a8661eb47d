"""Images to files: a grid to look at, single pictures, and the array that programs which score images read."""

import io
import math
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dblocks_jax.run.errors import UserError
from dblocks_jax.run.files import write_whole

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


def write_grid(path: Path, images: UInt8[np.ndarray, "n h w c"], columns: int | None = None) -> None:
    """`grid` as a PNG at `path`.

    Raises:
      UserError: there are no images, they have neither one channel nor three, or (OSError) the file cannot be written.
    """
    write_whole(path, png(grid(images, columns)))


def write_pictures(folder: Path, images: UInt8[np.ndarray, "n h w c"], first: int = 0) -> list[Path]:
    """Each image as a PNG of its own, named by its number, which starts at `first`: 000000.png, 000001.png, ...

    Returns where they are.

    Raises:
      UserError: they have neither one channel nor three, or (OSError) a file cannot be written.
    """
    paths = [folder / f"{i:06d}.png" for i in range(first, first + len(images))]
    for path, image in zip(paths, images, strict=True):
        write_whole(path, png(image))
    return paths


def write_samples(path: Path, images: UInt8[np.ndarray, "n h w c"]) -> None:
    """An .npz with the images as `arr_0`, uint8 [n, h, w, 3], as the usual FID programs read it.

    These know colour only, so grey images get three equal channels. The same images give the same bytes.

    Raises:
      UserError: they have neither one channel nor three, or (OSError) the file cannot be written.
    """
    if images.shape[-1] not in (1, 3):
        raise UserError(f"a picture has 1 channel or 3, not {images.shape[-1]}: latents must be decoded first")
    file = io.BytesIO()
    np.savez(file, np.broadcast_to(images, (*images.shape[:-1], 3)))  # no date in it: numpy gives all members one
    write_whole(path, file.getvalue())

"""Image files, which may be a stranger's: only JPEG and PNG are decoded, and only from regular files."""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from dblocks_jax.run.errors import UserError
from dblocks_jax.run.naming import shown
from dblocks_jax.run.regular import check_regular

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
FORMATS = ("JPEG", "PNG")  # Pillow knows dozens more, and starts Ghostscript for one of them
MOST_PIXELS = 50_000_000  # of an image that somebody sends: a few KB of PNG can hold gigabytes
CHUNK = 256  # images handed to a thread at once
LUMA = np.array([0.299, 0.587, 0.114])  # how bright red, green and blue appear (ITU-R BT.601)
MANY = 1000  # images that take long enough to say so
TELL_SECONDS = 5

LONGEST_MAGIC = 64  # bytes
# How files begin that are found under an image's name.
MAGIC = (
    ("a JPEG file", rb"\xff\xd8\xff"),
    ("a PNG file", rb"\x89PNG\r\n\x1a\n"),
    ("a GIF file", rb"GIF8[79]a"),
    ("a WEBP file", rb"RIFF....WEBP"),
    ("a TIFF file", rb"II[*+]\0|MM\0[*+]"),
    ("a PostScript file", rb"%!PS|\xc5\xd0\xd3\xc6|\x04%!PS"),
    ("a PDF file", rb"%PDF-"),
    ("an AVIF file", rb"....ftypavi[fs]"),
    ("a HEIC file", rb"....ftyp(hei|hev|mif|msf)"),
    ("a video", rb"....ftyp|RIFF....AVI |\x1aE\xdf\xa3"),
    ("a JPEG 2000 file", rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
    ("a JPEG XL file", rb"\0\0\0\x0cJXL |\xff\x0a"),
    ("an icon", rb"\0\0[\x01\x02]\0"),
    ("a Photoshop file", rb"8BPS"),
    ("a BMP file", rb"BM"),
    ("a PNM file", rb"P[1-7fF]\s"),
    ("an SVG or XML file", rb"\s*<(svg|\?xml)"),
    ("a web page", rb"(?i:\s*<(!doctype html|html|head|body))"),
    ("an archive", rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ"),
)


def kind_of(start: bytes) -> str | None:
    """What a file is by its first bytes, such as "a GIF file"; None where that is not known."""
    return next((kind for kind, magic in MAGIC if re.match(magic, start, re.DOTALL)), None)


def stamp(path: Path) -> tuple[int, int]:
    """Size and time of the last change, in bytes and nanoseconds.

    Raises:
      UserError: it is no regular file.
    """
    found = check_regular(path, "the image")
    return found.st_size, found.st_mtime_ns


def check_header(path: Path) -> None:
    """Open an image without decoding it.

    Raises:
      UserError: it is none, and what it is instead.
    """
    with _opened(path):
        pass


def read_images(paths: Sequence[Path], image_shape: tuple[int, int, int]) -> UInt8[np.ndarray, "n h w c"]:
    """Image files as a model of square images takes them: as those of a "folder", grey where it has one channel.

    Raises:
      UserError: a file cannot be read.
    """
    size, _, channels = image_shape
    return _in_channels(decode_all(paths, size, chunk=1), channels)


def read_image(content: bytes, image_shape: tuple[int, int, int]) -> UInt8[np.ndarray, "h w c"]:
    """The bytes of an image file, as `read_images` takes a file.

    Raises:
      UserError: they are no image, or one of more than MOST_PIXELS pixels.
    """
    size, _, channels = image_shape
    with _opened(BytesIO(content), "that was sent") as image:
        if image.width * image.height > MOST_PIXELS:  # nothing of it is decoded yet
            raise ValueError(
                f"it has {image.width} x {image.height} pixels, of at most {MOST_PIXELS:,}: make it smaller"
            )
        return _in_channels(_square(image, size), channels)


def _in_channels(pixels: UInt8[np.ndarray, "*n h w 3"], channels: int) -> UInt8[np.ndarray, "*n h w c"]:
    """Colour as it is, or how bright it appears."""
    return pixels if channels == 3 else np.rint(pixels @ LUMA).astype(np.uint8)[..., None]


def decode_all(
    files: Sequence[Path | BytesIO], image_size: int, *, chunk: int = CHUNK, where: str = ""
) -> UInt8[np.ndarray, "n size size 3"]:
    """Decode by threads; the error of the first file that cannot be read ends it. `where` is told if it takes long."""
    pixels = np.empty((len(files), image_size, image_size, 3), np.uint8)

    def decode(index: int) -> None:
        pixels[index] = _decode(files[index], image_size)

    in_threads(decode, range(len(files)), chunk, doing=f"reading %s images in {where}" if where else "")
    return pixels


def in_threads(function: Callable[[Any], None], items: Sequence[Any], chunk: int, *, doing: str = "") -> None:
    """Call the function for each item, `chunk` of them at a time in a thread; the first error ends it.

    `doing`, with %s for the number of items, is said where there are many.
    """

    def run(part: Iterable[Any]) -> None:
        for item in part:
            function(item)

    pool = ThreadPoolExecutor()
    try:
        parts = pool.map(run, (items[start : start + chunk] for start in range(0, len(items), chunk)))
        for _ in telling(parts, total=len(items), each=chunk, doing=doing) if doing else parts:
            pass
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, do not go through the rest


def telling[T](parts: Iterable[T], *, total: int, each: int, doing: str) -> Iterator[T]:
    """The parts of a work on `total` items, `each` in a part. Of many, say so first, and how far it is every
    few seconds.

    `doing` says what is done, with %s for the number of items.
    """
    if total < MANY:
        yield from parts
        return
    logging.info("%s", doing.replace("%s", f"{total:,}"))
    told = time.monotonic()
    for number, part in enumerate(parts, 1):
        if time.monotonic() - told >= TELL_SECONDS:
            told = time.monotonic()
            logging.info("%s", doing.replace("%s", f"{min(number * each, total):,} of {total:,}"))
        yield part


@contextmanager
def _opened(file: Path | BytesIO, where: str = "among the data") -> Iterator[Image.Image]:
    """The image, not decoded yet. What fails inside is told with the file's name, or with where it is from.

    Raises:
      UserError: it is no image, or not one of FORMATS.
    """
    if isinstance(file, Path):
        check_regular(file, "the image")
    name = shown(file) if isinstance(file, Path) else where
    kind = None
    try:
        with open(file, "rb") if isinstance(file, Path) else file as content:
            kind = kind_of(content.read(LONGEST_MAGIC))
            content.seek(0)
            with Image.open(content, formats=FORMATS) as image:
                yield image
    except UnidentifiedImageError:
        why = "it is neither a JPEG nor a PNG file" if kind is None else f"it is {kind}, not JPEG or PNG: convert it"
        if kind in ("a JPEG file", "a PNG file"):
            why = f"it begins like {kind}, but is damaged"
        raise UserError(f"cannot read the image {name}: {why}") from None
    except Exception as error:  # Pillow raises many types
        raise UserError(f"cannot read the image {name}: {' '.join(str(error).split())}") from error


def _decode(file: Path | BytesIO, image_size: int) -> UInt8[np.ndarray, "size size 3"]:
    with _opened(file) as image:
        return _square(image, image_size)


def _square(image: Image.Image, image_size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The largest centred square, resized to `image_size`: the same as resizing first, but cheap for any shape."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(_to_rgb(image).resize((image_size, image_size), Image.Resampling.BICUBIC, box=box))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would turn every level above 255 into white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:  # Pillow wants such a palette to go by way of RGBA
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")

"""Folders of small images to experiment with, of CIFAR-10 as JPEG or of Fashion-MNIST: OUT/{train,test}/<class>/*.png.

    python benchmarks/images.py --archive=../shared/data/cifar10-jpeg.tar.xz --out=DIR --size=14 --grey
    python benchmarks/images.py --archive=/usr/share/datasets/fashion-mnist --out=DIR --size=14 --limit=20000

An archive is a tar of {train,test}/<class>/*.jpg, or a folder with the four ubyte.gz files (Debian's package
dataset-fashion-mnist has them). Images become smaller by the mean over boxes. `--limit` is the number of training
images, the first of each class, as many of each; test images are all taken.
"""

import argparse
import gzip
import io
import re
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

NAME = re.compile(r"(train|test)/([A-Za-z0-9_]+)/([A-Za-z0-9_]+)\.jpe?g")
FILE_BYTES = 2**20  # more than any image of 32 pixels has
FASHION = ("t_shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle_boot")
FASHION_FILES = {"train": ("train", 60_000), "test": ("t10k", 10_000)}

Found = tuple[str, str, str, Image.Image]  # split, class, name of the file without its ending, image


def from_tar(path: Path, out: Path) -> Iterator[Found]:
    """The images of a tar, which is a stranger's: nothing is unpacked, and a member that is out of place ends it."""
    with tarfile.open(path) as tar:
        for member in tar:
            tarfile.data_filter(member, str(out))  # raises for links to the outside, absolute paths and devices
            if member.isdir():
                continue
            place = NAME.fullmatch(str(PurePosixPath(member.name)))
            file = tar.extractfile(member) if member.isreg() else None
            if not place or not file or member.size > FILE_BYTES:
                raise ValueError(f"{path} has the member {member.name!r}, which is no small JPEG in its place")
            try:
                image = Image.open(io.BytesIO(file.read()), formats=["JPEG"])
                image.load()
            except (OSError, Image.DecompressionBombError) as error:
                raise ValueError(f"{path} has the member {member.name!r}, which is damaged: {error}") from error
            yield (*place.groups(), image)


def from_ubyte(folder: Path) -> Iterator[Found]:
    """The images of Fashion-MNIST."""
    for split, (prefix, count) in FASHION_FILES.items():
        pixels = read_ubyte(folder / f"{prefix}-images-idx3-ubyte.gz", (count, 28, 28))
        labels = read_ubyte(folder / f"{prefix}-labels-idx1-ubyte.gz", (count,))
        for i, (label, image) in enumerate(zip(labels, pixels, strict=True)):
            yield split, FASHION[label], f"{i:05}", Image.fromarray(image)


def read_ubyte(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """An array of bytes in the format of MNIST: two zeros, type 8, the number of axes, their lengths, the values."""
    header = bytes([0, 0, 8, len(shape)]) + b"".join(length.to_bytes(4, "big") for length in shape)
    with gzip.open(path) as file:
        content = file.read(len(header) + int(np.prod(shape)) + 1)  # no more, whatever it unpacks to
    if content[: len(header)] != header or len(content) != len(header) + np.prod(shape):
        raise ValueError(f"{path} does not hold bytes of shape {list(shape)}")
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)


def shrink(image: Image.Image, size: int, *, grey: bool) -> Image.Image:
    """Square images only: a mean over boxes of pixels."""
    if image.width != image.height:
        raise ValueError(f"an image of {image.width}x{image.height} is not square")
    if grey or image.mode not in ("L", "RGB"):
        image = image.convert("L" if grey else "RGB")
    return image if image.width == size else image.resize((size, size), Image.Resampling.BOX)


def make_folder(archive: Path, out: Path, *, size: int, grey: bool, classes: int, limit: int | None) -> Counter[str]:
    """Make the folder, whole or not at all: how many images each split has. They come in the order of the archive.

    Raises:
      ValueError, OSError, tarfile.TarError: the archive is not as above, or `out` has something in it.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} has something in it: name a new folder")
    images = from_ubyte(archive) if archive.is_dir() else from_tar(archive, out)
    names = sorted(FASHION if archive.is_dir() else tar_classes(archive))[:classes]
    if not names:
        raise ValueError(f"{archive} has no training images: none is train/<class>/<name>.jpg")
    if limit is not None and limit < len(names):
        raise ValueError(f"{limit} training images cannot be shared out among {len(names)} classes")
    most = limit // len(names) if limit else None
    written: Counter[tuple[str, str]] = Counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        unfinished = Path(temporary, out.name)
        for split, name, stem, image in images:
            if name not in names or (split == "train" and written[split, name] == most):
                continue
            folder = unfinished / split / name
            folder.mkdir(parents=True, exist_ok=True)
            shrink(image, size, grey=grey).save(folder / f"{stem}.png")
            written[split, name] += 1
        unfinished.replace(out)
    totals: Counter[str] = Counter()
    for (split, _), count in written.items():
        totals[split] += count
    return totals


def tar_classes(path: Path) -> set[str]:
    """The classes of the training images in a tar."""
    with tarfile.open(path) as tar:
        places = (NAME.fullmatch(str(PurePosixPath(member.name))) for member in tar)
        return {place[2] for place in places if place and place[1] == "train"}


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--archive", type=Path, required=True, help="a tar of JPEG files, or a folder with ubyte.gz files"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--size", type=positive, default=32, help="pixels along a side")
    parser.add_argument("--grey", action="store_true", help="colour becomes grey")
    parser.add_argument("--classes", type=positive, default=10, help="how many classes are taken, the first by name")
    parser.add_argument("--limit", type=positive, help="training images at most, shared out among the classes")
    asked = parser.parse_args()
    try:
        totals = make_folder(
            asked.archive, asked.out, size=asked.size, grey=asked.grey, classes=asked.classes, limit=asked.limit
        )
    except (ValueError, OSError, EOFError, tarfile.TarError) as error:
        sys.exit(f"cannot make {asked.out}: {' '.join(str(error).split())}")
    print(f"{asked.out}: {totals['train']} training and {totals['test']} test images")


if __name__ == "__main__":
    main()

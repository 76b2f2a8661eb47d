"""Data sets: random access to the uint8 images and labels of each split, loaded only when a split is asked for."""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, Protocol, overload, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32, Num, UInt8
from PIL import Image

from dblocks_jax.run.errors import UserError, brief

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
IN_MEMORY_BYTES = 2 << 30  # a folder's split of at most this size is decoded once; a larger one batch by batch
CHUNK = 256  # images handed to a thread at once
LUMA = np.array([0.299, 0.587, 0.114])  # how bright red, green and blue appear (ITU-R BT.601)

DIGITS_TEST_IMAGES = 360


@runtime_checkable
class Source(Protocol):
    """Random access to the images of one split."""

    @property
    def labels(self) -> Int32[np.ndarray, " n"]: ...
    def __len__(self) -> int: ...
    def images(self, indices: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b h w c"]: ...
    def take(self, indices: Int[np.ndarray, " b"]) -> dict[str, np.ndarray]: ...


def labelled(source: Source, indices: Int[np.ndarray, " b"]) -> dict[str, np.ndarray]:
    """What training takes: {"image": [b, h, w, c], "label": int32 [b]}."""
    return {"image": source.images(indices), "label": source.labels[indices]}


@dataclass(frozen=True)
class ArraySource:
    """Images in memory."""

    pixels: UInt8[np.ndarray, "n h w c"] = field(repr=False)
    labels: Int32[np.ndarray, " n"] = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b h w c"]:
        return self.pixels[indices]

    def take(self, indices: Int[np.ndarray, " b"]) -> dict[str, np.ndarray]:
        return labelled(self, indices)


@dataclass(frozen=True)
class FileSource:
    """Images decoded each time they are asked for. `stamps` are their sizes and times of change, as first seen.

    Raises:
      UserError: from `images`, naming a file that cannot be read, or is not the one that was there at the start.
    """

    paths: tuple[Path, ...] = field(repr=False)
    labels: Int32[np.ndarray, " n"] = field(repr=False)
    image_size: int
    stamps: Int[np.ndarray, "n 2"] = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b h w c"]:
        for i in indices:
            if stamp(self.paths[i]) != tuple(self.stamps[i]):
                raise UserError(f"the image {self.paths[i]} has changed since training began")
        return _decode_all([self.paths[i] for i in indices], self.image_size, chunk=1)

    def take(self, indices: Int[np.ndarray, " b"]) -> dict[str, np.ndarray]:
        return labelled(self, indices)


@dataclass(frozen=True)
class Subset:
    """Some images of another source."""

    source: Source
    indices: Int[np.ndarray, " n"] = field(repr=False)

    @property
    def labels(self) -> Int32[np.ndarray, " n"]:
        return self.source.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def images(self, indices: Int[np.ndarray, " b"]) -> Num[np.ndarray, "b h w c"]:
        return self.source.images(self.indices[indices])

    def take(self, indices: Int[np.ndarray, " b"]) -> dict[str, np.ndarray]:
        return self.source.take(self.indices[indices])


@dataclass(frozen=True)
class Card:
    """What a model knows of its data. `mean` and `std` are by channel, for pixels in 0..1."""

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]  # height, width, channels
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> "Card":
        """The card among what a run has saved of its data."""
        height, width, channels = saved["image_shape"]
        return cls(tuple(saved["class_names"]), (height, width, channels), tuple(saved["mean"]), tuple(saved["std"]))

    def to_dict(self) -> dict[str, Any]:
        """The fields, as they are saved."""
        return {entry.name: list(getattr(self, entry.name)) for entry in fields(Card)}


@dataclass(frozen=True)
class Dataset(Card):
    """What is known of a data set before its images are read."""

    name: str
    load: Callable[[str], Source | None] = field(repr=False)

    @overload
    def split(self, which: Literal["train", "test"]) -> Source: ...
    @overload
    def split(self, which: Literal["val"]) -> Source | None: ...
    def split(self, which):
        """Load a split, once. None where there is no "val".

        Raises:
          UserError: an image cannot be read, or too few images for "val".
        """
        return self.load(which)

    def check_same(self, saved: dict[str, Any], where: str) -> None:
        """Refuse data of other classes than those that a run was trained on.

        Raises:
          UserError: naming what differs.
        """
        was, now = saved["class_names"], list(self.class_names)
        if was != now:
            lost, new = [name for name in was if name not in now], [name for name in now if name not in was]
            raise UserError(
                f"{where} was trained on other classes: missing are {lost or 'none'}, new are {new or 'none'}"
            )

    def describe(self) -> str:
        """In words, without the number of images."""
        return f"images of {len(self.class_names)} classes, {self.image_shape}"


@dataclass(frozen=True)
class _Stored:
    """What we know of a data set of fixed size."""

    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STORED = {
    "digits": _Stored((8, 8, 1), (0.3054,), (0.3760,)),
    "cifar10": _Stored((32, 32, 3), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _Stored((32, 32, 3), (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "tiny_imagenet": _Stored((64, 64, 3), IMAGENET_MEAN, IMAGENET_STD),
}
NAMES = (*STORED, "folder")


def load_dataset(
    name: str, *, data_dir: str, image_size: int, val_fraction: float, seed: int, may_prepare: bool = True
) -> Dataset:
    """Find a data set by name; CIFAR and Tiny ImageNet are downloaded and prepared on first use, if `may_prepare`.

    `val_fraction` in [0, 0.5] of each class's training images, chosen by the seed, become "val"; with 0 there is none.
    For "folder", `data_dir` is <root> with <root>/train/<class>/*.{jpg,jpeg,png} and test/ or val/ or both beside
    train/: val/ alone is the test split. An image's shorter side becomes `image_size`, the rest is cropped evenly.
    Transparency and EXIF orientation are ignored.

    Raises:
      UserError: the name, size or fraction does not fit the data, which cannot be had, or a folder is not as above.
    """
    if name not in NAMES:
        close = get_close_matches(name, NAMES, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"there is no dataset {name!r}: {hint}Known are {', '.join(NAMES)}")
    root = Path(data_dir).expanduser()
    if name == "folder":
        return _load_folder(root, image_size, val_fraction, seed)
    stored = STORED[name]
    height, width, _ = stored.image_shape
    if image_size != height:
        raise UserError(f"image_size is {image_size}, but the images of {name} have {height}x{width}: set {height}")
    if name == "digits":
        class_names, load = tuple("0123456789"), _load_digits
    else:
        from dblocks_jax.data.tfds_builders import prepare

        builder: Any = prepare(name, root, may_write=may_prepare)
        class_names = tuple(builder.info.features["label"].names)

        def load(which: str) -> ArraySource:
            return _read_prepared(builder, which, stored.image_shape)

    split = _with_val(load, name, val_fraction, seed)
    return Dataset(class_names, stored.image_shape, stored.mean, stored.std, name, split)


def _with_val(load: Callable[[str], Source], name: str, fraction: float, seed: int) -> Callable[[str], Source | None]:
    """Loads "train", "val" and "test", each once, where `load` knows "train" and "test"."""
    load = cache(load)

    @cache
    def split(which: str) -> Source | None:
        if which == "test" or not fraction:
            return load(which) if which != "val" else None
        train = load("train")
        kept, held_out = _hold_out(train.labels, fraction, seed)
        if not len(held_out):
            raise UserError(
                f"val_fraction={fraction} of the {len(train)} training images of {name} leaves none: raise it"
            )
        return Subset(train, kept if which == "train" else held_out)

    return split


def _hold_out(
    labels: Int32[np.ndarray, " n"], fraction: float, seed: int
) -> tuple[Int[np.ndarray, " kept"], Int[np.ndarray, " held_out"]]:
    """(rest, `fraction` of each class), both ascending."""
    rng = np.random.default_rng([zlib.crc32(b"validation"), seed])
    is_held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        is_held_out[members[: round(fraction * len(members))]] = True
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def _load_digits(which: str) -> ArraySource:
    """scikit-learn's 1797 digits, with grey levels 0..16 spread over 0..255; the same 360 are the test split always."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)), test_size=DIGITS_TEST_IMAGES, stratify=digits.target, random_state=0
    )
    chosen = np.sort({"train": train, "test": test}[which])
    pixels = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return ArraySource(pixels[..., None], digits.target[chosen].astype(np.int32))


def _read_prepared(builder: Any, which: str, image_shape: tuple[int, int, int]) -> ArraySource:
    """A prepared TFDS split as arrays; features are "label" and "image", pixels or the bytes of an image file."""
    try:
        records = builder.as_data_source(which)
        pixels = np.empty((len(records), *image_shape), np.uint8)
        labels = np.empty(len(records), np.int32)
        chunk = 64 * CHUNK  # so that not all records exist twice at a time
        for start in range(0, len(records), chunk):
            part = slice(start, min(start + chunk, len(records)))
            examples = records.__getitems__(list(range(part.start, part.stop)))
            labels[part] = [example["label"] for example in examples]
            images = [example["image"] for example in examples]
            if isinstance(images[0], bytes):
                images = _decode_all([BytesIO(image) for image in images], image_shape[0])
            pixels[part] = images
    except Exception as error:  # ArrayRecord, TFDS and Pillow raise many types
        raise UserError(
            f"the data set in {builder.data_path} is damaged ({brief(error)}): remove it to prepare it anew"
        ) from error
    num_classes = builder.info.features["label"].num_classes
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise UserError(
            f"the data set in {builder.data_path} is damaged: record {wrong[0]} of {which} has the label "
            f"{labels[wrong[0]]}, but there are {num_classes} classes. Remove it to prepare it anew"
        )
    return ArraySource(pixels, labels)


def _load_folder(root: Path, image_size: int, val_fraction: float, seed: int) -> Dataset:
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: set data_dir to the root of your images")
    if not (root / "train").is_dir():
        raise UserError(f"{root / 'train'} is missing: images belong in {root}/train/<class>/ and {root}/test/<class>/")
    own = {which: root / which for which in ("train", "val", "test") if (root / which).is_dir()}
    if "test" not in own:
        if "val" not in own:
            raise UserError(f"{root / 'test'} is missing, and there is no {root / 'val'} to use instead")
        own["test"] = own.pop("val")
    if "val" in own and val_fraction:
        raise UserError(f"val_fraction must be 0, not {val_fraction}: {own['val']} is the validation split")
    class_names = tuple(path.name for path in _visible(own["train"]) if path.is_dir())
    if not class_names:
        raise UserError(f"{own['train']} has no class folders: images belong in {own['train']}/<class>/")
    for name in class_names:
        if name != name.encode("utf-8", "replace").decode():
            raise UserError(f"{own['train']} has a class whose name is not text, {name!r}: rename its folders")
    if len(class_names) == 1:
        raise UserError(f"{own['train']} has the one class {class_names[0]!r}: there must be two at least")
    files = {which: _list_images(folder, class_names) for which, folder in own.items()}

    def load(which: str) -> Source:
        return _open_images(*files[which], image_size)

    split = cache(load) if "val" in own else _with_val(load, str(root), val_fraction, seed)
    return Dataset(class_names, (image_size, image_size, 3), IMAGENET_MEAN, IMAGENET_STD, "folder", split)


def _visible(folder: Path) -> list[Path]:
    """Entries in the order of their names. Hidden ones are left out: file managers and editors leave some behind."""
    try:
        return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from error


def _list_images(folder: Path, class_names: Sequence[str]) -> tuple[tuple[Path, ...], Int32[np.ndarray, " n"]]:
    """(files, labels) of a split, class by class."""
    paths, labels = [], []
    for class_folder in _visible(folder):
        if not class_folder.is_dir():
            continue
        if class_folder.name not in class_names:
            raise UserError(f"{class_folder} is a class that the training images do not have")
        images = [path for path in _visible(class_folder) if path.suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            raise UserError(f"{class_folder} has no image: none ends in {', '.join(IMAGE_SUFFIXES)}")
        paths += images
        labels += [class_names.index(class_folder.name)] * len(images)
    if not paths:
        raise UserError(f"{folder} has no images: they belong in {folder}/<class>/")
    return tuple(paths), np.array(labels, np.int32)


def _open_images(paths: tuple[Path, ...], labels: Int32[np.ndarray, " n"], image_size: int) -> Source:
    if len(paths) * image_size**2 * 3 <= IN_MEMORY_BYTES:
        return ArraySource(_decode_all(paths, image_size), labels)
    stamps = np.empty((len(paths), 2), np.int64)

    def look(index: int) -> None:
        _check_header(paths[index])
        stamps[index] = stamp(paths[index])

    _in_threads(look, range(len(paths)), CHUNK)
    return FileSource(paths, labels, image_size, stamps)


def stamp(path: Path) -> tuple[int, int]:
    """Size and time of the last change, in bytes and nanoseconds."""
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"cannot read the image {path}: {error.strerror}") from error
    return found.st_size, found.st_mtime_ns


def read_images(paths: Sequence[Path], image_shape: tuple[int, int, int]) -> UInt8[np.ndarray, "n h w c"]:
    """Image files as a model of square images takes them: as those of a "folder", grey where it has one channel.

    Raises:
      UserError: a file cannot be read.
    """
    size, _, channels = image_shape
    pixels = _decode_all(paths, size, chunk=1)
    if channels == 3:
        return pixels
    return np.rint(pixels @ LUMA).astype(np.uint8)[..., None]


def _decode_all(
    files: Sequence[Path | BytesIO], image_size: int, *, chunk: int = CHUNK
) -> UInt8[np.ndarray, "n size size 3"]:
    """Decode by threads; the error of the first file that cannot be read ends it."""
    pixels = np.empty((len(files), image_size, image_size, 3), np.uint8)

    def decode(index: int) -> None:
        pixels[index] = _decode(files[index], image_size)

    _in_threads(decode, range(len(files)), chunk)
    return pixels


def _in_threads(function: Callable[[Any], None], items: Sequence[Any], chunk: int) -> None:
    def run(part: Iterable[Any]) -> None:
        for item in part:
            function(item)

    pool = ThreadPoolExecutor()
    try:
        for _ in pool.map(run, (items[start : start + chunk] for start in range(0, len(items), chunk))):
            pass
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, do not go through the rest


def _decode(file: Path | BytesIO, image_size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The largest centred square, resized to `image_size`: the same as resizing first, but cheap for any shape."""
    try:
        with Image.open(file) as image:
            side = min(image.size)
            left, top = (image.width - side) / 2, (image.height - side) / 2
            box = (left, top, left + side, top + side)
            return np.asarray(_to_rgb(image).resize((image_size, image_size), Image.Resampling.BICUBIC, box=box))
    except Exception as error:  # Pillow raises many types
        raise UserError(f"cannot read the image {file}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would turn every level above 255 into white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:  # Pillow wants such a palette to go by way of RGBA
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _check_header(path: Path) -> None:
    try:
        with Image.open(path):
            pass
    except Exception as error:  # Pillow raises many types
        raise UserError(f"cannot read the image {path}: {error}") from error

"""Data sets by name: random access to the uint8 images and labels of each split, loaded only when it is asked for."""

import os
from dataclasses import dataclass
from difflib import get_close_matches
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from dblocks_jax.data.digits import load_digits
from dblocks_jax.data.folder import IMAGENET_MEAN, IMAGENET_STD, load_folder
from dblocks_jax.data.images import CHUNK, IMAGE_SUFFIXES, decode_all, read_images, stamp
from dblocks_jax.data.sources import ArraySource, Card, Dataset, FileSource, Source, Subset, with_val
from dblocks_jax.run.errors import UserError, brief

__all__ = [
    "IMAGE_SUFFIXES", "NAMES", "STORED", "ArraySource", "Card", "Dataset", "FileSource", "Source", "Subset",
    "load_dataset", "read_images", "stamp",
]  # fmt: skip


@dataclass(frozen=True)
class _Stored:
    """What we know of a data set of fixed size."""

    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


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
        raise UserError(f"there is no dataset {name!r}: {hint}Known are {', '.join(NAMES)}, and, to generate, latents")
    root = Path(os.path.expanduser(data_dir))  # ~nobody stays as it is
    if name == "folder":
        return load_folder(root, image_size, val_fraction, seed)
    stored = STORED[name]
    height, width, _ = stored.image_shape
    if image_size != height:
        raise UserError(f"image_size is {image_size}, but the images of {name} have {height}x{width}: set {height}")
    if name == "digits":
        class_names, load = tuple("0123456789"), load_digits
    else:
        from dblocks_jax.data.tfds_builders import prepare

        builder: Any = prepare(name, root, may_write=may_prepare)
        class_names = tuple(builder.info.features["label"].names)

        def load(which: str) -> ArraySource:
            return _read_prepared(builder, which, stored.image_shape)

    split = with_val(load, name, val_fraction, seed)
    return Dataset(class_names, stored.image_shape, stored.mean, stored.std, name, split)


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
                images = decode_all([BytesIO(image) for image in images], image_shape[0])
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

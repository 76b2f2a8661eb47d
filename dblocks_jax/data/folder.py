"""A folder of images, a class in each of its folders: <root>/train/<class>/*.jpg."""

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from dblocks_jax.data.images import CHUNK, IMAGE_SUFFIXES, check_header, decode_all, in_threads, stamp
from dblocks_jax.data.sources import ArraySource, Dataset, FileSource, Source, with_val
from dblocks_jax.run.errors import UserError
from dblocks_jax.run.naming import shown

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IN_MEMORY_BYTES = 2 << 30  # a split of at most this size is decoded once; a larger one batch by batch


def load_folder(root: Path, image_size: int, val_fraction: float, seed: int) -> Dataset:
    """The data set below `root`; see `load_dataset`."""
    if not os.path.isdir(root):
        raise UserError(f"there is no folder {root}: set data_dir to the root of your images")
    if not os.path.isdir(root / "train"):
        raise UserError(f"{root / 'train'} is missing: images belong in {root}/train/<class>/ and {root}/test/<class>/")
    own = {which: root / which for which in ("train", "val", "test") if os.path.isdir(root / which)}
    if "test" not in own:
        if "val" not in own:
            raise UserError(f"{root / 'test'} is missing, and there is no {root / 'val'} to use instead")
        own["test"] = own.pop("val")
    if "val" in own and val_fraction:
        raise UserError(f"val_fraction must be 0, not {val_fraction}: {own['val']} is the validation split")
    class_names = tuple(path.name for path in visible(own["train"]) if os.path.isdir(path))
    if not class_names:
        raise UserError(f"{own['train']} has no class folders: images belong in {own['train']}/<class>/")
    for name in class_names:
        if name != name.encode("utf-8", "replace").decode():
            raise UserError(f"{own['train']} has a class whose name is not text, {name!r}: rename its folders")
    if len(class_names) == 1:
        raise UserError(f"{own['train']} has the one class {class_names[0]!r}: there must be two at least")
    files = {which: (folder, *_list_images(folder, class_names)) for which, folder in own.items()}

    def load(which: str) -> Source:
        return _open_images(*files[which], image_size)

    split = cache(load) if "val" in own else with_val(load, str(root), val_fraction, seed)
    return Dataset(class_names, (image_size, image_size, 3), IMAGENET_MEAN, IMAGENET_STD, "folder", split)


def visible(folder: Path) -> list[Path]:
    """Entries in the order of their names. Hidden ones are left out: file managers and editors leave some behind."""
    try:
        return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)
    except OSError as error:
        raise UserError(f"cannot read the folder {shown(folder)}: {error.strerror}") from error


def _list_images(folder: Path, class_names: Sequence[str]) -> tuple[tuple[Path, ...], Int32[np.ndarray, " n"]]:
    """(files, labels) of a split, class by class."""
    paths, labels = [], []
    for class_folder in visible(folder):
        if not os.path.isdir(class_folder):
            continue
        if class_folder.name not in class_names:
            raise UserError(f"{shown(class_folder)} is a class that the training images do not have")
        images = [path for path in visible(class_folder) if path.suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            raise UserError(f"{shown(class_folder)} has no image: none ends in {', '.join(IMAGE_SUFFIXES)}")
        paths += images
        labels += [class_names.index(class_folder.name)] * len(images)
    if not paths:
        raise UserError(f"{folder} has no images: they belong in {folder}/<class>/")
    return tuple(paths), np.array(labels, np.int32)


def _open_images(folder: Path, paths: tuple[Path, ...], labels: Int32[np.ndarray, " n"], image_size: int) -> Source:
    """Every image is looked at before any is used: decoded, or where that would fill the memory, its header."""
    if len(paths) * image_size**2 * 3 <= IN_MEMORY_BYTES:
        return ArraySource(decode_all(paths, image_size, where=shown(folder)), labels)
    stamps = np.empty((len(paths), 2), np.int64)

    def look(index: int) -> None:
        check_header(paths[index])
        stamps[index] = stamp(paths[index])

    in_threads(look, range(len(paths)), CHUNK, doing=f"checking %s images in {shown(folder)}")
    return FileSource(paths, labels, image_size, stamps)

"""The data set "latents": images that a user's autoencoder has encoded, one float array [h, w, c] a file.

    ROOT/train/<class>/*.npy and ROOT/test/<class>/*.npy (or val/; with both, val/ chooses the checkpoint)

A file is a stranger's until its header has been read: only regular files are opened, nothing is unpickled, and no more
values are asked for than it has.
"""

import math
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Float32, Int, Int32

from dblocks_jax.data.folder import IN_MEMORY_BYTES, visible
from dblocks_jax.data.images import CHUNK, in_threads
from dblocks_jax.data.sources import Dataset, Source, with_val
from dblocks_jax.run.errors import UserError, brief

SUFFIX = ".npy"
LONGEST_HEADER = 1 << 14  # bytes; a header may claim gigabytes, which numpy would read before it refuses them
MOST_VALUES = 1 << 24  # of a latent; a file that is mostly holes may have any number

Stamp = tuple[int, int]  # a file's size and the time of its last change, in bytes and nanoseconds


@dataclass(frozen=True)
class LatentArrays:
    """Latents in memory."""

    values: Float32[np.ndarray, "n h w c"] = field(repr=False)
    labels: Int32[np.ndarray, " n"] = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Int[np.ndarray, " b"]) -> Float32[np.ndarray, "b h w c"]:
        return self.values[indices]

    def take(self, indices: Int[np.ndarray, " b"]) -> dict[str, np.ndarray]:
        return {"image": self.images(indices), "label": self.labels[indices]}


@dataclass(frozen=True)
class LatentFiles:
    """Latents read each time they are asked for. `stamps` are the files' sizes and times of change, as first seen.

    Raises:
      UserError: from `images`, naming a file that is not the one that was there at the start, or is not finite.
    """

    paths: tuple[Path, ...] = field(repr=False)
    labels: Int32[np.ndarray, " n"] = field(repr=False)
    shape: tuple[int, int, int]
    scale: float
    stamps: tuple[Stamp, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Int[np.ndarray, " b"]) -> Float32[np.ndarray, "b h w c"]:
        paths, stamps = [self.paths[i] for i in indices], [self.stamps[i] for i in indices]
        return _read_all(paths, stamps, self.shape, self.scale, chunk=1)

    def take(self, indices: Int[np.ndarray, " b"]) -> dict[str, np.ndarray]:
        return {"image": self.images(indices), "label": self.labels[indices]}


def load_latents(data_dir: str, *, scale: float, val_fraction: float, seed: int) -> Dataset:
    """Find the latents under `data_dir`; every file's header is checked when its split is loaded.

    Values are multiplied by `scale`, 0.18215 for Stable Diffusion's autoencoder, which brings them to about unit size;
    so the card's mean is 0 and its std 1. A split of at most 2 GiB in float32 is read once, a larger one batch by
    batch. `val_fraction` is as in `load_dataset`.

    Raises:
      UserError: the folder is not as above, or the scale is no positive number. From `split`: a file is no latent, or
        has another shape than the first training latent.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise UserError(f"the scale of latents must be a positive number, not {scale}")
    root = Path(os.path.expanduser(data_dir))  # ~nobody stays as it is
    own = _find_splits(root, val_fraction)
    class_names = _find_classes(own["train"])
    files = {which: _list_latents(folder, class_names) for which, folder in own.items()}
    first = files["train"][0][0]
    shape = _read_header(first).shape

    def load(which: str) -> Source:
        return _open_latents(*files[which], shape, scale, first)

    split = cache(load) if "val" in own else with_val(load, str(root), val_fraction, seed)
    channels = shape[-1]
    return Dataset(class_names, shape, (0.0,) * channels, (1.0,) * channels, "latents", split)


def _find_splits(root: Path, val_fraction: float) -> dict[str, Path]:
    """The folder of each split."""
    if not os.path.isdir(root):
        raise UserError(f"there is no folder {root}: set data_dir to the root of your latents")
    own = {which: root / which for which in ("train", "val", "test") if (root / which).is_dir()}
    if "train" not in own:
        raise UserError(
            f"{root / 'train'} is missing: latents belong in {root}/train/<class>/ and {root}/test/<class>/"
        )
    if "test" not in own:
        if "val" not in own:
            raise UserError(f"{root / 'test'} is missing, and there is no {root / 'val'} to use instead")
        own["test"] = own.pop("val")
    if "val" in own and val_fraction:
        raise UserError(f"val_fraction must be 0, not {val_fraction}: {own['val']} is the validation split")
    return own


def _find_classes(train: Path) -> tuple[str, ...]:
    """One is enough: there is a distribution to learn."""
    names = tuple(path.name for path in visible(train) if path.is_dir())
    if not names:
        raise UserError(f"{train} has no class folders: latents belong in {train}/<class>/")
    for name in names:
        if name != name.encode("utf-8", "replace").decode():
            raise UserError(f"{train} has a class whose name is not text, {name!r}: rename its folders")
    return names


def _list_latents(folder: Path, class_names: Sequence[str]) -> tuple[tuple[Path, ...], Int32[np.ndarray, " n"]]:
    """(files, labels) of a split, class by class."""
    paths, labels = [], []
    for class_folder in visible(folder):
        if not class_folder.is_dir():
            continue
        if class_folder.name not in class_names:
            raise UserError(f"{class_folder} is a class that the training latents do not have")
        latents = [path for path in visible(class_folder) if path.suffix.lower() == SUFFIX]
        if not latents:
            raise UserError(f"{class_folder} has no latent: none ends in {SUFFIX}")
        paths += latents
        labels += [class_names.index(class_folder.name)] * len(latents)
    if not paths:
        raise UserError(f"{folder} has no latents: they belong in {folder}/<class>/")
    return tuple(paths), np.array(labels, np.int32)


def _open_latents(
    paths: tuple[Path, ...], labels: Int32[np.ndarray, " n"], shape: tuple[int, int, int], scale: float, first: Path
) -> LatentArrays | LatentFiles:
    stamps: list[Stamp] = [(0, 0)] * len(paths)

    def look(index: int) -> None:
        header = _read_header(paths[index])
        if header.shape != shape:
            raise UserError(
                f"the latent {paths[index]} has shape {list(header.shape)}, but {first} has {list(shape)}: all must "
                f"have the same"
            )
        stamps[index] = header.stamp

    in_threads(look, range(len(paths)), CHUNK)
    if 4 * len(paths) * math.prod(shape) <= IN_MEMORY_BYTES:
        return LatentArrays(_read_all(paths, stamps, shape, scale, chunk=CHUNK), labels)
    return LatentFiles(paths, labels, shape, scale, tuple(stamps))


def _read_all(
    paths: Sequence[Path], stamps: Sequence[Stamp], shape: tuple[int, int, int], scale: float, *, chunk: int
) -> Float32[np.ndarray, "n h w c"]:
    """Read by threads; the error of the first file that cannot be used ends it."""
    values = np.empty((len(paths), *shape), np.float32)

    def read(index: int) -> None:
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is named
            values[index] = _read(paths[index], stamps[index]).astype(np.float32) * np.float32(scale)
        if not np.isfinite(values[index]).all():
            raise UserError(f"the latent {paths[index]} has values that are not finite, or too large for float32")

    in_threads(read, range(len(paths)), chunk)
    return values


@dataclass(frozen=True)
class _Header:
    """What an array file says of itself, and where its values begin."""

    shape: tuple[int, int, int]
    dtype: np.dtype
    order: Literal["C", "F"]
    start: int
    stamp: Stamp


def _read_header(path: Path) -> _Header:
    """The header of a file that has as many bytes as it says."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would wait for ever
            raise UserError(f"the latent {path} is not a regular file")
        with path.open("rb") as file:
            found, head = os.fstat(file.fileno()), BytesIO(file.read(LONGEST_HEADER))
            version = np.lib.format.read_magic(head)
            if version not in ((1, 0), (2, 0)):  # later ones are for arrays with named fields
                raise ValueError(f"it is of format {version}")
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(head)
            start = head.tell()
    except OSError as error:
        raise UserError(f"cannot read the latent {path}: {error.strerror}") from error
    except UserError:
        raise
    except Exception as error:  # numpy parses the header as Python, and raises what that raises
        raise UserError(f"cannot read the latent {path}: {brief(error)}") from error
    if dtype.kind != "f":
        raise UserError(f"the latent {path} has values of type {dtype}: they must be floats")
    if len(shape) != 3 or min(shape) < 1:
        raise UserError(f"the latent {path} has shape {list(shape)}: it must be [height, width, channels]")
    height, width, channels = shape
    if height < width == channels:  # as PyTorch's autoencoders give them
        raise UserError(
            f"the latent {path} has shape {list(shape)}, which looks like [channels, height, width]: store it as "
            f"[height, width, channels]"
        )
    if found.st_size - start != math.prod(shape) * dtype.itemsize:
        raise UserError(f"the latent {path} is damaged: it has {found.st_size - start} bytes for a shape {list(shape)}")
    if math.prod(shape) > MOST_VALUES:
        raise UserError(f"the latent {path} has shape {list(shape)}: it must have at most {MOST_VALUES:,} values")
    order = "F" if fortran else "C"
    return _Header((height, width, channels), dtype, order, start, (found.st_size, found.st_mtime_ns))


def _read(path: Path, stamp: Stamp) -> Float[np.ndarray, "h w c"]:
    header = _read_header(path)
    if header.stamp != stamp:
        raise UserError(f"the latent {path} has changed since training began")
    try:
        values = np.fromfile(path, header.dtype, math.prod(header.shape), offset=header.start)
    except OSError as error:
        raise UserError(f"cannot read the latent {path}: {error.strerror}") from error
    return values.reshape(header.shape, order=header.order)

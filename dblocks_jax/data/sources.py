"""What a data set and its splits are: images and labels by index, and what a model knows of them."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol, overload, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32, Num, UInt8

from dblocks_jax.data.images import decode_all, stamp
from dblocks_jax.run.errors import UserError, brief
from dblocks_jax.run.naming import shown

LARGEST = 1e30  # of a card's numbers: room to calculate with them


@runtime_checkable
class Source(Protocol):
    """Random access to the images of one split."""

    @property
    def labels(self) -> Int32[np.ndarray, " n"]: ...
    def __len__(self) -> int: ...
    def images(self, indices: Int[np.ndarray, " b"]) -> Num[np.ndarray, "b h w c"]: ...
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
                raise UserError(f"the image {shown(self.paths[i])} has changed since training began")
        return decode_all([self.paths[i] for i in indices], self.image_size, chunk=1)

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
        """The card among what a run has saved of its data.

        Raises:
          UserError: a field is missing, or is none of a card.
        """
        try:
            names, shape, mean, std = (tuple(saved[entry.name]) for entry in fields(Card))
        except (KeyError, TypeError) as error:
            raise UserError(f"what is saved of the data is no card: {brief(error)}") from error
        if not names or not all(isinstance(name, str) for name in names):
            raise UserError("what is saved of the data has class_names that are no names")
        if len(shape) != 3 or not all(type(size) is int and size > 0 for size in shape):
            raise UserError("what is saved of the data has an image_shape that is not height, width, channels")
        for what, values in (("mean", mean), ("std", std)):
            if len(values) != shape[2] or not all(
                type(value) in (int, float) and abs(value) <= LARGEST for value in values
            ):
                raise UserError(f"what is saved of the data has a {what} that is no number for each channel")
        if min(std) <= 0:
            raise UserError("what is saved of the data has a std that is not greater than 0")
        return cls(names, shape, mean, std)

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
          UserError: naming what differs, or what is saved is none of a data set.
        """
        was, now = saved.get("class_names"), list(self.class_names)
        if not isinstance(was, list):
            raise UserError(
                f"{where} has saved no class_names of its data: restore data.json, or use another --workdir"
            )
        if was != now:
            lost, new = [name for name in was if name not in now], [name for name in now if name not in was]
            raise UserError(
                f"{where} was trained on other classes: missing are {lost or 'none'}, new are {new or 'none'}"
            )

    def describe(self) -> str:
        """In words, without the number of images."""
        return f"images of {len(self.class_names)} classes, {self.image_shape}"


def with_val(load: Callable[[str], Source], name: str, fraction: float, seed: int) -> Callable[[str], Source | None]:
    """Loads "train", "val" and "test", each once, where `load` knows "train" and "test"."""
    load = cache(load)

    @cache
    def split(which: str) -> Source | None:
        if which == "test" or not fraction:
            return load(which) if which != "val" else None
        train = load("train")
        kept, held_out = hold_out(train.labels, fraction, seed)
        if not len(held_out):
            raise UserError(
                f"val_fraction={fraction} of the {len(train)} training images of {name} leaves none: raise it"
            )
        return Subset(train, kept if which == "train" else held_out)

    return split


def hold_out(
    labels: Int32[np.ndarray, " n"], fraction: float, seed: int
) -> tuple[Int[np.ndarray, " kept"], Int[np.ndarray, " held_out"]]:
    """(rest, `fraction` of each class), both ascending."""
    rng = np.random.default_rng([zlib.crc32(b"validation"), seed])
    is_held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        is_held_out[members[: round(fraction * len(members))]] = True
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)

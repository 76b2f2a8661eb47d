"""Images as sequences of symbols, row by row one for each channel of each pixel: the vocabulary are grey levels."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from dblocks_jax.data.datasets import Card, Dataset, Source

GREY_LEVELS = 256


@dataclass(frozen=True)
class PixelCard:
    """What a model knows of images that it sees as sequences."""

    images: Card

    @property
    def vocabulary(self) -> range:
        """Every grey level is a symbol."""
        return range(GREY_LEVELS)

    @property
    def length(self) -> int:
        """Symbols of an image."""
        height, width, channels = self.images.image_shape
        return height * width * channels

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> "PixelCard":
        """The card among what a run has saved of its data.

        Raises:
          UserError: a field is missing, or is none of a card.
        """
        return cls(Card.of(saved))

    def to_dict(self) -> dict[str, Any]:
        """The images' own."""
        return self.images.to_dict()


@dataclass(frozen=True)
class PixelSource:
    """The images of one split."""

    images: Source
    length: int

    def __len__(self) -> int:
        return len(self.images)

    @property
    def units(self) -> int:
        """How many symbols all of them have together."""
        return len(self) * self.length

    def take(self, indices: Int[np.ndarray, " b"]) -> dict[str, UInt8[np.ndarray, "b t"]]:
        """Sequences of pixels."""
        return {"tokens": self.images.images(indices).reshape(len(indices), self.length)}


@dataclass(frozen=True)
class Pixels(PixelCard):
    """A data set of images, as sequences."""

    images: Dataset = field()

    @property
    def name(self) -> str:
        return self.images.name

    def split(self, which: str) -> PixelSource | None:
        """None where there is no "val".

        Raises:
          UserError: it cannot be read.
        """
        found = self.images.split(which)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return None if found is None else PixelSource(found, self.length)

    def check_same(self, saved: dict[str, Any], where: str) -> None:
        """Refuse images of other classes than those that a run was trained on.

        Raises:
          UserError: naming what differs.
        """
        self.images.check_same(saved, where)

    def describe(self) -> str:
        """In words, without the number of images."""
        return f"{self.images.describe()}, as {self.length} symbols each"

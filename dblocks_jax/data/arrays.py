"""Data in memory: any pytree of arrays, for tasks of one's own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from dblocks_jax.run.arrays import checksum
from dblocks_jax.run.errors import UserError


@dataclass(frozen=True)
class Arrays:
    """One split: a pytree of numpy arrays [n, ...]."""

    examples: Any = field(repr=False)

    def __len__(self) -> int:
        return len(jax.tree.leaves(self.examples)[0])

    def take(self, indices: Int[np.ndarray, " b"]) -> Any:
        """These examples."""
        return jax.tree.map(lambda array: array[indices], self.examples)


@dataclass(frozen=True)
class ArrayData:
    """The examples of "train", "test" and, where a checkpoint is to be chosen by it, "val": see `Arrays`.

    Raises:
      UserError: "train" or "test" is missing, or the arrays of a split have not all the same number of examples.
    """

    name: str
    splits: Mapping[str, Any] = field(repr=False)

    def __post_init__(self) -> None:
        for which in ("train", "test"):
            if which not in self.splits:
                raise UserError(f"the data {self.name} have no split {which!r}")
        for which, examples in self.splits.items():
            counts = {len(array) for array in jax.tree.leaves(examples)}
            if len(counts) != 1:
                raise UserError(f"the arrays of the split {which!r} of {self.name} have {sorted(counts)} examples")

    def split(self, which: str) -> Arrays | None:
        """None where there is no "val"."""
        return Arrays(self.splits[which]) if which in self.splits else None

    def to_dict(self) -> dict[str, Any]:
        """A checksum of the training examples."""
        return {"crc32": checksum(self.splits["train"])}

    def check_same(self, saved: dict[str, Any], where: str) -> None:
        """Refuse other training examples than those of a run.

        Raises:
          UserError: they differ.
        """
        if saved.get("crc32") != self.to_dict()["crc32"]:
            raise UserError(f"{where} was trained on other examples than those of {self.name} that are here now")

    def describe(self) -> str:
        """The arrays of an example."""
        leaves = jax.tree_util.tree_leaves_with_path(self.splits["train"])
        return ", ".join(
            f"{jax.tree_util.keystr(path, simple=True, separator='.')} {leaf.dtype.name}{list(leaf.shape[1:])}"
            for path, leaf in leaves
        )

"""What the trainer knows of data: splits of examples, taken by their indices."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int


@runtime_checkable
class Source(Protocol):
    """Random access to the examples of one split."""

    def __len__(self) -> int: ...
    def take(self, indices: Int[np.ndarray, " b"]) -> Any:
        """These examples, as a pytree of numpy arrays [b, ...]."""
        ...


@runtime_checkable
class Data(Protocol):
    """Data whose splits are read when they are asked for."""

    @property
    def name(self) -> str: ...

    def split(self, which: Any) -> Any:
        """The `Source` "train", "val" or "test", loaded once. None where there is no "val".

        Raises:
          UserError: it cannot be read.
        """
        ...

    def to_dict(self) -> dict[str, Any]:
        """What must be known of the data to use a model without them, for JSON."""
        ...

    def check_same(self, saved: dict[str, Any], where: str) -> None:
        """Refuse data that a run was not trained on.

        Raises:
          UserError: naming what differs.
        """
        ...

    def describe(self) -> str:
        """In words, without the number of examples."""
        ...

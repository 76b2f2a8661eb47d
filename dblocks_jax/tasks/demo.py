"""What a page to play with (`--mode=demo`) asks of a task, and how its requests are read: they may hold anything."""

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from dblocks_jax.run.errors import UserError

Wanted = Mapping[str, Any]  # the fields of a request, as JSON has them
Frame = dict[str, Any]  # a step of the answer, for JSON

MOST_FRAMES = 48  # of a chain that are shown
LONGEST_TEXT = 100_000  # characters that are read at all
LARGEST_NUMBER = 2**31 - 1


class Demo(NamedTuple):
    """A trained model to play with."""

    template: str  # among the pages
    values: dict[str, Any]  # that it shows
    first: list[dict[str, Any]]  # requests for which all is compiled that others need
    answer: Callable[[Wanted], Iterator[Frame]]  # raises UserError for a request that cannot be answered


def kept(count: int) -> set[int]:
    """Which of so many steps are shown: evenly, the first and the last among them."""
    return set(np.linspace(0, count - 1, min(count, MOST_FRAMES)).astype(int).tolist())


def whole_number(wanted: Wanted, name: str, low: int, high: int) -> int:
    """A field that is a whole number.

    Raises:
      UserError: it is none, or does not lie in [low, high].
    """
    value: Any = wanted.get(name)
    if type(value) is not int or not low <= value <= high:
        raise UserError(f"{name} must be a whole number in [{low}, {high}]")
    return value


def number(wanted: Wanted, name: str, low: float, high: float) -> float:
    """A field that is a number.

    Raises:
      UserError: it is none, or does not lie in [low, high].
    """
    value: Any = wanted.get(name)
    if type(value) not in (int, float) or not low <= value <= high:  # NaN does not
        raise UserError(f"{name} must be a number in [{low:g}, {high:g}]")
    return float(value)


def text_of(wanted: Wanted, name: str) -> str:
    """A field that is a text, which may be empty.

    Raises:
      UserError: it is none, or of more than LONGEST_TEXT characters.
    """
    value: Any = wanted.get(name)
    if not isinstance(value, str):
        raise UserError(f"{name} must be a text")
    if len(value) > LONGEST_TEXT:
        raise UserError(f"{name} has {len(value):,} characters, of which at most {LONGEST_TEXT:,} are read: shorten it")
    return value


def bytes_of(wanted: Wanted, name: str) -> bytes:
    """A field that is a file in base64.

    Raises:
      UserError: it is none.
    """
    value: Any = wanted.get(name)
    try:
        return base64.b64decode(value if isinstance(value, str) else "?", validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{name} must be a file in base64") from error

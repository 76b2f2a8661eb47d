"""Checks of config fields that every part of the program makes of its own: each refusal is one line."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence

from ml_collections import ConfigDict

from dblocks_jax.run.errors import UserError

LARGEST_FLOAT = 1e30  # room to calculate with it in float32
LARGEST_INT = 2**32 - 1
# What a field of each type may hold: saved tuples come back as lists, and a whole number will do for a float.
ACCEPTED = {int: int, float: int | float, bool: bool, str: str, tuple: list | tuple}
IN_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", tuple: "a list"}
BYTES_PER_PARAMETER = 12  # itself and AdamW's two moments


def check_fields(
    config: ConfigDict,
    *,
    types: Mapping[type, Iterable[str]] = {},
    choices: Mapping[str, Sequence[str]] = {},
    positive: Iterable[str] = (),
    not_negative: Iterable[str] = (),
    below_one: Iterable[str] = (),
    largest: Mapping[str, int] = {},
) -> None:
    """Refuse values outside their range. A config may be a stranger's: fields may be missing, or hold anything.

    Raises:
      UserError: naming the field, its value and what it must be.
    """
    for kind, names in types.items():
        for field in names:
            _check_type(config, field, kind)
    for field, known in choices.items():
        _check_there(config, field)
        if config[field] not in known:
            raise UserError(f"{field} is {config[field]!r}; choose one of {', '.join(known)}")
    for field in positive:
        if not config[field] > 0:
            raise UserError(f"{field} must be greater than 0, not {config[field]}")
    for field in not_negative:
        if not config[field] >= 0:
            raise UserError(f"{field} must not be negative, but is {config[field]}")
    for field in below_one:
        if not 0 <= config[field] < 1:
            raise UserError(f"{field} must lie in [0, 1), not {config[field]}")
    for field, most in largest.items():
        if config[field] > most:
            raise UserError(f"{field} must be at most {most}, not {config[field]}")


def _check_there(config: ConfigDict, field: str) -> None:
    if field not in config:
        raise UserError(f"the config has no field {field}")


def _check_type(config: ConfigDict, field: str, kind: type) -> None:
    _check_there(config, field)
    value = config[field]
    if not isinstance(value, ACCEPTED[kind]) or (isinstance(value, bool) and kind is not bool):
        # What is nested is not shown: it may be too deep for that.
        found = repr(value)[:80] if isinstance(value, str | float | bool | None) else f"a {type(value).__name__}"
        raise UserError(f"{field} must be {IN_WORDS[kind]}, not {found}")
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{field} holds a NUL, which no name or path has")
    if kind in (int, float) and isinstance(value, int) and abs(value) > LARGEST_INT:
        raise UserError(f"{field} must be at most {LARGEST_INT}, which it is not by far")


def check_finite(config: ConfigDict) -> None:
    """Refuse numbers that float32 cannot calculate with.

    Raises:
      UserError: naming the field.
    """
    for field, value in config.items():
        if isinstance(value, float) and not (math.isfinite(value) and abs(value) <= LARGEST_FLOAT):
            raise UserError(f"{field} must be a finite number of at most {LARGEST_FLOAT}, not {value}")


def check_divides(config: ConfigDict, divisor: str, field: str) -> None:
    """Refuse a field that is no multiple of another.

    Raises:
      UserError: naming both.
    """
    if config[field] % config[divisor]:
        raise UserError(f"{divisor}={config[divisor]} must divide {field}={config[field]}")


def check_fits_host(config: ConfigDict, weights: int, num_blocks: int) -> None:
    """A model starts in host memory: refuse one of so many parameters that it cannot.

    Where its blocks wait on disk, it starts block by block. A plain network is one block.

    Raises:
      UserError: with what it needs and what there is.
    """
    if config.idle_blocks == "disk":
        weights //= num_blocks
    needed = weights * BYTES_PER_PARAMETER
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available:
        raise UserError(
            f"a model of {weights:.3g} parameters needs {needed / 2**30:.4g} GiB of the host's memory, "
            f"which has {available / 2**30:.4g}: lower num_layers, hidden_size or intermediate_size"
        )

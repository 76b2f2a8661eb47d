"""Checks of config fields that every part of the program makes of its own: each refusal is one line."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence

from ml_collections import ConfigDict

from dblocks_jax.run.errors import UserError

LARGEST_FLOAT = 1e30  # room to calculate with it in float32
BYTES_PER_PARAMETER = 12  # itself and AdamW's two moments


def check_fields(
    config: ConfigDict,
    *,
    choices: Mapping[str, Sequence[str]] = {},
    positive: Iterable[str] = (),
    not_negative: Iterable[str] = (),
    below_one: Iterable[str] = (),
    largest: Mapping[str, int] = {},
) -> None:
    """Refuse values outside their range.

    Raises:
      UserError: naming the field, its value and what it must be.
    """
    for field, known in choices.items():
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


def check_fits_host(weights: int) -> None:
    """A model starts in host memory: refuse one of so many parameters that it cannot.

    Raises:
      UserError: with what it needs and what there is.
    """
    needed = weights * BYTES_PER_PARAMETER
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available:
        raise UserError(
            f"a model of {weights:.3g} parameters needs {needed / 2**30:.4g} GiB of the host's memory, "
            f"which has {available / 2**30:.4g}: lower num_layers, hidden_size or intermediate_size"
        )

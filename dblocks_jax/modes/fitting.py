"""What of a config fits into a device's memory, and the smallest number of blocks that does."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from ml_collections import ConfigDict

from dblocks_jax.modes.program import variant
from dblocks_jax.run.errors import UserError
from dblocks_jax.tasks.task import Entry


def which_fit(needed: Mapping[str, int | float], gib: float, *, where: str = "") -> dict[str, bool]:
    """Say and return which rows fit, from the bytes that each needs; `where` begins each line."""
    fits = {name: total <= gib * 2**30 for name, total in needed.items()}
    for name, does in fits.items():
        print(f"{where}{name}: {'fits' if does else 'does not fit'} in {gib:.4g} GiB")
    return fits


def smallest_that_fits(
    entry: Entry,
    config: ConfigDict,
    gib: float,
    *,
    devices: int,
    need: Callable[[ConfigDict], int | float],
    where: str = "",
) -> dict[str, Any]:
    """Say and return the smallest number of blocks with which DiffusionBlocks fit, without remat and with it.

    `need` computes the bytes of a config; `devices` are those of one process, which blocks side by side share out.
    """
    found: dict[str, Any] = {}
    devices = devices if config.block_parallel else 0
    divisors = [b for b in range(1, config.num_layers + 1) if config.num_layers % b == 0 and devices % b == 0]
    for name, what, remat in (
        ("smallest_b", "DiffusionBlocks", False),
        ("smallest_b_with_remat", "DiffusionBlocks + remat", True),
    ):
        sizes = _variants(entry, config, divisors, remat)
        found[name] = next((smaller.num_blocks for smaller in sizes if need(smaller) <= gib * 2**30), None)
        answer = f"num_blocks={found[name]} is the smallest that fits" if found[name] else "nothing fits"
        print(f"{where}{what}: {answer}")
    return found


def _variants(entry: Entry, config: ConfigDict, counts: list[int], remat: bool) -> Iterator[ConfigDict]:
    """DiffusionBlocks of so many blocks, without those that the task refuses."""
    for num_blocks in counts:
        with suppress(UserError):
            yield variant(entry, config, plain=False, remat=remat, num_blocks=num_blocks)

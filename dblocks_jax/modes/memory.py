"""What a training step needs on a device, without data or training: plain against DiffusionBlocks, remat or not."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
from ml_collections import ConfigDict

from dblocks_jax.data.feed import RESIDENT_BYTES
from dblocks_jax.modes.fitting import smallest_that_fits, which_fit
from dblocks_jax.modes.program import ROWS, bytes_on_device, total_bytes, variant, wanted_step
from dblocks_jax.tasks.table import entry_of
from dblocks_jax.tasks.task import Entry
from dblocks_jax.training.config import arithmetic, check_config, rest_off_device

MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes on one device during a step. `total` is XLA's account of the compiled step, the idle blocks come on top."""

    parameters: int  # of what the step trains
    optimizer: int  # its two moments
    gradients: int  # as large as the parameters
    activations: int  # and every other temporary: what XLA reserves at the peak, less the size of the gradients
    averages: int  # of the parameters, where they are kept
    total: int  # with the batch and everything else that goes in
    idle: int  # parameters, moments and averages of the blocks that wait, if they wait on the device


def memory_table(config: ConfigDict, *, gib: float | None = None) -> dict[str, Any]:
    """Print and return the table of a config; with `gib` also what fits, and the smallest B that does.

    Raises:
      UserError: the config is wrong, or nobody knows what its data are like.
    """
    entry = entry_of(config)
    check_config(entry, config)
    card = entry.card_without_data(config)
    rows = {
        name: step_memory(entry, variant(entry, config, plain=plain, remat=remat), card) for name, plain, remat in ROWS
    }
    formula = {name: formula_bytes(rows, name, config.num_blocks) for name in rows}
    print(_format(config, rows, formula))
    result: dict[str, Any] = {
        "mode": "memory",
        "device": jax.devices()[0].device_kind,
        "rows": {name: {**asdict(memory), "formula": formula[name]} for name, memory in rows.items()},
    }
    if jax.default_backend() == "gpu":
        result["peak_bytes_in_use"] = _peaks(entry, config, card, rows)
        for name, peak in result["peak_bytes_in_use"].items():
            print(f"{name}: {peak / MIB:.0f} MiB really used at the peak")
    if gib is not None:
        needed = {name: memory.total + memory.idle for name, memory in rows.items()}
        result["fits"] = which_fit(needed, gib) | smallest_that_fits(
            entry, config, gib, devices=jax.local_device_count(), need=lambda smaller: _needed(entry, smaller, card)
        )
    return result


def step_memory(entry: Entry, config: ConfigDict, card: Any, devices: Sequence[Any] | None = None) -> Memory:
    """Compile the step that training would run, and read XLA's account of it on a device. Allocates nothing."""
    wanted = wanted_step(entry, config, card, devices)
    analysis = wanted.compile().memory_analysis()
    parts = wanted.parts
    parameters = bytes_on_device([part.params for part in parts])
    return Memory(
        parameters=parameters,
        optimizer=bytes_on_device([part.adam for part in parts]),
        gradients=parameters,
        activations=analysis.temp_size_in_bytes - parameters,
        averages=bytes_on_device([part.average for part in parts]),
        total=total_bytes(analysis),
        idle=0 if rest_off_device(entry, config) else bytes_on_device(wanted.idle),
    )


def _needed(entry: Entry, config: ConfigDict, card: Any) -> int:
    memory = step_memory(entry, config, card)
    return memory.total + memory.idle


def formula_bytes(rows: dict[str, Memory], name: str, num_blocks: int) -> int:
    """The paper's 4P + A, over B for DiffusionBlocks; P and A are the plain model's, A as measured for it.

    Averages of the parameters, which the paper does not count, are one P more.
    """
    plain = rows["plain + remat" if name.endswith("remat") else "plain"]
    needed = 4 * plain.parameters + plain.averages + plain.activations
    return needed // (num_blocks if name.startswith("Diffusion") else 1)


def _format(config: ConfigDict, rows: dict[str, Memory], formula: dict[str, int]) -> str:
    """The table as text, in MiB, each total also as a multiple of the plain model's."""
    plain = rows["plain"].total
    fields = ["parameters", "optimizer", "gradients", "activations", "averages", "total"]
    if not rows["plain"].averages:
        fields.remove("averages")
    head = (*fields, "of plain", "formula", "idle blocks")
    lines = [f"{'MiB on a device':24s}" + "".join(f"{name:>13s}" for name in head)]
    for name, m in rows.items():
        sizes = [f"{getattr(m, field) / MIB:.1f}" for field in fields]
        cells = (*sizes, f"{m.total / plain:.3f}", f"{formula[name] / MIB:.1f}", f"{m.idle / MIB:.1f}")
        lines.append(f"{name:24s}" + "".join(f"{cell:>13s}" for cell in cells))
    formula_of = "(5P + A) / B" if rows["plain"].averages else "(4P + A) / B"
    lines.append(
        f"B = {config.num_blocks}, batch {config.batch_size} on {jax.device_count()} device(s), {config.dtype}. "
        f"activations: all temporaries less the gradients; formula: {formula_of} with the plain model's P and A."
    )
    return "\n".join([*lines, *what_comes_on_top(config)])


def what_comes_on_top(config: ConfigDict) -> list[str]:
    """Lines below a table about what is not in the totals."""
    places = {"device": "on the device, on top of the total", "host": "on the host", "disk": "on disk"}
    return [
        f"Training data on the device come on top, if they are smaller than {RESIDENT_BYTES // MIB} MiB.",
        "No block is idle: each has devices of its own (block_parallel)."
        if config.block_parallel
        else f"Idle blocks wait {places[config.idle_blocks]} (idle_blocks={config.idle_blocks}).",
    ]


def _peaks(entry: Entry, config: ConfigDict, card: Any, rows: dict[str, Memory]) -> dict[str, int]:
    """Bytes in use at the peak of a real step of each row. The device keeps one maximum, so the smallest goes first."""
    device = jax.local_devices()[0]
    peaks = {}
    for name, plain, remat in sorted(ROWS, key=lambda row: rows[row[0]].total):
        wanted = wanted_step(entry, variant(entry, config, plain=plain, remat=remat), card)
        with arithmetic(config):
            jax.block_until_ready(wanted.step(*wanted.zeros()))
        stats = device.memory_stats()
        if stats is not None:  # some allocators do not count
            peaks[name] = stats["peak_bytes_in_use"]
    return peaks

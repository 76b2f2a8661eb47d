"""What a training step needs on a device, without data or training: plain against DiffusionBlocks, remat or not."""

from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dblocks_jax.data.feed import RESIDENT_BYTES, Streamed
from dblocks_jax.run.devices import make_mesh
from dblocks_jax.run.errors import UserError
from dblocks_jax.tasks.table import entry_of
from dblocks_jax.tasks.task import Entry
from dblocks_jax.training.config import arithmetic, check_config, rest_on_host, trained_blocks
from dblocks_jax.training.optimizer import new_part
from dblocks_jax.training.setting import make_step, shapes_of
from dblocks_jax.training.step import Steps

MIB = 2**20
# (row, whether it is of the plain network, whether with gradient checkpointing)
ROWS = (
    ("plain", True, False),
    ("plain + remat", True, True),
    ("DiffusionBlocks", False, False),
    ("DiffusionBlocks + remat", False, True),
)


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
    if config.block_parallel:
        make_mesh(config.num_blocks)  # refuses devices that cannot be shared out
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
        result["fits"] = _fits(entry, config, card, rows, gib)
    return result


def step_memory(entry: Entry, config: ConfigDict, card: Any) -> Memory:
    """Compile the step that training would run, on one device, and read XLA's account of it. Allocates nothing."""
    step, parts, idle, data, steps = build_step(entry, config, card)
    with arithmetic(config):
        analysis = step.lower(parts, data, steps).compile().memory_analysis()
    parameters = _bytes([part.params for part in parts])
    return Memory(
        parameters=parameters,
        optimizer=_bytes([part.adam for part in parts]),
        gradients=parameters,
        activations=analysis.temp_size_in_bytes - parameters,
        averages=_bytes([part.average for part in parts]),
        total=total_bytes(analysis),
        idle=0 if rest_on_host(entry, config) else _bytes(idle),
    )


def total_bytes(analysis: Any) -> int:
    """What a compiled program holds at its peak, by the account that is its `memory_analysis()`."""
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes  # results that take the place of arguments
        + analysis.temp_size_in_bytes
    )


def formula_bytes(rows: dict[str, Memory], name: str, num_blocks: int) -> int:
    """The paper's 4P + A, over B for DiffusionBlocks; P and A are the plain model's, A as measured for it.

    Averages of the parameters, which the paper does not count, are one P more.
    """
    plain = rows["plain + remat" if name.endswith("remat") else "plain"]
    needed = 4 * plain.parameters + plain.averages + plain.activations
    return needed // (num_blocks if name.startswith("Diffusion") else 1)


def variant(entry: Entry, config: ConfigDict, *, plain: bool, remat: bool, num_blocks: int | None = None) -> ConfigDict:
    """`config` with another model; its training of some blocks only, or of all side by side, is for blocks alone."""
    config = entry.plain(config) if plain else ConfigDict(config.to_dict())
    config.update(gradient_checkpointing=remat, grow_at=(), begin_from="")
    if num_blocks is not None:
        config.update(num_blocks=num_blocks, train_blocks=())
    check_config(entry, config)
    return config


def build_step(entry: Entry, config: ConfigDict, card: Any) -> tuple[Any, tuple[Any, ...], Any, Streamed, Steps]:
    """(jitted step, shapes of the parts it trains, of those that wait, of its batch, and its other arguments)."""
    task = entry.make(config, card)
    blueprint, params = shapes_of(task)
    shapes = jax.eval_shape(
        lambda: {name: new_part(part, averaged=config.ema_decay > 0) for name, part in zeros_like(params).items()}
    )
    step = make_step(config, task, blueprint)
    share_of = max(1, jax.device_count() // (config.num_blocks if config.block_parallel else 1))  # devices to a batch
    count = -(-config.batch_size // share_of) * config.accumulate_grad_batches
    zero = np.int32(0)
    share = None if task.corruption is None else task.corruption.shares[0]
    steps = Steps(np.int32(1), zero, zero, np.zeros(1, np.float32), share)
    blocks = trained_blocks(entry, config)
    mine = {name: shapes[name] for block in blocks for name in blueprint.names(block)}
    active = tuple(mine.pop(name) for name in blueprint.names(blocks[0]))
    return step, active, mine, Streamed(task.batch_shapes(count)), steps


def zeros_like(shapes: Any) -> Any:
    """Arrays of these shapes."""
    return jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), shapes)


def _bytes(shapes: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _fits(entry: Entry, config: ConfigDict, card: Any, rows: dict[str, Memory], gib: float) -> dict[str, Any]:
    """Which rows fit, and the smallest number of blocks with which DiffusionBlocks do."""
    limit = gib * 2**30
    fits: dict[str, Any] = {name: memory.total + memory.idle <= limit for name, memory in rows.items()}
    devices = jax.local_device_count() if config.block_parallel else 0
    divisors = [b for b in range(1, config.num_layers + 1) if config.num_layers % b == 0 and devices % b == 0]
    for name, remat in (("smallest_b", False), ("smallest_b_with_remat", True)):
        fits[name] = None
        for num_blocks in divisors:
            try:
                smaller = variant(entry, config, plain=False, remat=remat, num_blocks=num_blocks)
            except UserError:  # a task may refuse so many blocks
                continue
            memory = step_memory(entry, smaller, card)
            if memory.total + memory.idle <= limit:
                fits[name] = num_blocks
                break
    for name in rows:
        print(f"{name}: {'fits' if fits[name] else 'does not fit'} in {gib:g} GiB")
    for name, what in (("smallest_b", "DiffusionBlocks"), ("smallest_b_with_remat", "DiffusionBlocks + remat")):
        print(f"{what}: " + (f"num_blocks={fits[name]} is the smallest that fits" if fits[name] else "nothing fits"))
    return fits


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
    lines.append(f"Training data on the device come on top, if they are smaller than {RESIDENT_BYTES // MIB} MiB.")
    waiting = "on the host" if config.idle_blocks == "host" else "on the device, on top of the total"
    lines.append(
        "No block is idle: each has devices of its own (block_parallel)."
        if config.block_parallel
        else f"Idle blocks wait {waiting} (idle_blocks={config.idle_blocks})."
    )
    return "\n".join(lines)


def _peaks(entry: Entry, config: ConfigDict, card: Any, rows: dict[str, Memory]) -> dict[str, int]:
    """Bytes in use at the peak of a real step of each row. The device keeps one maximum, so the smallest goes first."""
    device = jax.local_devices()[0]
    peaks = {}
    for name, plain, remat in sorted(ROWS, key=lambda row: rows[row[0]].total):
        step, parts, _, data, steps = build_step(entry, variant(entry, config, plain=plain, remat=remat), card)
        real = zeros_like((parts, data))
        with arithmetic(config):
            jax.block_until_ready(step(*real, steps))
        del real
        stats = device.memory_stats()
        if stats is not None:  # some allocators do not count
            peaks[name] = stats["peak_bytes_in_use"]
    return peaks

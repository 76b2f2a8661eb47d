"""What a training step needs on a device, without data or training: plain against DiffusionBlocks, remat or not."""

from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dblocks_jax.data.datasets import STORED, Card
from dblocks_jax.data.feed import RESIDENT_BYTES
from dblocks_jax.run.devices import make_mesh
from dblocks_jax.training.build import Blueprint, make_objective, make_step, new_model
from dblocks_jax.training.config import (
    architecture,
    arithmetic,
    check_config,
    find_dataset,
    rest_on_host,
    trained_blocks,
)
from dblocks_jax.training.optimizer import new_part
from dblocks_jax.training.step import Steps, Streamed

MIB = 2**20
NUM_LABELS = {"digits": 10, "cifar10": 10, "cifar100": 100, "tiny_imagenet": 200}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device during a step. `total` is XLA's account of the compiled step, the idle blocks come on top."""

    parameters: int  # of what the step trains
    optimizer: int  # its two moments
    gradients: int  # as large as the parameters
    activations: int  # and every other temporary: what XLA reserves at the peak, less the size of the gradients
    total: int  # with the batch and everything else that goes in
    idle: int  # parameters and moments of the blocks that wait, if they wait on the device


def memory_table(config: ConfigDict, *, gib: float | None = None) -> dict[str, Any]:
    """Print and return the table of a config; with `gib` also what fits, and the smallest B that does.

    Raises:
      UserError: the config is wrong, or nobody knows how many classes its images have.
    """
    check_config(config)
    if config.block_parallel:
        make_mesh(config.num_blocks)  # refuses devices that cannot be shared out
    card = _without_images(config)
    rows = {
        name: step_memory(variant(config, model_type, remat), card)
        for name, model_type, remat in (
            ("plain", "vit", False),
            ("plain + remat", "vit", True),
            ("DiffusionBlocks", "dblock", False),
            ("DiffusionBlocks + remat", "dblock", True),
        )
    }
    formula = {name: formula_bytes(rows, name, config.num_blocks) for name in rows}
    print(_format(config, rows, formula))
    result: dict[str, Any] = {
        "mode": "memory",
        "device": jax.devices()[0].device_kind,
        "rows": {name: {**asdict(memory), "formula": formula[name]} for name, memory in rows.items()},
    }
    if jax.default_backend() == "gpu":
        result["peak_bytes_in_use"] = _peaks(config, card, rows)
        for name, peak in result["peak_bytes_in_use"].items():
            print(f"{name}: {peak / MIB:.0f} MiB really used at the peak")
    if gib is not None:
        result["fits"] = _fits(config, card, rows, gib)
    return result


def step_memory(config: ConfigDict, card: Card) -> Memory:
    """Compile the step that training would run, on one device, and read XLA's account of it. Allocates nothing."""
    step, parts, idle, data, steps = build_step(config, card)
    with arithmetic(config):
        analysis = step.lower(parts, data, steps).compile().memory_analysis()
    parameters = _bytes([part.params for part in parts])
    return Memory(
        parameters=parameters,
        optimizer=_bytes([part.adam for part in parts]),
        gradients=parameters,
        activations=analysis.temp_size_in_bytes - parameters,
        total=total_bytes(analysis),
        idle=0 if rest_on_host(config) else _bytes(idle),
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
    """The paper's 4P + A, over B for DiffusionBlocks; P and A are the plain model's, A as measured for it."""
    plain = rows["plain + remat" if name.endswith("remat") else "plain"]
    return (4 * plain.parameters + plain.activations) // (num_blocks if name.startswith("Diffusion") else 1)


def variant(config: ConfigDict, model_type: str, remat: bool, num_blocks: int | None = None) -> ConfigDict:
    """`config` with another model; its training of some blocks only, or of all side by side, is for blocks alone."""
    config = ConfigDict(config.to_dict())
    config.update(model_type=model_type, gradient_checkpointing=remat)
    if model_type == "vit":
        config.update(block_parallel=False, train_blocks=())
    elif num_blocks is not None:
        config.update(num_blocks=num_blocks, train_blocks=())
    check_config(config)
    return config


def build_step(config: ConfigDict, card: Card) -> tuple[Any, tuple[Any, ...], Any, Streamed, Steps]:
    """(jitted step, shapes of the parts it trains, of those that wait, of its batch, and its other arguments)."""
    blueprints = []

    def parts():
        blueprint, params = Blueprint.of(new_model(config, architecture(config, card)))
        blueprints.append(blueprint)
        return {name: new_part(part) for name, part in params.items()}

    shapes = jax.eval_shape(parts)
    blueprint = blueprints[0]
    loss, ranges = make_objective(config, blueprint)
    step = make_step(config, loss, card)
    share_of = max(1, jax.device_count() // (config.num_blocks if config.block_parallel else 1))  # devices to a batch
    count = -(-config.batch_size // share_of) * config.accumulate_grad_batches
    shape_of: Any = jax.ShapeDtypeStruct
    data = Streamed(shape_of((count, *card.image_shape), np.uint8), shape_of((count,), np.int32))
    zero = np.int32(0)
    steps = Steps(np.int32(1), zero, zero, np.zeros(1, np.float32), ranges[0])
    blocks = trained_blocks(config)
    mine = {name: shapes[name] for block in blocks for name in blueprint.names(block)}
    active = tuple(mine.pop(name) for name in blueprint.names(blocks[0]))
    return step, active, mine, data, steps


def _without_images(config: ConfigDict) -> Card:
    if config.dataset not in STORED:
        return find_dataset(config)
    stored = STORED[config.dataset]
    names = tuple(map(str, range(NUM_LABELS[config.dataset])))
    shape = (config.image_size, config.image_size, stored.image_shape[2])
    return Card(names, shape, stored.mean, stored.std)


def _bytes(shapes: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _fits(config: ConfigDict, card: Card, rows: dict[str, Memory], gib: float) -> dict[str, Any]:
    """Which rows fit, and the smallest number of blocks with which DiffusionBlocks do."""
    limit = gib * 2**30
    fits: dict[str, Any] = {name: memory.total + memory.idle <= limit for name, memory in rows.items()}
    devices = jax.local_device_count() if config.block_parallel else 0
    divisors = [b for b in range(1, config.num_layers + 1) if config.num_layers % b == 0 and devices % b == 0]
    for name, remat in (("smallest_b", False), ("smallest_b_with_remat", True)):
        fits[name] = None
        for num_blocks in divisors:
            memory = step_memory(variant(config, "dblock", remat, num_blocks), card)
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
    head = ("parameters", "optimizer", "gradients", "activations", "total", "of plain", "formula", "idle blocks")
    lines = [f"{'MiB on a device':24s}" + "".join(f"{name:>13s}" for name in head)]
    plain = rows["plain"].total
    for name, m in rows.items():
        sizes = [f"{value / MIB:.1f}" for value in (m.parameters, m.optimizer, m.gradients, m.activations, m.total)]
        cells = (*sizes, f"{m.total / plain:.3f}", f"{formula[name] / MIB:.1f}", f"{m.idle / MIB:.1f}")
        lines.append(f"{name:24s}" + "".join(f"{cell:>13s}" for cell in cells))
    lines.append(
        f"B = {config.num_blocks}, batch {config.batch_size} on {jax.device_count()} device(s), {config.dtype}. "
        "activations: all temporaries less the gradients; formula: (4P + A) / B with the plain model's P and A."
    )
    lines.append(f"Training images on the device come on top, if they are smaller than {RESIDENT_BYTES // MIB} MiB.")
    waiting = "on the host" if config.idle_blocks == "host" else "on the device, on top of the total"
    lines.append(
        "No block is idle: each has devices of its own (block_parallel)."
        if config.block_parallel
        else f"Idle blocks wait {waiting} (idle_blocks={config.idle_blocks})."
    )
    return "\n".join(lines)


def _peaks(config: ConfigDict, card: Card, rows: dict[str, Memory]) -> dict[str, int]:
    """Bytes in use at the peak of a real step of each row. The device keeps one maximum, so the smallest goes first."""
    device = jax.local_devices()[0]
    peaks = {}
    for name in sorted(rows, key=lambda name: rows[name].total):
        model_type = "dblock" if name.startswith("Diffusion") else "vit"
        step, parts, _, data, steps = build_step(variant(config, model_type, name.endswith("remat")), card)
        real = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), (parts, data))
        with arithmetic(config):
            jax.block_until_ready(step(*real, steps))
        del real
        stats = device.memory_stats()
        if stats is not None:  # some allocators do not count
            peaks[name] = stats["peak_bytes_in_use"]
    return peaks

"""What a training step needs and takes: the plain network, its rivals in small memory, and DiffusionBlocks.

    python benchmarks/rivals.py --config=configs/dit_digits.py [--repeats=7] [--target=h100]

The rows: plain; plain with gradient checkpointing (remat); short, a plain network of one block's depth; block-wise
AdamW (`benchmarks/block_coordinate.py`); DiffusionBlocks without and with remat. Memory in MiB by XLA's account, idle
blocks on the host; of block coordinates the worst block's. Times are medians over `repeats` turns in which every row
has one step (block coordinates one of each block, of which the mean counts). With `--target` also that card's total, by
its compiler, which is estimated and not measured. Scores: `benchmarks/arms.py` and `benchmarks/block_coordinate.py`.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from dblocks_jax.run.targets import check_compilers, compiler_options, devices_of, parse_targets, prepare_environment

CONFIG = config_flags.DEFINE_config_file("config", None, "Config of DiffusionBlocks, which the rows are made of.")
REPEATS = flags.DEFINE_integer("repeats", 7, "Turns that are timed; 0 times nothing.", lower_bound=0)
TARGET = flags.DEFINE_string("target", "", "A card that is not here, such as h100.")
MIB = 2**20
COORDINATE = "block coordinates"


@dataclass(frozen=True)
class Program:
    """A step: lowered for the devices that it was made for, and what its sizes are, in bytes."""

    lowered: Any
    trained: int  # parameters that the step moves
    held: int  # all parameters that it needs
    averages: int  # of parameters
    arguments: Callable[[], tuple[Any, ...]]  # zeros to run it with


def programs(config: ConfigDict, devices: Sequence[Any] | None) -> dict[str, list[Program]]:
    """The step or steps of each row."""
    from dblocks_jax.modes.program import variant
    from dblocks_jax.tasks.table import entry_of

    entry = entry_of(config)
    card = entry.card_without_data(config)
    plain = {remat: variant(entry, config, plain=True, remat=remat) for remat in (False, True)}
    short = ConfigDict(plain[False].to_dict())
    short.num_layers = config.num_layers // config.num_blocks
    blocks = {remat: variant(entry, config, plain=False, remat=remat) for remat in (False, True)}
    for each in blocks.values():
        each.update(idle_blocks="host", block_schedule="chunked")
    return {
        "plain": [_trainers(entry, plain[False], card, devices)],
        "plain + remat": [_trainers(entry, plain[True], card, devices)],
        "short": [_trainers(entry, short, card, devices)],
        COORDINATE: [_coordinate(entry, config, plain[False], card, devices, b) for b in range(config.num_blocks)],
        "DiffusionBlocks": [_trainers(entry, blocks[False], card, devices)],
        "DiffusionBlocks + remat": [_trainers(entry, blocks[True], card, devices)],
    }


def _trainers(entry: Any, config: ConfigDict, card: Any, devices: Sequence[Any] | None) -> Program:
    from dblocks_jax.modes.program import bytes_on_device, wanted_step

    wanted = wanted_step(entry, config, card, devices)
    size, averages = (bytes_on_device([part[i] for part in wanted.parts]) for i in (0, 2))
    return Program(wanted.lower(), size, size, averages, wanted.zeros)


def _coordinate(
    entry: Any, config: ConfigDict, plain: ConfigDict, card: Any, devices: Sequence[Any] | None, block: int
) -> Program:
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import flatten_dict

    from benchmarks.block_coordinate import make_step, split
    from dblocks_jax.modes.program import bytes_on_device
    from dblocks_jax.run.devices import make_mesh, replicated
    from dblocks_jax.training.config import arithmetic
    from dblocks_jax.training.optimizer import new_part
    from dblocks_jax.training.setting import shapes_of

    mesh, task = make_mesh(1, devices), entry.make(plain, card)
    blueprint, shapes = shapes_of(task)
    active, others = split(flatten_dict(shapes), config, block)
    part = jax.eval_shape(lambda params: new_part(params, averaged=bool(plain.ema_decay)), active)
    numbers = (jax.ShapeDtypeStruct((), np.int32), jax.ShapeDtypeStruct((), np.float32))
    given = replicated((part, others, task.batch_shapes(config.batch_size), *numbers), mesh)
    one_step = make_step(plain, task, blueprint)

    def step(*given):
        return one_step(*given), ()  # as the trainer's: what it trains, and a log

    with arithmetic(plain):
        lowered = jax.jit(step, donate_argnums=0).lower(*given)

    def zeros():
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), given)

    trained = bytes_on_device(given[0].params)
    return Program(lowered, trained, trained + bytes_on_device(given[1]), bytes_on_device(given[0].average), zeros)


def sizes(steps: list[Program], compiled: list[Any]) -> dict[str, float]:
    """A row's memory in MiB: of several steps the one that needs most."""
    from dblocks_jax.modes.program import total_bytes

    totals = [total_bytes(each.memory_analysis()) for each in compiled]
    worst = totals.index(max(totals))
    step, analysis = steps[worst], compiled[worst].memory_analysis()
    found = {
        "parameters": step.held,
        "optimizer": 2 * step.trained,
        "gradients": step.trained,
        "activations": analysis.temp_size_in_bytes - step.trained,
        "averages": step.averages,
        "total": totals[worst],
    }
    return {name: round(size / MIB, 1) for name, size in found.items()}


def times(rows: dict[str, list[Program]], compiled: dict[str, list[Any]], repeats: int) -> dict[str, float]:
    """Milliseconds of a step of each row: medians over turns, after one that is not counted."""
    import jax

    state = {name: [step.arguments() for step in steps] for name, steps in rows.items()}
    taken: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repeats + 1):
        for name, steps in compiled.items():
            began = time.perf_counter()
            for i, run in enumerate(steps):
                trained, log = run(*state[name][i])
                state[name][i] = (trained, *state[name][i][1:])
                jax.block_until_ready((trained, log))
            taken[name].append((time.perf_counter() - began) / len(steps))
    return {name: round(1e3 * statistics.median(each[1:]), 1) for name, each in taken.items()}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]}")
    target = None
    if TARGET.value:
        prepare_environment()
        [target] = parse_targets(TARGET.value)
        check_compilers([target])
    import jax

    rows = programs(CONFIG.value, None)
    compiled = {name: [step.lowered.compile() for step in steps] for name, steps in rows.items()}
    table: dict[str, dict[str, float]] = {name: sizes(steps, compiled[name]) for name, steps in rows.items()}
    if target is not None:
        devices = devices_of(target)
        for name, steps in programs(CONFIG.value, devices).items():
            there = [step.lowered.compile(compiler_options(devices)) for step in steps]
            table[name][target.name] = sizes(steps, there)["total"]
    if REPEATS.value:
        for name, ms in times(rows, compiled, REPEATS.value).items():
            table[name]["ms"] = ms
    columns = list(table["plain"])
    print(f"{'MiB':24s}" + "".join(f"{column:>13s}" for column in columns))
    for name, row in table.items():
        print(f"{name:24s}" + "".join(f"{row[column]:13.1f}" for column in columns))
    machine = {"device": jax.devices()[0].device_kind, "cores": len(os.sched_getaffinity(0)), "jax": jax.__version__}
    print(json.dumps({"machine": machine, "repeats": REPEATS.value, "rows": table}))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)

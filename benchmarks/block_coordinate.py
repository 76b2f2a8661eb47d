"""Block-coordinate AdamW on the plain network (BAdam; Luo, Yu, Li, 2024): a rival with one block's optimizer state.

The layers are cut as DiffusionBlocks cut them. One block's layers are trained for `switch` steps by the whole network's
loss, with fresh moments, then another's, in a random order that has each once; the embeddings belong to the first
block, the last norm and the head to the last. The model is the plain one, and so is inference. A step holds the
gradients and moments of one block, but all parameters, and the activations of all layers down to the block.

    python benchmarks/block_coordinate.py --config=configs/dblock_digits.py [--config.num_epochs=] [--switch=100]

takes the config of DiffusionBlocks, of any task, for its number of blocks. Of a plain step's arithmetic (forward,
gradients of activations, gradients of weights: one each) a step here takes 1 + (B + 1) / 2B + 1 / B in the mean, 2/3 of
the whole at B = 3: at equal arithmetic it makes 1.5 times the plain network's epochs. `benchmarks/rivals.py` has time
and memory.
"""

import json
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict, config_flags

from dblocks_jax.data.feed import Resident, make_feed
from dblocks_jax.models.blueprint import Blueprint
from dblocks_jax.run.devices import make_mesh
from dblocks_jax.run.streams import stream
from dblocks_jax.tasks.table import entry_of
from dblocks_jax.tasks.task import Task
from dblocks_jax.training.config import arithmetic, check_config, count_steps, schedule
from dblocks_jax.training.heldout import scorer_of
from dblocks_jax.training.optimizer import Part, adamw, new_part
from dblocks_jax.training.setting import new_model
from dblocks_jax.training.step import block_loss

ENDS = ("head", "norm", "modulation")  # what comes after the last layer
Where = tuple[Any, ...]  # of a parameter: its part, and where it lies in it


def block_of(path: Where, num_layers: int, num_blocks: int) -> int:
    """The block that trains the parameter at this path of a plain network."""
    if "layers" in path:
        return int(path[path.index("layers") + 1]) * num_blocks // num_layers
    return num_blocks - 1 if any(name in path for name in ENDS) else 0


def split(flat: dict[Where, Any], config: ConfigDict, block: int) -> tuple[dict[Where, Any], dict[Where, Any]]:
    """(the block's parameters, all others)."""
    is_mine = {path: block_of(path, config.num_layers, config.num_blocks) == block for path in flat}
    mine, others = ({path: flat[path] for path in flat if is_mine[path] == wanted} for wanted in (True, False))
    return mine, others


def make_step(config: ConfigDict, task: Task, blueprint: Blueprint) -> Callable[..., Part]:
    """Build (part of the active block, all other parameters, batch, position, lr) -> part, not yet compiled."""
    share = None if task.corruption is None else task.corruption.shares[0]

    def loss_of(active, others, example, key):
        params = unflatten_dict({**active, **others})
        return block_loss(task, blueprint, tuple(params[name] for name in blueprint.names(0)), example, key, share)[0]

    def step(part: Part, others: Any, batch: Any, position: Any, lr: Any) -> Part:
        key_prepare, key_loss = jax.random.split(stream(config.seed, "train", position))
        grads = jax.grad(loss_of)(part.params, others, task.prepare(key_prepare, batch), key_loss)
        fixed = {"weight_decay": config.weight_decay, "clip_norm": config.clip_norm, "ema_decay": config.ema_decay}
        return adamw((part,), (grads,), lr=lr, **fixed)[0][0]

    return step


def make_steps(step: Callable[..., Part]) -> Callable[..., Part]:
    """The same for `count` steps in one call, on data that live on the device."""

    @partial(jax.jit, donate_argnums=0)
    def steps(part: Part, others: Any, data: Resident, count: Any, position: Any, lr: Any) -> Part:
        def body(i, part):
            batch = jax.tree.map(lambda array: array[data.indices[i]], data.examples)
            return step(part, others, batch, position + i, jnp.asarray(lr)[i])

        return jax.lax.fori_loop(0, count, body, part)

    return steps


def train(config: ConfigDict, switch: int) -> dict[str, Any]:
    """Train the plain network of a config of DiffusionBlocks, and score it."""
    entry, num_blocks = entry_of(config), config.num_blocks
    plain = entry.plain(config)
    check_config(entry, plain)
    data, mesh = entry.find_data(plain), make_mesh()
    source = data.split("train")
    task = entry.make(plain, entry.card(data.to_dict() | {"images": len(source)}))
    blueprint, params = new_model(task, config.seed)
    flat = flatten_dict(jax.device_get(params))
    averages = dict(flat) if plain.ema_decay else {}
    most = min(config.steps_per_call, switch)
    feed = make_feed(source, batch_size=config.batch_size, seed=config.seed, most=most, mesh=mesh)
    steps = make_steps(make_step(plain, task, blueprint))
    total = count_steps(entry, plain, len(source)).steps
    lr_at, position, turns, rng = schedule(plain, total), 0, [], random.Random(config.seed)
    began = time.perf_counter()
    while position < total:
        turns = turns or rng.sample(range(num_blocks), num_blocks)
        active, others = split(flat, config, turns.pop())
        part = new_part(active)
        part = part._replace(average={path: averages[path] for path in active} if averages else ())
        end = min(total, position + switch)
        while position < end:
            count = min(most, end - position)
            lr = np.array([lr_at(position + i) for i in range(most)], np.float32)
            part = steps(part, others, feed.take(position, count), np.int32(count), np.int32(position), lr)
            position += count
        flat.update(part.params)
        averages.update(part.average or {})
    seconds = time.perf_counter() - began
    used = jax.device_put(unflatten_dict(averages or flat))
    found = scorer_of(task, blueprint, mesh)(used, data, "test", lambda: None)
    numbers = {name: value for name, value in found.items() if isinstance(value, float | int)}
    return numbers | {"seed": config.seed, "steps": total, "switch": switch, "seconds": seconds}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]}")
    config = CONFIG.value
    with arithmetic(config):
        print(json.dumps(train(config, SWITCH.value)))


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", default="configs/dblock_digits.py")
    SWITCH = flags.DEFINE_integer("switch", 100, "Steps of a block before another's turn.", lower_bound=1)
    app.run(main)

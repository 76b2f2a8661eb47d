"""Judge any task by its own loss, on examples that it was not trained on."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dblocks_jax.models.blueprint import Blueprint, Params
from dblocks_jax.run.devices import to_device
from dblocks_jax.run.streams import stream
from dblocks_jax.tasks.task import Scorer, Task
from dblocks_jax.training.step import block_loss

MOST_EXAMPLES = 2000


def scorer_of(task: Task, blueprint: Blueprint, mesh: Mesh) -> Scorer:
    """The task's own scorer, or, where it has none, `held_out_loss`."""
    return task.scorer(blueprint, mesh) or held_out_loss(task, blueprint)


def held_out_loss(task: Task, blueprint: Blueprint) -> Scorer:
    """Build a scorer of {"num_examples", "loss", "loss_by_block"}: what a step minimises, without its update.

    At most MOST_EXAMPLES examples of a split, evenly taken, all at once, prepared as for training, each at one level
    of every block's share; `loss` is the blocks' mean. Levels and noise are the same for every model.
    """

    @jax.jit
    def loss_of(together: tuple[Params, ...], batch: Any, share: Any, block: Any):
        key_prepare, key_loss = jax.random.split(stream(0, "held out", block))
        return block_loss(task, blueprint, together, task.prepare(key_prepare, batch), key_loss, share)[0]

    def run(params: dict[str, Params], data: Any, split: str, at_each_batch: Callable[[], None]) -> dict[str, Any]:
        source = data.split(split)
        count = min(len(source), MOST_EXAMPLES)
        batch = source.take(np.unique(np.linspace(0, len(source) - 1, count).astype(int)))
        shares = [None] if task.corruption is None else task.corruption.shares
        losses = []
        for block, share in enumerate(shares):
            at_each_batch()
            together = tuple(to_device(params[name]) for name in blueprint.names(block))
            losses.append(float(loss_of(together, batch, share, np.int32(block))))
        return {"num_examples": count, "loss": float(np.mean(losses)), "loss_by_block": losses}

    return run

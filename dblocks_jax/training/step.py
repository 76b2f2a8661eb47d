"""The training step, the paper's Algorithm 1: one jitted function for every task, and for every block of a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from dblocks_jax.data.feed import Resident, Streamed
from dblocks_jax.diffusion.loss import weighted_loss
from dblocks_jax.models.blueprint import Blueprint, Params
from dblocks_jax.run.devices import BLOCK
from dblocks_jax.run.streams import stream
from dblocks_jax.tasks.task import Draws, Task
from dblocks_jax.training.optimizer import Part, adamw

Metrics = dict[str, Float[Array, ""]]
SKIPPED = "skipped"  # metric: 1 where a step changed nothing, for its loss or gradient was not finite
WORST_LEVEL = "worst_level"  # metric: the level of the sample with the largest loss, or of one that is not finite
Log = dict[str, Float[Array, "*blocks k"]]  # the metrics of k steps


class Steps(NamedTuple):
    """The next `count` steps, all of one block, or of all blocks at once: see `Parallel`.

    What is beyond `count` is there to give arrays a fixed shape.
    """

    count: np.int32 | Int[Array, ""]
    block: np.int32 | Int[np.ndarray, "*blocks"] | Int[Array, "*blocks"]
    position: np.int32 | Int[Array, ""]  # of the first; the others follow
    lr: Float[np.ndarray, " k"] | Float[Array, " k"]
    share: Any  # the block's part of the corruption; None for a plain network


# (parts, data, steps) -> (parts, metrics of each step)
TrainStep = Callable[[tuple[Part, ...], Resident | Streamed, Steps], tuple[tuple[Part, ...], Log]]


def block_loss(task: Task, blueprint: Blueprint, params: tuple[Params, ...], example: Any, key: Key[Array, ""], share):
    """(loss of one block on an example, metrics): the inner part of Algorithm 1, which is differentiated.

    `params` are those of the parts that train together; `share` is the block's part of the corruption.
    """
    draws = Draws(*jax.random.split(key, len(Draws._fields)))
    count = jax.tree.leaves(example)[0].shape[0]
    level = None if task.corruption is None else task.corruption.draw(draws.level, count, share)
    losses = task.losses(blueprint.together(params), example, level, draws)
    loss = weighted_loss(losses.each, losses.weight, task.weighting)
    metrics = {name: jnp.mean(values) for name, values in losses.watched.items()}
    return loss, metrics if level is None else metrics | {WORST_LEVEL: level[worst(losses.each)]}


def worst(losses: Float[Array, " n"]) -> Int[Array, ""]:
    """Index of the first loss that is not finite, else of the largest."""
    return jnp.argmax(jnp.where(jnp.isfinite(losses), losses, jnp.inf))


def make_train_step(
    task: Task,
    blueprint: Blueprint,
    *,
    seed: int,
    weight_decay: float,
    clip_norm: float,
    accumulate: int,
    ema_decay: float = 0.0,
    mesh: Mesh | None = None,
    placed: Any = None,
    parallel: "Parallel | None" = None,
) -> TrainStep:
    """Build the jitted step: (parts, data, steps) -> (parts, metrics of each step).

    `parts` holds only what these steps train and is donated; every other parameter is out of its reach, so it cannot
    move, decay or count. A batch has accumulate * b examples; the gradient is the mean over micro-batches of b. Parts
    of equal shapes share one compilation, whichever block they are. Random numbers are a function of (seed, block,
    position), not of how many steps one call makes. A step whose loss or gradient is not finite changes nothing, and
    says so in the metric SKIPPED.

    With `parallel` one call trains all blocks, each on its own devices: see `Parallel`. Else parts are on every device
    of `mesh`, or lie as the shardings `placed` of their leaves say. What comes out lies where it came in: a compiler
    that chose would be free to spread it.
    """
    together = {} if parallel is None else {"combine": parallel.combine}

    def gradient(params: tuple[Params, ...], batch: Any, key: Key[Array, ""], share: Any) -> tuple[Any, Metrics]:
        key_prepare, key_loss = jax.random.split(key)
        example = task.prepare(key_prepare, batch)

        def loss_of(params):
            return block_loss(task, blueprint, params, example, key_loss, share)

        (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        return grads, {"loss": loss, **metrics}

    @partial(jax.jit, inline=True)  # so that Python runs it once, for its shapes and for the loop
    def one_step(parts: tuple[Part, ...], batch: Any, steps: Steps, i) -> tuple[tuple[Part, ...], Metrics]:
        params = tuple(part.params for part in parts)
        if placed is not None:  # else XLA would cut the network's own arrays as it finds its parameters cut
            assert mesh is not None
            params = jax.lax.with_sharding_constraint(params, NamedSharding(mesh, PartitionSpec()))
        key = jax.random.fold_in(stream(seed, "train", steps.position + i), steps.block)
        if accumulate == 1:
            grads, metrics = gradient(params, batch, key, steps.share)
        else:
            grads, metrics = _mean_over_micro_batches(gradient, accumulate, params, batch, key, steps.share)
        if placed is not None:
            grads = jax.lax.with_sharding_constraint(grads, tuple(part.params for part in placed))
        is_sound = jnp.isfinite(metrics["loss"])
        updated, norm = adamw(
            parts, grads, lr=jnp.asarray(steps.lr)[i], weight_decay=weight_decay, clip_norm=clip_norm,
            ema_decay=ema_decay, is_sound=is_sound, **together,
        )  # fmt: skip
        return updated, {**metrics, "grad_norm": norm, SKIPPED: 1.0 - (is_sound & jnp.isfinite(norm))}

    def train_steps(parts: tuple[Part, ...], data: Resident | Streamed, steps: Steps) -> tuple[tuple[Part, ...], Log]:
        if isinstance(data, Streamed):
            parts, metrics = one_step(parts, data.batch, steps, 0)
            return parts, {name: value[None] for name, value in metrics.items()}

        def batch_of(i):
            return jax.tree.map(lambda array: array[data.indices[i]], data.examples)

        def body(i, carry):
            parts, log = carry
            parts, metrics = one_step(parts, batch_of(i), steps, i)
            return parts, {name: log[name].at[i].set(value) for name, value in metrics.items()}

        shapes = jax.eval_shape(one_step, parts, batch_of(0), steps, 0)
        log = {name: jnp.zeros(steps.lr.shape, value.dtype) for name, value in shapes[1].items()}
        # The number of rounds is not known to the compiler, so it is the same program for one step as for many.
        return jax.lax.fori_loop(0, steps.count, body, (parts, log))

    run = train_steps if parallel is None else parallel.spread(train_steps)
    mesh = mesh if parallel is None else parallel.mesh
    if mesh is None:
        return jax.jit(run, donate_argnums=0)
    everywhere = NamedSharding(mesh, PartitionSpec())
    parts, log = (placed or everywhere, everywhere) if parallel is None else parallel.placed
    # A batch comes from its feed, in one of two forms.
    return jax.jit(run, donate_argnums=0, in_shardings=(parts, None, everywhere), out_shardings=(parts, log))


@dataclass(frozen=True)
class Parallel:
    """Blocks trained at the same time, along the mesh's axis "block".

    `Part`s of blocks, `Steps.block`, `Steps.share` and metrics then have a leading axis for the blocks. Common parts,
    the first of the parts unless `isolated`, are updated with the mean of the blocks' gradients, each of them clipped:
    all that blocks tell each other. Isolated ones tell each other nothing.
    """

    mesh: Mesh
    isolated: bool

    @property
    def placed(self) -> tuple[tuple[NamedSharding, NamedSharding], NamedSharding]:
        """Where (the first parts and the blocks, metrics) lie."""
        by_block = NamedSharding(self.mesh, PartitionSpec(BLOCK))
        return (by_block if self.isolated else NamedSharding(self.mesh, PartitionSpec()), by_block), by_block

    def combine(self, grads: tuple[Params, ...], is_sound: Bool[Array, ""]) -> Any:
        """The gradients that all blocks agree on, and whether to apply them: common ones if those of all are finite."""
        if self.isolated:
            return grads, (is_sound,) * len(grads)
        all_sound = jax.lax.pmin(is_sound.astype(jnp.int32), BLOCK) > 0
        return (jax.lax.pmean(grads[0], BLOCK), *grads[1:]), (all_sound, *[is_sound] * (len(grads) - 1))

    def spread(self, train_steps: TrainStep) -> TrainStep:
        """`train_steps` of one block, made to run for each block on the devices that hold it."""
        by_block: Any = PartitionSpec(BLOCK)
        common: Any = PartitionSpec()
        parts_spec = tuple(placed.spec for placed in self.placed[0])
        steps_spec = Steps(count=common, block=by_block, position=common, lr=common, share=by_block)

        def on_one_group(parts, data, steps):
            of_one = tuple(
                jax.tree.map(lambda leaf: leaf[0], part) if spec == by_block else part
                for part, spec in zip(parts, parts_spec, strict=True)
            )
            block, share = jax.tree.map(lambda leaf: leaf[0], (steps.block, steps.share))
            of_one, log = train_steps(of_one, data, steps._replace(block=block, share=share))
            parts = tuple(
                jax.tree.map(lambda leaf: leaf[None], part) if spec == by_block else part
                for part, spec in zip(of_one, parts_spec, strict=True)
            )
            return parts, jax.tree.map(lambda leaf: leaf[None], log)

        return jax.shard_map(
            on_one_group,
            mesh=self.mesh,
            in_specs=(parts_spec, common, steps_spec),
            out_specs=(parts_spec, by_block),
            axis_names={BLOCK},  # "data" is left to the compiler, as without blocks in parallel
            check_vma=False,
        )


def stack_shares(shares: Sequence[Any]) -> Any:
    """Those of several blocks as one, each leaf [blocks]."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *shares)


def _mean_over_micro_batches(gradient, accumulate: int, params, batch, key, share):
    """Run `gradient` on each micro-batch in turn and average what it returns, holding one set of activations."""

    # Micro-batch i takes examples i, i + accumulate, ...: of a batch split over devices, each then has its share.
    def cut(array):
        return array.reshape(-1, accumulate, *array.shape[1:]).swapaxes(0, 1)

    def add(total, micro):
        grads, metrics = gradient(params, *micro, share)
        return jax.tree.map(lambda t, g: t + g / accumulate, total, grads), metrics

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, metrics = jax.lax.scan(add, zeros, (jax.tree.map(cut, batch), jax.random.split(key, accumulate)))
    of_worst = worst(metrics["loss"])
    means = {name: values[of_worst] if name == WORST_LEVEL else jnp.mean(values) for name, values in metrics.items()}
    return grads, means

"""The training step: one jitted function for the plain model, one for every block of a DiffusionBlocks model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from dblocks_jax.data.augment import augment, normalize
from dblocks_jax.diffusion.noise import SigmaRange
from dblocks_jax.run.devices import BLOCK
from dblocks_jax.run.streams import stream
from dblocks_jax.tasks.classify.objective import WORST_SIGMA, Metrics, worst
from dblocks_jax.training.optimizer import Params, Part, adamw

# (params of each part, images, labels, key, noise range or None) -> (loss, metrics)
LossFn = Callable[..., tuple[Float[Array, ""], Metrics]]
SKIPPED = "skipped"  # metric: 1 where a step changed nothing, for its loss or gradient was not finite
Log = dict[str, Float[Array, "*blocks k"]]  # the metrics of k steps


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image before it is normalised; see `dblocks_jax.data.augment.augment`."""

    crop_padding: int
    flip: bool
    resized_crop: bool
    rand_augment: bool


class Resident(NamedTuple):
    """A training set that lives on the device, and which of its images each of the next steps takes."""

    images: UInt8[Array, "n h w c"]
    labels: Int[Array, " n"]
    indices: Int[Array, "k b"]


class Streamed(NamedTuple):
    """The batch of one step, brought from the host."""

    images: UInt8[Array, "b h w c"]
    labels: Int[Array, " b"]


class Steps(NamedTuple):
    """The next `count` steps, all of one block, or of all blocks at once: see `Parallel`.

    What is beyond `count` is there to give arrays a fixed shape.
    """

    count: np.int32 | Int[Array, ""]
    block: np.int32 | Int[np.ndarray, "*blocks"] | Int[Array, "*blocks"]
    position: np.int32 | Int[Array, ""]  # of the first; the others follow
    lr: Float[np.ndarray, " k"] | Float[Array, " k"]
    within: SigmaRange | None  # the block's noise; None for the plain model


# (parts, data, steps) -> (parts, metrics of each step)
TrainStep = Callable[[tuple[Part, ...], Resident | Streamed, Steps], tuple[tuple[Part, ...], Log]]


def make_train_step(
    loss_fn: LossFn,
    *,
    augmentation: Augmentation,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    seed: int,
    weight_decay: float,
    clip_norm: float,
    accumulate: int,
    parallel: "Parallel | None" = None,
) -> TrainStep:
    """Build the jitted step: (parts, data, steps) -> (parts, metrics of each step).

    `parts` holds only what these steps train and is donated; every other parameter is out of its reach, so it cannot
    move, decay or count. A batch has accumulate * b images; the gradient is the mean over micro-batches of b. Parts of
    equal shapes share one compilation, whichever block they are. Random numbers are a function of (seed, block,
    position), not of how many steps one call makes. A step whose loss or gradient is not finite changes nothing, and
    says so in the metric SKIPPED.

    With `parallel` one call trains all blocks, each on its own devices: see `Parallel`.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    together = {} if parallel is None else {"combine": parallel.combine}

    def gradient(
        params: tuple[Params, ...],
        images: UInt8[Array, "b h w c"],
        labels: Int[Array, " b"],
        key: Key[Array, ""],
        within: SigmaRange | None,
    ) -> tuple[Any, Metrics]:
        key_augment, key_loss = jax.random.split(key)
        augmented = augment(
            key_augment, images,
            crop_padding=augmentation.crop_padding, flip=augmentation.flip,
            resized_crop=augmentation.resized_crop, rand_augment=augmentation.rand_augment,
        )  # fmt: skip
        (loss, metrics), grads = grad_fn(params, normalize(augmented, mean, std), labels, key_loss, within)
        return grads, {"loss": loss, **metrics}

    def one_step(parts: tuple[Part, ...], images, labels, steps: Steps, i) -> tuple[tuple[Part, ...], Metrics]:
        params = tuple(part.params for part in parts)
        key = jax.random.fold_in(stream(seed, "train", steps.position + i), steps.block)
        if accumulate == 1:
            grads, metrics = gradient(params, images, labels, key, steps.within)
        else:
            grads, metrics = _mean_over_micro_batches(gradient, accumulate, params, images, labels, key, steps.within)
        is_sound = jnp.isfinite(metrics["loss"])
        updated, norm = adamw(
            parts, grads, lr=jnp.asarray(steps.lr)[i], weight_decay=weight_decay, clip_norm=clip_norm,
            is_sound=is_sound, **together,
        )  # fmt: skip
        return updated, {**metrics, "grad_norm": norm, SKIPPED: 1.0 - (is_sound & jnp.isfinite(norm))}

    def train_steps(parts: tuple[Part, ...], data: Resident | Streamed, steps: Steps) -> tuple[tuple[Part, ...], Log]:
        if isinstance(data, Streamed):
            parts, metrics = one_step(parts, data.images, data.labels, steps, 0)
            return parts, {name: value[None] for name, value in metrics.items()}

        def body(i, carry):
            parts, log = carry
            chosen = data.indices[i]
            parts, metrics = one_step(parts, data.images[chosen], data.labels[chosen], steps, i)
            return parts, {name: log[name].at[i].set(value) for name, value in metrics.items()}

        shapes = jax.eval_shape(one_step, parts, data.images[data.indices[0]], data.labels[data.indices[0]], steps, 0)
        log = {name: jnp.zeros(steps.lr.shape, value.dtype) for name, value in shapes[1].items()}
        # The number of rounds is not known to the compiler, so it is the same program for one step as for many.
        return jax.lax.fori_loop(0, steps.count, body, (parts, log))

    return jax.jit(train_steps if parallel is None else parallel.spread(train_steps), donate_argnums=0)


@dataclass(frozen=True)
class Parallel:
    """Blocks trained at the same time, along the mesh's axis "block".

    `Part`s of blocks, `Steps.block`, `Steps.within` and metrics then have a leading axis for the blocks. Common parts,
    the first of the parts unless `isolated`, are updated with the mean of the blocks' gradients, each of them clipped:
    all that blocks tell each other. Isolated ones tell each other nothing.
    """

    mesh: Mesh
    isolated: bool

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
        parts_spec = (by_block if self.isolated else common, by_block)
        steps_spec = Steps(count=common, block=by_block, position=common, lr=common, within=by_block)

        def on_one_group(parts, data, steps):
            of_one = tuple(
                jax.tree.map(lambda leaf: leaf[0], part) if spec == by_block else part
                for part, spec in zip(parts, parts_spec, strict=True)
            )
            block, within = jax.tree.map(lambda leaf: leaf[0], (steps.block, steps.within))
            of_one, log = train_steps(of_one, data, steps._replace(block=block, within=within))
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


def _mean_over_micro_batches(gradient, accumulate: int, params, images, labels, key, within):
    """Run `gradient` on each micro-batch in turn and average what it returns, holding one set of activations."""
    # Micro-batch i takes images i, i + accumulate, ...: of a batch split over devices, each then has its share.
    micro_images = images.reshape(-1, accumulate, *images.shape[1:]).swapaxes(0, 1)
    micro_labels = labels.reshape(-1, accumulate).swapaxes(0, 1)
    keys = jax.random.split(key, accumulate)

    def add(total, micro):
        grads, metrics = gradient(params, *micro, within)
        return jax.tree.map(lambda t, g: t + g / accumulate, total, grads), metrics

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, metrics = jax.lax.scan(add, zeros, (micro_images, micro_labels, keys))
    of_worst = worst(metrics["loss"])
    means = {name: values[of_worst] if name == WORST_SIGMA else jnp.mean(values) for name, values in metrics.items()}
    return grads, means

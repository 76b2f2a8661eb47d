"""The training step: one jitted function for the plain model, one for every block of a DiffusionBlocks model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from dblocks_jax.augment import augment, normalize
from dblocks_jax.diffusion.noise import SigmaRange
from dblocks_jax.objective import Metrics
from dblocks_jax.optimizer import Params, Part, adamw
from dblocks_jax.streams import stream

# (params of each part, images, labels, key, noise range or None) -> (loss, metrics)
LossFn = Callable[..., tuple[Float[Array, ""], Metrics]]


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image before it is normalised; see `dblocks_jax.augment.augment`."""

    crop_padding: int
    flip: bool
    resized_crop: bool
    rand_augment: bool


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
) -> Callable[..., tuple[tuple[Part, ...], Metrics]]:
    """Build the jitted step: (parts, images, labels, step, lr, noise range) -> (parts, metrics).

    `parts` holds only what this step trains and is donated; every other parameter is out of its reach, so it cannot
    move, decay or count. Images are uint8 [accumulate * b, h, w, c]; the gradient is the mean over micro-batches of b.
    Parts of equal shapes share one compilation, whichever block they are.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

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

    @partial(jax.jit, donate_argnums=0)
    def train_step(
        parts: tuple[Part, ...],
        images: UInt8[Array, "n h w c"],
        labels: Int[Array, " n"],
        step: Int[Array, ""],
        lr: Float[Array, ""],
        within: SigmaRange | None,
    ) -> tuple[tuple[Part, ...], Metrics]:
        params = tuple(part.params for part in parts)
        key = stream(seed, "train", step)
        if accumulate == 1:
            grads, metrics = gradient(params, images, labels, key, within)
        else:
            grads, metrics = _mean_over_micro_batches(gradient, accumulate, params, images, labels, key, within)
        updated, norm = adamw(parts, grads, lr=lr, weight_decay=weight_decay, clip_norm=clip_norm)
        return updated, {**metrics, "grad_norm": norm}

    return train_step


def _mean_over_micro_batches(gradient, accumulate: int, params, images, labels, key, within):
    """Run `gradient` on each micro-batch in turn and average what it returns, holding one set of activations."""
    # Micro-batch i takes images i, i + accumulate, ...: of a batch split over devices, each then has its share.
    micro_images = images.reshape(-1, accumulate, *images.shape[1:]).swapaxes(0, 1)
    micro_labels = labels.reshape(-1, accumulate).swapaxes(0, 1)
    keys = jax.random.split(key, accumulate)

    def add(total, micro):
        result = gradient(params, *micro, within)
        return jax.tree.map(lambda t, r: t + r / accumulate, total, result), None

    shapes = jax.eval_shape(gradient, params, micro_images[0], micro_labels[0], keys[0], within)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, (micro_images, micro_labels, keys))[0]

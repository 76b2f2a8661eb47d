"""What a training step minimises: cross-entropy for the plain model, the denoising loss for one block."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from dblocks_jax.denoiser import denoise
from dblocks_jax.diffusion.loss import Weighting, cross_entropy, weighted_loss
from dblocks_jax.diffusion.noise import Scalar, SigmaRange, sample_sigma
from dblocks_jax.diffusion.precondition import bounded_weight, loss_weight
from dblocks_jax.models.dblock_vit import Block, Image, Shared, hand_on
from dblocks_jax.optimizer import Params

Metrics = dict[str, Float[Array, ""]]
WORST_SIGMA = "worst_sigma"  # metric: the noise level of the sample with the largest cross-entropy, or one not finite


def plain_loss(
    params: tuple[Params],
    images: Array,
    labels: Array,
    key: Key[Array, ""] | None,
    *_,
    graphdef: nnx.GraphDef,
    smoothing: float = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
    """Mean cross-entropy of the plain model."""
    logits = nnx.merge(graphdef, params[0])(images, key)
    ce = jnp.mean(cross_entropy(logits, labels))
    return jnp.mean(cross_entropy(logits, labels, smoothing)), {
        "ce": ce,
        "accuracy": jnp.mean(jnp.argmax(logits, -1) == labels),
    }


def denoising_loss(
    shared: Shared,
    block: Block,
    images: Image,
    labels: Int[Array, " b"],
    sigma: Float[Array, " b"],
    eps: Float[Array, "b d"],
    *,
    sigma_data: float,
    weighting: Weighting,
    key: Key[Array, ""] | None = None,
    keep_z: Bool[Array, " b"] | None = None,
    mean_weight: Scalar | float = 1.0,
    smoothing: float = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
    """One block's loss on z = y + sigma * eps, given the noise; gradient reaches the label embeddings through z."""
    z = shared.embed_labels(labels) + sigma[:, None] * eps
    if keep_z is not None:
        z = jnp.where(keep_z[:, None], z, 0.0)
    logits = denoise(shared, block, images, z, sigma, sigma_data=sigma_data, key=key)
    ce = cross_entropy(logits, labels)
    weight = loss_weight(sigma, sigma_data)
    if weighting == "bounded":
        weight = bounded_weight(sigma, sigma_data) / mean_weight
    loss = weighted_loss(cross_entropy(logits, labels, smoothing), weight, weighting)
    accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
    return loss, {"ce": jnp.mean(ce), "accuracy": accuracy, WORST_SIGMA: sigma[worst(ce)]}


def worst(losses: Float[Array, " n"]) -> Int[Array, ""]:
    """Index of the first loss that is not finite, else of the largest."""
    return jnp.argmax(jnp.where(jnp.isfinite(losses), losses, jnp.inf))


# The parameters of blocks 0, 1, ... for `hand_on`: (shared, block) of each, or (block,) where shared is common to all.
# Of those that do not come before the block in training only the shapes matter.
Earlier = tuple[tuple[Params, ...], ...]


@dataclass(frozen=True)
class BlockLoss:
    """The loss of one training step of one block: draws the noise, drops images for guidance, and denoises."""

    shared: nnx.GraphDef
    block: nnx.GraphDef
    hidden_size: int
    p_mean: float
    p_std: float
    sigma_data: float
    weighting: Weighting
    z_dropout: float  # probability of an all-zero z
    smoothing: float
    image_dropout: float  # probability of an all-zero image (classifier-free guidance)

    def __call__(
        self,
        params: tuple[Params, Params],
        images: Array,
        labels: Array,
        key: Key[Array, ""],
        within: SigmaRange,
        number: Int[Array, ""] | int = 0,
        earlier: Earlier = (),
    ) -> tuple[Float[Array, ""], Metrics]:
        key_sigma, key_eps, key_image, key_dropout = jax.random.split(key, 4)
        count = labels.shape[0]
        sigma = sample_sigma(key_sigma, count, within, p_mean=self.p_mean, p_std=self.p_std)
        eps = jax.random.normal(key_eps, (count, self.hidden_size))
        if self.image_dropout > 0:
            keep = jax.random.bernoulli(key_image, 1 - self.image_dropout, (count, 1, 1, 1))
            images = jnp.where(keep, images, 0.0)
        keep_z = None
        if self.z_dropout > 0:
            keep_z = jax.random.bernoulli(jax.random.fold_in(key, 1), 1 - self.z_dropout, (count,))
        shared, block = nnx.merge(self.shared, params[0]), nnx.merge(self.block, params[1])
        if shared.hand_on_tokens:
            key_dropout, key_patches = jax.random.split(key_dropout)
            before = jax.lax.stop_gradient(self._handed_on(params[0], images, number, earlier))
            images = jnp.where(number == 0, shared.embed_patches(images, key_patches), before)
        return denoising_loss(
            shared, block, images, labels, sigma, eps,
            sigma_data=self.sigma_data, weighting=self.weighting, key=key_dropout, keep_z=keep_z,
            mean_weight=within.mean_weight, smoothing=self.smoothing,
        )  # fmt: skip

    def _handed_on(
        self, shared_params: Params, images: Float[Array, "b h w c"], number: Int[Array, ""] | int, earlier: Earlier
    ) -> Float[Array, "b t d"]:
        """The tokens that the blocks before block `number` make of the images."""
        of_shared = [params[0] if len(params) == 2 else shared_params for params in earlier]
        tokens = nnx.merge(self.shared, (*of_shared, shared_params)[0]).embed_patches(images, None)
        for i, (shared, params) in enumerate(zip(of_shared, earlier, strict=True)):
            advance = partial(hand_on, nnx.merge(self.shared, shared), nnx.merge(self.block, params[-1]))
            tokens = jax.lax.cond(i < number, advance, lambda tokens: tokens, tokens)
        return tokens

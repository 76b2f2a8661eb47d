"""What a training step minimises: cross-entropy for the plain model, the denoising loss for one block."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from dblocks_jax.diffusion.loss import Weighting, cross_entropy, weighted_loss
from dblocks_jax.diffusion.noise import SigmaRange, sample_sigma
from dblocks_jax.diffusion.precondition import loss_weight
from dblocks_jax.models.dblock_vit import Block, Shared
from dblocks_jax.tasks.classify.denoiser import denoise
from dblocks_jax.training.optimizer import Params

Metrics = dict[str, Float[Array, ""]]
WORST_SIGMA = "worst_sigma"  # metric: the noise level of the sample with the largest cross-entropy, or one not finite


def plain_loss(
    params: tuple[Params], images: Array, labels: Array, key: Key[Array, ""] | None, _: None, *, graphdef: nnx.GraphDef
) -> tuple[Float[Array, ""], Metrics]:
    """Mean cross-entropy of the plain model."""
    logits = nnx.merge(graphdef, params[0])(images, key)
    ce = jnp.mean(cross_entropy(logits, labels))
    return ce, {"ce": ce, "accuracy": jnp.mean(jnp.argmax(logits, -1) == labels)}


def denoising_loss(
    shared: Shared,
    block: Block,
    images: Float[Array, "b h w c"],
    labels: Int[Array, " b"],
    sigma: Float[Array, " b"],
    eps: Float[Array, "b d"],
    *,
    sigma_data: float,
    weighting: Weighting,
    key: Key[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """One block's loss on z = y + sigma * eps, given the noise; gradient reaches the label embeddings through z."""
    z = shared.embed_labels(labels) + sigma[:, None] * eps
    logits = denoise(shared, block, images, z, sigma, sigma_data=sigma_data, key=key)
    ce = cross_entropy(logits, labels)
    loss = weighted_loss(ce, loss_weight(sigma, sigma_data), weighting)
    accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
    return loss, {"ce": jnp.mean(ce), "accuracy": accuracy, WORST_SIGMA: sigma[worst(ce)]}


def worst(losses: Float[Array, " n"]) -> Int[Array, ""]:
    """Index of the first loss that is not finite, else of the largest."""
    return jnp.argmax(jnp.where(jnp.isfinite(losses), losses, jnp.inf))


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
    image_dropout: float  # probability of an all-zero image (classifier-free guidance)

    def __call__(
        self, params: tuple[Params, Params], images: Array, labels: Array, key: Key[Array, ""], within: SigmaRange
    ) -> tuple[Float[Array, ""], Metrics]:
        key_sigma, key_eps, key_image, key_dropout = jax.random.split(key, 4)
        count = labels.shape[0]
        sigma = sample_sigma(key_sigma, count, within, p_mean=self.p_mean, p_std=self.p_std)
        eps = jax.random.normal(key_eps, (count, self.hidden_size))
        if self.image_dropout > 0:
            keep = jax.random.bernoulli(key_image, 1 - self.image_dropout, (count, 1, 1, 1))
            images = jnp.where(keep, images, 0.0)
        shared, block = nnx.merge(self.shared, params[0]), nnx.merge(self.block, params[1])
        return denoising_loss(
            shared, block, images, labels, sigma, eps,
            sigma_data=self.sigma_data, weighting=self.weighting, key=key_dropout,
        )  # fmt: skip

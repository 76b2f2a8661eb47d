"""What a step of classification costs: cross-entropy of the plain model, or of one block that denoises a label."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dblocks_jax.diffusion.loss import cross_entropy
from dblocks_jax.diffusion.precondition import loss_weight
from dblocks_jax.models.dblock_vit import Block, Shared
from dblocks_jax.models.vit import ViT
from dblocks_jax.tasks.classify.denoiser import denoise
from dblocks_jax.tasks.task import Losses


def plain_losses(
    model: ViT, images: Float[Array, "b h w c"], labels: Int[Array, " b"], key: Key[Array, ""] | None
) -> Losses:
    """Cross-entropy of the plain model."""
    return _of_logits(model(images, key), labels, None)


def denoising_losses(
    shared: Shared,
    block: Block,
    images: Float[Array, "b h w c"],
    labels: Int[Array, " b"],
    sigma: Float[Array, " b"],
    eps: Float[Array, "b d"],
    *,
    sigma_data: float,
    key: Key[Array, ""] | None = None,
) -> Losses:
    """One block's on z = y + sigma * eps, given the noise; gradient reaches the label embeddings through z."""
    z = shared.embed_labels(labels) + sigma[:, None] * eps
    logits = denoise(shared, block, images, z, sigma, sigma_data=sigma_data, key=key)
    return _of_logits(logits, labels, loss_weight(sigma, sigma_data))


def _of_logits(
    logits: Float[Array, "b classes"], labels: Int[Array, " b"], weight: Float[Array, " b"] | None
) -> Losses:
    ce = cross_entropy(logits, labels)
    return Losses(ce, weight, {"ce": ce, "accuracy": jnp.argmax(logits, -1) == labels})


def drop_images(key: Key[Array, ""], images: Float[Array, "b h w c"], rate: float) -> Any:
    """Images that are all zero with probability `rate`, for classifier-free guidance."""
    if rate == 0:
        return images
    keep = jax.random.bernoulli(key, 1 - rate, (images.shape[0], 1, 1, 1))
    return jnp.where(keep, images, 0.0)

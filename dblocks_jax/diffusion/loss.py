"""The denoising loss when the target is a category: cross-entropy weighted by noise level."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Weighting = Literal["batch_mean", "per_sample", "none"]


def cross_entropy(logits: Float[Array, "*b c"], labels: Int[Array, "*b"]) -> Float[Array, "*b"]:
    """-log p(label), in nats, one for each sample, or for each token of a sample."""
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]


def weighted_loss(
    losses: Float[Array, " b"], weight: Float[Array, " b"] | None, weighting: Weighting
) -> Float[Array, ""]:
    """One number from each sample's loss and its w(sigma), if it has one.

    "per_sample": mean(w * loss), the paper's Eq. 6. "batch_mean": mean(w) * mean(loss), what the released code
    minimises (its weights broadcast against the wrong axis). "none": mean(loss).
    """
    if weight is None or weighting == "none":
        return jnp.mean(losses)
    if weighting == "per_sample":
        return jnp.mean(weight * losses)
    return jnp.mean(weight) * jnp.mean(losses)

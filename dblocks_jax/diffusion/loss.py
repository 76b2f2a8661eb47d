"""The denoising loss when the target is a category: cross-entropy weighted by noise level."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Weighting = Literal["batch_mean", "per_sample", "none"]


def cross_entropy(logits: Float[Array, "b c"], labels: Int[Array, " b"]) -> Float[Array, " b"]:
    """-log p(label), in nats, one for each sample."""
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]


def weighted_loss(ce: Float[Array, " b"], weight: Float[Array, " b"], weighting: Weighting) -> Float[Array, ""]:
    """One number from each sample's cross-entropy and its w(sigma).

    "per_sample": mean(w * ce), the paper's Eq. 6. "batch_mean": mean(w) * mean(ce), what the released code minimises
    (its weights broadcast against the wrong axis). "none": mean(ce).
    """
    if weighting == "per_sample":
        return jnp.mean(weight * ce)
    if weighting == "batch_mean":
        return jnp.mean(weight) * jnp.mean(ce)
    return jnp.mean(ce)

"""The denoising loss when the target is a category: cross-entropy weighted by noise level."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Weighting = Literal["batch_mean", "per_sample", "none", "bounded"]


def cross_entropy(logits: Float[Array, "b c"], labels: Int[Array, " b"], smoothing: float = 0.0) -> Float[Array, " b"]:
    """-log p(label), in nats, one for each sample; a share `smoothing` of the target is spread over all classes."""
    log_probs = jax.nn.log_softmax(logits)
    ce = -jnp.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]
    return ce if smoothing == 0 else (1 - smoothing) * ce - smoothing * jnp.mean(log_probs, axis=-1)


def weighted_loss(ce: Float[Array, " b"], weight: Float[Array, " b"], weighting: Weighting) -> Float[Array, ""]:
    """One number from each sample's cross-entropy and its w(sigma).

    "per_sample": mean(w * ce), the paper's Eq. 6. "batch_mean": mean(w) * mean(ce), what the released code minimises
    (its weights broadcast against the wrong axis). "none": mean(ce). "bounded": as "per_sample", of a
    weight with a bound.
    """
    if weighting in ("per_sample", "bounded"):
        return jnp.mean(weight * ce)
    if weighting == "batch_mean":
        return jnp.mean(weight) * jnp.mean(ce)
    return jnp.mean(ce)

"""What a step of next-token text costs: cross-entropy of the plain model, or of one block that denoises every token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dblocks_jax.models.llama import Llama
from dblocks_jax.tasks.task import Losses


def token_cross_entropy(logits: Float[Array, "b t v"], tokens: Int[Array, "b t"]) -> Float[Array, "b t"]:
    """-log p(token), in nats, one for each token."""
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]


def plain_losses(model: Llama, tokens: Int[Array, "b t"]) -> Losses:
    """Cross-entropy of every token but the first, given those before it; the mean of each sample, in nats."""
    return of_logits(model(tokens[:, :-1]), tokens[:, 1:], None)


def of_logits(logits: Float[Array, "b t v"], tokens: Int[Array, "b t"], weight: Float[Array, " b"] | None) -> Losses:
    ce = jnp.mean(token_cross_entropy(logits, tokens), axis=1)
    accuracy = jnp.mean(jnp.argmax(logits, -1) == tokens, axis=1)
    return Losses(ce, weight, {"ce": ce, "accuracy": accuracy})

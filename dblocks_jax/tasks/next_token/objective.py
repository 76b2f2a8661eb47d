"""What a step of next-token text costs: cross-entropy of the plain model, or of one block that denoises every token."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dblocks_jax.diffusion.loss import cross_entropy
from dblocks_jax.diffusion.precondition import loss_weight, precondition
from dblocks_jax.models.chunks import over_tokens
from dblocks_jax.models.dblock_llama import DBlockLlamaBlock, DBlockLlamaShared
from dblocks_jax.models.llama import Llama
from dblocks_jax.tasks.next_token.denoiser import read_out, run_at
from dblocks_jax.tasks.task import Losses


def plain_losses(model: Llama, tokens: Int[Array, "b t"]) -> Losses:
    """Cross-entropy of every token but the first, given those before it; the mean of each sample, in nats."""
    following = jnp.roll(tokens, -1, axis=1)
    ce, correct = _of_tokens(model.head, following, model.embeddings.shape[0], model.features(tokens))
    return _of_samples(ce[:, :-1], correct[:, :-1], None)


def denoising_losses(
    shared: DBlockLlamaShared,
    block: DBlockLlamaBlock,
    tokens: Int[Array, "b t"],
    sigma: Float[Array, " b"],
    eps: Float[Array, "b t d"],
    *,
    sigma_data: float,
    sigma_min: float,
) -> Losses:
    """One block's on z = y + sigma * eps, given the noise: cross-entropy of every token, the mean of each sample.

    The first token has none before it: of it the block learns how texts begin. Gradient reaches the embeddings through
    z and through the clean tokens.
    """
    z = shared.table()[tokens] + sigma[:, None, None] * eps
    c = precondition(sigma, sigma_data)
    features = run_at(shared, block, tokens, z, c, sigma_min=sigma_min)
    read = lambda features, z: read_out(shared, features, z, c)  # noqa: E731
    ce, correct = _of_tokens(read, tokens, shared.embeddings.shape[0], features, z)
    return _of_samples(ce, correct, loss_weight(sigma, sigma_data))


def _of_tokens(
    read: Callable[..., Float[Array, "b t v"]], tokens: Int[Array, "b t"], vocab_size: int, *features: Array
) -> tuple[Float[Array, "b t"], Bool[Array, "b t"]]:
    """(cross-entropy, whether the likeliest token is the right one) of the logits read(*features).

    Logits of a large vocabulary are larger than all else, and exist for some tokens at a time.
    """

    def judge(tokens, *features):
        logits = read(*features)
        return cross_entropy(logits, tokens), jnp.argmax(logits, axis=-1) == tokens

    return over_tokens(judge, len(tokens) * vocab_size * 4, tokens, *features)


def _of_samples(ce: Float[Array, "b t"], correct: Bool[Array, "b t"], weight: Float[Array, " b"] | None) -> Losses:
    each = jnp.mean(ce, axis=1)
    return Losses(each, weight, {"ce": each, "accuracy": jnp.mean(correct, axis=1)})

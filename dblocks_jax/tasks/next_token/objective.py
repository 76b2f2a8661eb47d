"""What a step of next-token text costs: cross-entropy of the plain model, or of one block that denoises every token."""

from jaxtyping import Array, Float, Int

from dblocks_jax.diffusion.precondition import loss_weight, precondition
from dblocks_jax.models.dblock_llama import DBlockLlamaBlock, DBlockLlamaShared
from dblocks_jax.models.llama import Llama
from dblocks_jax.tasks.next_token.denoiser import read_out, run_at
from dblocks_jax.tasks.task import Losses
from dblocks_jax.tasks.text_order import losses_of_following, losses_of_samples, losses_of_tokens


def plain_losses(model: Llama, tokens: Int[Array, "b t"]) -> Losses:
    """Cross-entropy of every token but the first, given those before it; the mean of each sample, in nats."""
    return losses_of_following(model.head, tokens, model.embeddings.shape[0], None, model.features(tokens))


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
    ce, correct = losses_of_tokens(read, tokens, shared.embeddings.shape[0], features, z)
    return losses_of_samples(ce, correct, loss_weight(sigma, sigma_data))

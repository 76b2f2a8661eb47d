"""What a step of recurrent depth costs: Huginn's truncated steps, or one pass of the denoiser."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dblocks_jax.diffusion.precondition import loss_weight, precondition
from dblocks_jax.models.huginn import DBlockHuginnShared, Huginn, RecurrentTrunk, draw_steps, initial_state
from dblocks_jax.tasks.recurrent.denoiser import denoise, read_out
from dblocks_jax.tasks.task import Losses
from dblocks_jax.tasks.text_order import losses_of_following


def huginn_losses(
    model: Huginn, tokens: Int[Array, "b t"], key_state: Key[Array, ""], key_steps: Key[Array, ""]
) -> Losses:
    """Cross-entropy of every token but the first after a random number of steps, one for all samples, from noise."""
    shape = (*tokens.shape, model.embeddings.shape[1])
    features = model.features(tokens, initial_state(key_state, shape), draw_steps(key_steps))
    return losses_of_following(model.head, tokens, model.embeddings.shape[0], None, features)


def denoising_losses(
    shared: DBlockHuginnShared,
    trunk: RecurrentTrunk,
    tokens: Int[Array, "b t"],
    sigma: Float[Array, " b"],
    eps: Float[Array, "b t d"],
    *,
    sigma_data: float,
) -> Losses:
    """One pass on z_t = y_{t+1} + sigma * eps_t, given the tokens up to t: cross-entropy of token t + 1.

    Behind the last token stands the first one, which moves nothing: no other position reads it, and it is not counted.
    """
    z = shared.table()[jnp.roll(tokens, -1, axis=1)] + sigma[:, None, None] * eps
    c = precondition(sigma, sigma_data)
    features = denoise(shared, trunk, tokens, z, c)

    def read(features: Array, z: Array) -> Array:
        return read_out(shared, features, z, c)

    weight = loss_weight(sigma, sigma_data)
    return losses_of_following(read, tokens, shared.embeddings.shape[0], weight, features, z)

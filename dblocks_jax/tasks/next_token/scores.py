"""The logits by which a text is scored: of each token but the first, given those before it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dblocks_jax.models.blueprint import Blueprint
from dblocks_jax.run.streams import stream
from dblocks_jax.tasks.next_token.denoiser import denoise
from dblocks_jax.tasks.text_order import LogitsOf


def make_logits(config: ConfigDict, blueprint: Blueprint) -> LogitsOf:
    """Build (parameters of the first block, tokens [b, t], positions [b]) -> logits of tokens 1 .. t - 1 (n of them).

    Each given those before it.

    Of the plain model its own. Of blocks those of the first one, asked where the sampler starts: at sigma_max, with
    z = sigma_max * eps, in which there is nothing of the token. That is the probability of the next token as far as
    blocks have one: what the others make of a draw from it has none that could be told.
    `init_noise_scale` is not looked at. The noise is a function of `positions`, the number of each sequence.
    """

    def logits_of(together, tokens: Int[Array, "b t"], positions: Int[Array, " b"]) -> Float[Array, "b n v"]:
        modules = blueprint.together(together)
        if config.model_type == "llama":
            return modules[0](tokens)[:, :-1]
        (shared, block), shape = modules, (tokens.shape[1], config.hidden_size)
        eps = jax.vmap(lambda place: jax.random.normal(stream(0, "score", place), shape))(positions)
        sigma = jnp.full(tokens.shape[:1], config.sigma_max)
        edm = {"sigma_data": config.sigma_data, "sigma_min": config.sigma_min}
        return denoise(shared, block, tokens, config.sigma_max * eps, sigma, **edm)[:, 1:]

    return logits_of

"""The logits by which a text is scored: of each token but the first, given those before it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dblocks_jax.models.blueprint import Blueprint
from dblocks_jax.run.streams import stream
from dblocks_jax.tasks.next_token.denoiser import denoise
from dblocks_jax.tasks.text_order import LogitsOf


def fixed_noise(config: ConfigDict, length: int, positions: Int[Array, " b"]) -> Float[Array, "b t d"]:
    """The noise of each token of sequences of `length`: a function of their numbers `positions` alone."""
    shape = (length, config.hidden_size)
    return jax.vmap(lambda place: jax.random.normal(stream(0, "score", place), shape))(positions)


def make_logits(config: ConfigDict, blueprint: Blueprint) -> LogitsOf:
    """Build (parameters of the first block, tokens [b, t], positions [b]) -> logits of tokens 1 .. t - 1 (n of them).

    Each given those before it.

    Of the plain model its own. Of blocks those of the first one, asked where the sampler starts: at sigma_max, with
    z = sigma_max * eps, in which there is nothing of the token. `init_noise_scale` is not looked at. The noise is a
    function of `positions`, the number of each sequence. What later steps make of it is in `chain.py`.
    """

    def logits_of(together, tokens: Int[Array, "b t"], positions: Int[Array, " b"]) -> Float[Array, "b n v"]:
        modules = blueprint.together(together)
        if config.model_type == "llama":
            return modules[0](tokens)[:, :-1]
        shared, block = modules
        eps = fixed_noise(config, tokens.shape[1], positions)
        sigma = jnp.full(tokens.shape[:1], config.sigma_max)
        edm = {"sigma_data": config.sigma_data, "sigma_min": config.sigma_min}
        return denoise(shared, block, tokens, config.sigma_max * eps, sigma, **edm)[:, 1:]

    return logits_of

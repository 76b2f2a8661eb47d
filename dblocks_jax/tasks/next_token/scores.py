"""How many bits a character of held-out text takes, exactly: each token given those before it."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dblocks_jax.diffusion.loss import cross_entropy
from dblocks_jax.models.blueprint import Blueprint, Params
from dblocks_jax.run.devices import to_device
from dblocks_jax.run.streams import stream
from dblocks_jax.tasks.next_token.denoiser import denoise
from dblocks_jax.tasks.text import TextCard, scored_at_once

Score = Callable[[dict[str, Params], Any, Callable[[], None]], dict[str, Any]]


def fixed_noise(config: ConfigDict, length: int, positions: Int[Array, " b"]) -> Float[Array, "b t d"]:
    """The noise of each token of sequences of `length`: a function of their numbers `positions` alone."""
    shape = (length, config.hidden_size)
    return jax.vmap(lambda place: jax.random.normal(stream(0, "score", place), shape))(positions)


def make_logits(config: ConfigDict, blueprint: Blueprint) -> Callable[..., Float[Array, "b n v"]]:
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


def make_score(config: ConfigDict, blueprint: Blueprint, card: TextCard) -> Score:
    """Build (parameters by part, split, what to call at each batch) -> {"bits", "num_sequences"}.

    The first token of a sequence is left out: nothing is before it.
    """
    logits_of = make_logits(config, blueprint)

    @jax.jit
    def costs_of(together, tokens: Array, positions: Int[Array, " b"]) -> Float[Array, " b"]:
        tokens = tokens.astype(jnp.int32)
        return cross_entropy(logits_of(together, tokens, positions), tokens[:, 1:]).sum(axis=1)

    def run(params: dict[str, Params], source: Any, at_each_batch: Callable[[], None]) -> dict[str, Any]:
        count = len(source)
        size = min(scored_at_once(config, card.length, len(card.vocabulary)), count)
        together = tuple(to_device(params[name]) for name in blueprint.names(0))
        nats, characters = [], 0
        for start in range(0, count, size):
            at_each_batch()
            places = np.arange(start, start + size) % count  # all batches have one shape
            tokens = source.take(places)["tokens"]
            real = min(size, count - start)
            characters += card.vocabulary.count_characters(tokens[:real, 1:].ravel())
            nats.append((real, costs_of(together, tokens, places.astype(np.int32))))
        total = sum(np.sum(np.asarray(costs, np.float64)[:real]) for real, costs in nats)
        return {"num_sequences": count, "bits": float(total / characters / math.log(2))}

    return run

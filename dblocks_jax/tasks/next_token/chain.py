"""What a token costs after each step of the sampler, and by the joint judgement of all blocks: exactly, both.

The noise that a token starts from is a function of the sequence's number and the token's place. So all that the
sampler does is a function of the tokens before, and its logits after any step are an ordinary distribution of the next.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dblocks_jax.diffusion.loss import cross_entropy
from dblocks_jax.diffusion.sampler import initial_z
from dblocks_jax.models.blueprint import Blueprint, Params
from dblocks_jax.run.devices import to_device
from dblocks_jax.tasks.gaussian import gaussian
from dblocks_jax.tasks.next_token.denoiser import denoise, move
from dblocks_jax.tasks.next_token.generation import sampler_plan, visits
from dblocks_jax.tasks.next_token.scores import fixed_noise
from dblocks_jax.tasks.text import TextCard, scored_batches


class Chain:
    """The sampler of a config on every token of given texts at once, each token given the true ones before it."""

    def __init__(self, config: ConfigDict, blueprint: Blueprint):
        self.config, self.blueprint = config, blueprint
        edm = {"sigma_data": config.sigma_data, "sigma_min": config.sigma_min}

        @jax.jit
        def step(together, tokens, z, sigma, sigma_next, embeddings_next):
            shared, block = blueprint.together(together)
            logits = denoise(shared, block, tokens, z, jnp.full(tokens.shape[:1], sigma), **edm)
            return logits, move(shared, logits, z, sigma, sigma_next, embeddings_next)

        self._step = step

    def steps(
        self, params: dict[str, Params], tokens: Int[Array, "b t"], z: Float[Array, "b t d"]
    ) -> Iterator[Float[Array, "b t v"]]:
        """Logits of every token after each step of the sampler from `z`, by the block that owns the level."""
        for owner, *levels_and_embeddings in visits(sampler_plan(self.config), self.blueprint, params):
            logits, z = self._step(self._together(params, owner), tokens, z, *levels_and_embeddings)
            yield logits

    def joined(self, params: dict[str, Params], tokens: Int[Array, "b t"]) -> Float[Array, "b t v"]:
        """The mean of all blocks' log-probabilities, each asked alone at z = 0 and the top of its own range."""
        z = jnp.zeros((*tokens.shape, self.config.hidden_size))
        tops = gaussian(self.config).edges[:-1].astype(np.float32)
        answers = (
            self._step(self._together(params, block), tokens, z, top, top, None)[0] for block, top in enumerate(tops)
        )
        return sum(map(jax.nn.log_softmax, answers), start=jnp.float32(0)) / len(tops)

    def _together(self, params: dict[str, Params], block: int) -> tuple[Params, ...]:
        return tuple(to_device(params[name]) for name in self.blueprint.names(block))


@jax.jit
def _nats(logits: Float[Array, "b t v"], tokens: Int[Array, "b t"]) -> Float[Array, " b"]:
    """What the tokens of each sequence cost but the first, which nothing is before."""
    return cross_entropy(logits[:, 1:], tokens[:, 1:]).sum(axis=1)


def score_chain(
    config: ConfigDict, blueprint: Blueprint, card: TextCard, params: dict[str, Params], source: Any
) -> dict[str, Any]:
    """{"bits_by_step", "bits_joined"} of a split, in bits per character, as `scores.make_score` counts them."""
    chain = Chain(config, blueprint)
    totals, characters = np.zeros(len(sampler_plan(config)[0]) + 1), 0
    for places, real in scored_batches(config, card, len(source)):
        rows = source.take(places)["tokens"].astype(np.int32)
        characters += card.vocabulary.count_characters(rows[:real, 1:].ravel())
        tokens = jnp.asarray(rows)
        z = initial_z(fixed_noise(config, card.length, jnp.asarray(places)), config.sigma_max, config.init_noise_scale)
        # Each step's logits are let go of before the next ones are made.
        costs = [_nats(logits, tokens) for logits in chain.steps(params, tokens, z)]
        costs.append(_nats(chain.joined(params, tokens), tokens))
        totals += [np.sum(np.asarray(each, np.float64)[:real]) for each in jax.device_get(costs)]
    bits = [float(total / characters / math.log(2)) for total in totals]
    return {"bits_by_step": bits[:-1], "bits_joined": bits[-1]}

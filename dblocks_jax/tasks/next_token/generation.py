"""Writing text token by token, with the keys and values of what is written kept: of the plain model, and of blocks.

Blocks write as the paper does: each token starts as noise and is denoised level by level, by the block that owns the
level; the last logits choose it; then every block reads the token that was chosen.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from dblocks_jax.diffusion.sampler import initial_z
from dblocks_jax.models.blueprint import Blueprint
from dblocks_jax.run.devices import to_device
from dblocks_jax.run.errors import UserError
from dblocks_jax.run.streams import stream
from dblocks_jax.tasks.gaussian import gaussian
from dblocks_jax.tasks.next_token.denoiser import append, denoise_step, remember

# (parameters by part, the tokens before, how many to write, number of each sample) -> after each token: it, its logits
Writer = Callable[..., Iterator[tuple[Int[Array, " b"], Float[Array, "b v"]]]]


def sampler_plan(config: ConfigDict) -> tuple[Float[np.ndarray, " n"], list[int]]:
    """(noise levels, descending; the block that runs at each of them) of every token."""
    corruption = gaussian(config)
    sigmas = corruption.levels(config.num_inference_steps or config.num_blocks, config.sampler_spacing)
    return sigmas, corruption.owners(sigmas)


def choose_token(
    keys: Key[Array, " b"], logits: Float[Array, "b v"], temperature: float, top_p: float
) -> Int[Array, " b"]:
    """A token of each sample from softmax(logits / temperature), cut to its nucleus; at temperature 0 the likeliest.

    The nucleus is the fewest likeliest tokens whose probabilities add up to `top_p`.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / temperature
    order = jnp.argsort(-logits, axis=-1)
    probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    likelier = jnp.cumsum(probs, axis=-1) - probs  # how probable all are that are likelier than this one
    ranks = jax.vmap(jax.random.categorical)(keys, jnp.where(likelier < top_p, jnp.log(probs), -jnp.inf))
    return jnp.take_along_axis(order, ranks[:, None], axis=-1)[:, 0]


def _keys(seed: int, name: str, samples: Int[Array, " b"], position: Int[Array, ""]) -> Key[Array, " b"]:
    """What is drawn for a token depends on the seed, the sample's number and the token's position alone."""
    return jax.vmap(lambda sample: jax.random.fold_in(stream(seed, name, sample), position))(samples)


def starting_noise(config: ConfigDict, samples: Int[Array, " b"], position: Int[Array, ""]) -> Float[Array, "b d"]:
    """Where the token at `position` begins: noise at sigma_max, times `init_noise_scale`."""
    keys = _keys(config.seed, "sampler", samples, position)
    unit_noise = jax.vmap(lambda key: jax.random.normal(key, (config.hidden_size,)))(keys)
    return initial_z(unit_noise, config.sigma_max, config.init_noise_scale)


def make_writer(config: ConfigDict, blueprint: Blueprint) -> Writer:
    """Build what continues texts as a config describes. It compiles once for all tokens, blocks and levels.

    `prompt` is [b, t] with t >= 1. Greedy at temperature 0, else drawn from the nucleus of `top_p`.

    Raises:
      UserError: when called with an empty prompt.
    """
    choose = partial(_choose, config.seed, config.temperature, config.top_p)
    write = (
        _plain_writer(blueprint, choose) if config.model_type == "llama" else _block_writer(config, blueprint, choose)
    )

    def checked(params: Any, prompt: Int[Array, "b t"], count: int, samples: Int[Array, " b"]):
        if prompt.shape[1] == 0:
            raise UserError("a text must begin with at least one token")
        return write(params, prompt, count, samples)

    return checked


def _choose(seed, temperature, top_p, logits, samples, position):
    return choose_token(_keys(seed, "text", samples, position), logits, temperature, top_p)


def _plain_writer(blueprint: Blueprint, choose) -> Writer:
    @partial(jax.jit, static_argnums=2)
    def prefill(params, prompt, length):
        (model,) = blueprint.together((params,))
        return model.prefill(prompt, length)

    @partial(jax.jit, donate_argnums=2)
    def step(params, token, cache, position):
        (model,) = blueprint.together((params,))
        return model.step(token, cache, position)

    choose = jax.jit(choose)

    def write(params, prompt, count, samples):
        start, length = prompt.shape[1], prompt.shape[1] + count
        logits, cache = prefill(params["model"], prompt, length)
        for position in range(start, length):
            token = choose(logits, samples, jnp.int32(position))
            yield token, logits
            if position < length - 1:
                logits, cache = step(params["model"], token, cache, jnp.int32(position))

    return write


def _block_writer(config: ConfigDict, blueprint: Blueprint, choose) -> Writer:
    sigmas, owners = sampler_plan(config)
    levels = sigmas.astype(np.float32)
    blocks = range(config.num_blocks)

    @partial(jax.jit, static_argnums=2)
    def prefill(together, prompt, length):
        shared, block = blueprint.together(together)
        return remember(shared, block, prompt, length, sigma_min=config.sigma_min)

    @partial(jax.jit, donate_argnums=2)
    def step(together, z, cache, position, sigma, sigma_next, embeddings_next):
        shared, block = blueprint.together(together)
        return denoise_step(
            shared, block, z, cache, position, sigma, sigma_next,
            sigma_data=config.sigma_data, embeddings_next=embeddings_next,
        )  # fmt: skip

    @partial(jax.jit, donate_argnums=2)
    def read(together, token, cache, position):
        shared, block = blueprint.together(together)
        return append(shared, block, token, cache, position, sigma_min=config.sigma_min)

    begin, choose = jax.jit(partial(starting_noise, config)), jax.jit(choose)

    def write(params, prompt, count, samples):
        def together(block: int):
            return tuple(to_device(params[name]) for name in blueprint.names(block))

        start, length = prompt.shape[1], prompt.shape[1] + count
        caches = [prefill(together(block), prompt, length) for block in blocks]
        for position in map(jnp.int32, range(start, length)):
            z, logits = begin(samples, position), None
            for i, owner in enumerate(owners):
                next_level, next_owner = (values[min(i + 1, len(values) - 1)] for values in (levels, owners))
                name_next = blueprint.names(next_owner)[0]
                embeddings_next = None if name_next == "shared" else to_device(params[name_next]["embeddings"])
                logits, z, caches[owner] = step(
                    together(owner), z, caches[owner], position, levels[i], next_level, embeddings_next
                )
            assert logits is not None
            token = choose(logits, samples, position)
            yield token, logits
            if position < length - 1:
                for block in blocks:
                    caches[block] = read(together(block), token, caches[block], position)

    return write

"""Writing text token by token, with the keys and values of what is written kept: of the plain model, and of blocks.

Blocks write as the paper does: each token starts as noise and is denoised level by level, by the block that owns the
level; the last logits choose it; then every block reads the token that was chosen.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dblocks_jax.diffusion.sampler import initial_z
from dblocks_jax.models.blueprint import Blueprint, Params
from dblocks_jax.run.devices import to_device
from dblocks_jax.tasks.gaussian import gaussian
from dblocks_jax.tasks.next_token.denoiser import append, denoise_step, remember
from dblocks_jax.tasks.text_writing import Choose, Writer, checked, keys_of, make_cached_writer, make_choose


def sampler_plan(config: ConfigDict) -> tuple[Float[np.ndarray, " n"], list[int]]:
    """(noise levels, descending; the block that runs at each of them) of every token."""
    corruption = gaussian(config)
    sigmas = corruption.levels(config.num_inference_steps or config.num_blocks, config.sampler_spacing)
    return sigmas, corruption.owners(sigmas)


def visits(
    plan: tuple[Float[np.ndarray, " n"], list[int]], blueprint: Blueprint, params: dict[str, Params]
) -> Iterator[tuple[int, np.float32, np.float32, Array | None]]:
    """(block, its level, the next one, embeddings of the next step's block if it has its own) of each step of a plan.

    The last step stays where it is.
    """
    sigmas, owners = plan
    levels = sigmas.astype(np.float32)
    following = zip([*levels[1:], levels[-1]], [*owners[1:], owners[-1]], strict=True)
    for owner, level, (level_next, owner_next) in zip(owners, levels, following, strict=True):
        name = blueprint.names(owner_next)[0]
        yield owner, level, level_next, None if name == "shared" else to_device(params[name]["embeddings"])


def starting_noise(config: ConfigDict, samples: Int[Array, " b"], position: Int[Array, ""]) -> Float[Array, "b d"]:
    """Where the token at `position` begins: noise at sigma_max, times `init_noise_scale`."""
    keys = keys_of(config.seed, "sampler", samples, position)
    unit_noise = jax.vmap(lambda key: jax.random.normal(key, (config.hidden_size,)))(keys)
    return initial_z(unit_noise, config.sigma_max, config.init_noise_scale)


def make_writer(config: ConfigDict, blueprint: Blueprint) -> Writer:
    """Build what continues texts as a config describes. It compiles once for all tokens, blocks and levels.

    `prompt` is [b, t] with t >= 1. Greedy at temperature 0, else drawn from the nucleus of `top_p`.

    Raises:
      UserError: when called with an empty prompt.
    """
    choose = make_choose(config)
    if config.model_type == "llama":
        return checked(make_cached_writer(blueprint, choose, _prefill, _step))
    return checked(_block_writer(config, blueprint, choose))


def _prefill(modules, prompt, length):
    return modules[0].prefill(prompt, length)


def _step(modules, token, cache, position):
    return modules[0].step(token, cache, position)


def _block_writer(config: ConfigDict, blueprint: Blueprint, choose: Choose) -> Writer:
    plan, blocks = sampler_plan(config), range(config.num_blocks)

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

    begin = jax.jit(partial(starting_noise, config))

    def write(params, prompt, count, samples):
        def together(block: int):
            return tuple(to_device(params[name]) for name in blueprint.names(block))

        start, length = prompt.shape[1], prompt.shape[1] + count
        caches = [prefill(together(block), prompt, length) for block in blocks]
        for position in map(jnp.int32, range(start, length)):
            z, logits = begin(samples, position), None
            for owner, *levels_and_embeddings in visits(plan, blueprint, params):
                logits, z, caches[owner] = step(together(owner), z, caches[owner], position, *levels_and_embeddings)
            assert logits is not None
            token = choose(logits, samples, position)
            yield token, logits
            if position < length - 1:
                for block in blocks:
                    caches[block] = read(together(block), token, caches[block], position)

    return write

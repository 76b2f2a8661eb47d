"""From noise to images: each block denoises at the levels that it owns, one block on the device at a time."""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dblocks_jax.data.datasets import Card
from dblocks_jax.diffusion.gaussian import Gaussian
from dblocks_jax.diffusion.sampler import solve
from dblocks_jax.models.blueprint import Blueprint
from dblocks_jax.run.devices import to_device
from dblocks_jax.run.streams import stream
from dblocks_jax.tasks.generate.config import corruption
from dblocks_jax.tasks.generate.denoiser import denoise, guided

# (parameters by part, position of each sample, its class, guidance) -> (estimate, z) after each level, the last ones
# equal and the answer; that many levels as `sampler_plan` has. Guidance 1 is none. seed= is another than the config's.
Sampler = Callable[..., Iterator[tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]]]


def sampler_plan(config: ConfigDict) -> tuple[Float[np.ndarray, " n"], list[int]]:
    """(noise levels, descending; the block that runs at each of them) of the sampler that a config describes."""
    noise: Gaussian = corruption(config)
    sigmas = noise.levels(config.num_inference_steps, config.sampler_spacing)
    return sigmas, noise.owners(sigmas)


def make_sampler(config: ConfigDict, blueprint: Blueprint, card: Card) -> Sampler:
    """Build the sampler that a config describes. It compiles once for all blocks, levels, seeds and guidance.

    A sample is a function of the seed, its position and class alone, not of the batch around it.
    """
    sigmas, owners = sampler_plan(config)

    @jax.jit
    def start(seed, positions):
        keys = jax.vmap(partial(stream, seed, "samples"))(positions)
        return sigmas[0].astype(np.float32) * jax.vmap(lambda key: jax.random.normal(key, card.image_shape))(keys)

    @jax.jit
    def plain(together, labels, z, sigma):
        shared, block = blueprint.together(together)
        return denoise(shared, block, labels, z, jnp.full(labels.shape, sigma), sigma_data=config.sigma_data)

    @jax.jit
    def with_guidance(together, labels, z, sigma, scale):
        shared, block = blueprint.together(together)
        sigmas = jnp.full(labels.shape, sigma)
        return guided(shared, block, labels, z, sigmas, sigma_data=config.sigma_data, scale=scale)

    def sample(
        params,
        positions: Int[np.ndarray | Array, " b"],
        labels: Int[np.ndarray | Array, " b"],
        scale: float | Array,
        seed: int = config.seed,
    ) -> Iterator[tuple[Array, Array]]:
        def answer(owner: int, z: Array, sigma: np.float32) -> Array:
            if config.idle_blocks != "device" or config.block_parallel:
                jax.block_until_ready(z)  # else blocks that wait elsewhere would pile up on the device
            together = tuple(to_device(params[name]) for name in blueprint.names(owner))
            if isinstance(scale, int | float) and scale == 1:
                return plain(together, labels, z, sigma)
            return with_guidance(together, labels, z, sigma, jnp.asarray(scale, jnp.float32))

        return solve(answer, start(np.uint32(seed), positions), sigmas, owners, config.solver)

    return sample

"""The denoising loss on images that a model was not trained on: one number of little noise, without sampling."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict
from scipy.special import ndtr, ndtri

from dblocks_jax.data.datasets import Source
from dblocks_jax.diffusion.gaussian import Gaussian
from dblocks_jax.diffusion.noise import NoiseDistribution
from dblocks_jax.diffusion.precondition import loss_weight
from dblocks_jax.models.blueprint import Blueprint, Params
from dblocks_jax.run.devices import to_device
from dblocks_jax.run.streams import stream
from dblocks_jax.tasks.generate.denoiser import denoise, squared_error
from dblocks_jax.tasks.generate.pixels import to_signal

LEVELS = 24
MOST_IMAGES = 2000


def held_out_levels(noise: NoiseDistribution) -> Float[np.ndarray, " levels"]:
    """The middles, in probability, of LEVELS parts of p_noise of equal mass, descending. None lies on an edge."""
    low, high = ndtr(noise.standardize(noise.sigma_min)), ndtr(noise.standardize(noise.sigma_max))
    middles = (np.arange(LEVELS)[::-1] + 0.5) / LEVELS
    return np.exp(noise.p_mean + noise.p_std * ndtri(low + middles * (high - low)))


def make_held_out_loss(
    config: ConfigDict, corruption: Gaussian, blueprint: Blueprint
) -> Callable[[dict[str, Params], Source, Callable[[], None]], dict[str, Any]]:
    """Build (parameters, split, what to call at each batch) -> {"loss", "loss_by_block", "num_images"}.

    w(sigma) |D - y|^2, as EDM weighs it, the mean over LEVELS levels and at most MOST_IMAGES images, of known class.
    Each level is asked of the block that owns it; one that owns none has no number. Noise is a function of the image's
    place and the level alone, so it is the same for every model.
    """
    levels = held_out_levels(corruption.noise)
    owners = corruption.owners(levels)

    @jax.jit
    def losses(params, images, labels, positions, sigma, index):
        signal = to_signal(images)
        keys = jax.vmap(lambda place: jax.random.fold_in(stream(0, "held out", place), index))(positions)
        eps = jax.vmap(lambda key: jax.random.normal(key, signal.shape[1:]))(keys)
        sigmas = jnp.full(labels.shape, sigma)
        shared, block = blueprint.together(params)
        denoised = denoise(shared, block, labels, signal + sigma * eps, sigmas, sigma_data=config.sigma_data)
        return jnp.sum(loss_weight(sigmas, config.sigma_data) * squared_error(denoised, signal))

    def run(params: dict[str, Params], source: Source, at_each_batch: Callable[[], None]) -> dict[str, Any]:
        count = min(len(source), MOST_IMAGES)
        chosen = np.unique(np.linspace(0, len(source) - 1, count).astype(int))
        size = min(config.eval_batch_size, count)
        sums: list[list[Any]] = [[] for _ in range(LEVELS)]
        for start in range(0, count, size):
            places = chosen[start : start + size]
            batch = source.take(places)
            for index, (sigma, owner) in enumerate(zip(levels.astype(np.float32), owners, strict=True)):
                at_each_batch()
                together = tuple(to_device(params[name]) for name in blueprint.names(owner))
                positions = places.astype(np.int32)
                sums[index].append(losses(together, batch["image"], batch["label"], positions, sigma, np.int32(index)))
        means = np.array([np.sum(np.float64(jax.device_get(each))) for each in sums]) / count
        of_blocks = [means[np.array(owners) == block] for block in range(corruption.num_blocks)]
        by_block = [float(of_one.mean()) if of_one.size else math.nan for of_one in of_blocks]
        return {"num_images": int(count), "loss": float(means.mean()), "loss_by_block": by_block}

    return run

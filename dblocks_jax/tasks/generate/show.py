"""What a person wants to see of image generation before it is trained."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from dblocks_jax.models.dit import DiTBlock, DiTShared
from dblocks_jax.tasks.generate.denoiser import denoise
from dblocks_jax.tasks.generate.sampler import sampler_plan
from dblocks_jax.tasks.generate.task import Generate


class Step(nnx.Module):
    """One denoising step: a block with what it shares."""

    def __init__(self, shared: DiTShared, block: DiTBlock, sigma_data: float):
        self.shared, self.block, self.sigma_data = shared, block, sigma_data

    def __call__(self, labels, z, sigma):
        """The image that is meant."""
        return denoise(self.shared, self.block, labels, z, sigma, sigma_data=self.sigma_data)


def step_of(task: Generate, modules: tuple[Any, ...]) -> tuple[nnx.Module, tuple[Any, ...]]:
    """What one step runs, as one module, and arguments of it for one image."""
    shared, block = modules
    inputs = (jnp.zeros(1, jnp.int32), jnp.zeros((1, *task.card.image_shape)), jnp.ones(1))
    return Step(shared, block, task.config.sigma_data), inputs


def levels_of(task: Generate) -> list[float]:
    """The noise levels that the sampler visits."""
    return [float(sigma) for sigma in sampler_plan(task.config)[0]]

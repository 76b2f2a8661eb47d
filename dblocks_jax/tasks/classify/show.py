"""What a person wants to see of classification before it is trained."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from dblocks_jax.models.dblock_vit import Shared
from dblocks_jax.models.layers import Block
from dblocks_jax.tasks.classify.classifier import sampler_plan
from dblocks_jax.tasks.classify.denoiser import denoise
from dblocks_jax.tasks.classify.task import Classify


class Step(nnx.Module):
    """One denoising step: a block with what it shares."""

    def __init__(self, shared: Shared, block: Block, sigma_data: float):
        self.shared, self.block, self.sigma_data = shared, block, sigma_data

    def __call__(self, images, z, sigma):
        """Logits."""
        return denoise(self.shared, self.block, images, z, sigma, sigma_data=self.sigma_data)


def step_of(task: Classify, modules: tuple[Any, ...]) -> tuple[nnx.Module, tuple[Any, ...]]:
    """What one step runs, as one module, and arguments of it for one image."""
    images = jnp.zeros((1, *task.card.image_shape))
    if task.is_plain:
        return modules[0], (images, None)
    (shared, block), width = modules, task.config.hidden_size
    return Step(shared, block, task.config.sigma_data), (images, jnp.zeros((1, width)), jnp.ones(1))


def levels_of(task: Classify) -> list[float]:
    """The noise levels that the sampler visits."""
    return [] if task.is_plain else [float(sigma) for sigma in sampler_plan(task.config)[0]]

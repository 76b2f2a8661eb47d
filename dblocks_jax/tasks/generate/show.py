"""What a person wants to see of image generation before it is trained, and of several runs side by side."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from dblocks_jax.data.datasets import Dataset
from dblocks_jax.models.conditioned import ConditionedBlock
from dblocks_jax.models.dit import DiTShared
from dblocks_jax.pages import charts
from dblocks_jax.pages.figures import Figure
from dblocks_jax.pages.findings import DataShown, held_out_curves
from dblocks_jax.tasks.generate.config import LATENTS
from dblocks_jax.tasks.generate.denoiser import denoise
from dblocks_jax.tasks.generate.sampler import sampler_plan
from dblocks_jax.tasks.generate.task import Generate
from dblocks_jax.tasks.image_show import images_shown

FIGURES = (
    Figure("loss", "loss", has_spread=True, digits=4),
    Figure("accuracy_of_samples", "accuracy of samples", is_share=True, has_spread=True),
    Figure("frechet_judge", "Fréchet, judge", has_spread=True),
    Figure("frechet_pixels", "Fréchet, pixels", has_spread=True),
    Figure("kid_judge", "kernel, judge", has_spread=True, digits=4),
    Figure("nearest_ratio", "nearness", has_spread=True),
)
ABOUT_FIGURES = (
    "Loss is the denoising loss on test images: less is better. Of samples: the share that the judge takes for the "
    "class asked for; distances of their distribution to that of the training images, less is better; and how near "
    "they are to training images, in distances to test images, where copies have 0."
)
ABOUT_LEVELS = "How often training meets each noise level sigma, and which block answers for it."
ONE_EXAMPLE = "one image"
ABOUT_CURVE = "loss on images kept apart"


class Step(nnx.Module):
    """One denoising step: a block with what it shares."""

    def __init__(self, shared: DiTShared, block: ConditionedBlock, sigma_data: float):
        self.shared, self.block, self.sigma_data = shared, block, sigma_data

    def __call__(self, labels, z, sigma):
        """The image that is meant."""
        return denoise(self.shared, self.block, labels, z, sigma, sigma_data=self.sigma_data)


def step_of(task: Generate, modules: tuple[Any, ...]) -> tuple[nnx.Module, tuple[Any, ...]]:
    """What one step runs, as one module, and arguments of it for one image."""
    shared, block = modules
    inputs = (jnp.zeros(1, jnp.int32), jnp.zeros((1, *task.card.image_shape)), jnp.ones(1))
    return Step(shared, block, task.config.sigma_data), inputs


def draw_levels(task: Generate) -> dict[str, str]:
    """A picture of the noise levels, of the blocks that own them, and of those that the sampler visits."""
    levels = [float(sigma) for sigma in sampler_plan(task.config)[0]]
    return {"levels": charts.noise(task.corruption.noise, task.corruption.edges, levels)}


def curve(lines: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """(steps, ABOUT_CURVE there) of a log: on the validation split, or without one on the test split."""
    return next(iter(held_out_curves(lines, "loss").values()), ([], []))


def data_shown(task: Generate, dataset: Dataset) -> DataShown:
    """The images, for the page that is made before training."""
    return images_shown(dataset, _about_images(task))


def _about_images(task: Generate) -> str:
    """What the network sees of them."""
    if task.config.dataset == LATENTS:
        return f"They are latents, which the network sees times {task.config.latent_scale:g}."
    return "Pixels are scaled to -1..1."

"""What a person wants to see of classification before it is trained, and of several runs side by side."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dblocks_jax.data.datasets import Dataset
from dblocks_jax.models.dblock_vit import Shared
from dblocks_jax.models.layers import Block
from dblocks_jax.pages import charts
from dblocks_jax.pages.figures import Figure
from dblocks_jax.pages.findings import DataShown
from dblocks_jax.tasks.classify.classifier import sampler_plan
from dblocks_jax.tasks.classify.denoiser import denoise
from dblocks_jax.tasks.classify.task import Classify
from dblocks_jax.tasks.image_show import images_shown

FIGURES = (
    Figure("top1", "accuracy", is_share=True, has_spread=True),
    Figure("macro_f1", "macro F1"),
    Figure("cross_entropy", "cross-entropy"),
    Figure("calibration_error", "calibration error"),
)
ABOUT_FIGURES = "Accuracy is the share of right answers on the test split."
ABOUT_LEVELS = "How often training meets each noise level sigma, and which block answers for it."
ONE_EXAMPLE = "one image"
ABOUT_CURVE = "cross-entropy on training batches, without weights, mean over blocks"


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


def draw_levels(task: Classify) -> dict[str, str]:
    """A picture of the noise levels, of the blocks that own them, and of those that the sampler visits."""
    if task.corruption is None:
        return {}
    levels = [float(sigma) for sigma in sampler_plan(task.config)[0]]
    return {"levels": charts.noise(task.corruption.noise, task.corruption.edges, levels)}


def curve(lines: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """(steps, ABOUT_CURVE there) of a log."""
    steps, values = [], []
    for line in lines:
        means = [block["ce"] for block in line.get("blocks", {}).values() if block.get("ce") is not None]
        if means and math.isfinite(mean := float(np.mean(means))):
            steps.append(line["step"])
            values.append(mean)
    return steps, values


def data_shown(task: Classify, dataset: Dataset) -> DataShown:
    """The images, for the page that is made before training."""
    return images_shown(dataset, _about_images(task))


def _about_images(task: Classify) -> str:
    """What the network sees of them."""
    mean, std = (", ".join(map(str, numbers)) for numbers in (task.card.mean, task.card.std))
    return f"Pixels are scaled to 0..1 and normalised with mean {mean} and deviation {std}."

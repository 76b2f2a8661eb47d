"""What a person wants to see of next-token text before it is trained, and of several runs side by side."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from dblocks_jax.models.dblock_llama import DBlockLlamaBlock, DBlockLlamaShared
from dblocks_jax.pages import charts
from dblocks_jax.pages.figures import Figure
from dblocks_jax.pages.findings import DataShown
from dblocks_jax.tasks.next_token.denoiser import denoise
from dblocks_jax.tasks.next_token.generation import sampler_plan
from dblocks_jax.tasks.next_token.task import NextToken
from dblocks_jax.tasks.text_show import ABOUT_TEXTS, FIGURES_OF_TEXTS, curve_of_bits, text_shown

FIGURES = (
    Figure("bits", "bits per character", has_spread=True, digits=4),
    *FIGURES_OF_TEXTS,
)
ABOUT_FIGURES = (
    "Bits that a character of the test text takes, given those before it, exactly: less is better; of blocks by the "
    "first one, at the most noise. " + ABOUT_TEXTS
)
ABOUT_LEVELS = "How often training meets each noise level sigma, and which block answers for it."
ONE_EXAMPLE = "one sequence"
ABOUT_CURVE = "bits on text kept apart"
curve = curve_of_bits


class Step(nnx.Module):
    """One denoising step: a block with what it shares."""

    def __init__(self, shared: DBlockLlamaShared, block: DBlockLlamaBlock, sigma_data: float, sigma_min: float):
        self.shared, self.block, self.sigma_data, self.sigma_min = shared, block, sigma_data, sigma_min

    def __call__(self, tokens, z, sigma):
        """Logits."""
        return denoise(self.shared, self.block, tokens, z, sigma, sigma_data=self.sigma_data, sigma_min=self.sigma_min)


def step_of(task: NextToken, modules: tuple[Any, ...]) -> tuple[nnx.Module, tuple[Any, ...]]:
    """What one step runs, as one module, and arguments of it for one sequence."""
    tokens = jnp.zeros((1, task.card.length), jnp.int32)
    if task.is_plain:
        return modules[0], (tokens,)
    z = jnp.zeros((1, task.card.length, task.config.hidden_size))
    shared, block = modules
    return Step(shared, block, task.config.sigma_data, task.config.sigma_min), (tokens, z, jnp.ones(1))


def draw_levels(task: NextToken) -> dict[str, str]:
    """A picture of the noise of training, and of the levels that a token goes through."""
    if task.corruption is None:
        return {}
    levels = [float(sigma) for sigma in sampler_plan(task.config)[0]]
    return {"levels": charts.noise(task.corruption.noise, task.corruption.edges, levels)}


def data_shown(task: NextToken, data: Any) -> DataShown:
    """The text, for the page that is made before training."""
    del task
    return text_shown(data)

"""What a person wants to see of recurrent depth before it is trained, and of several runs side by side."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dblocks_jax.diffusion.precondition import precondition
from dblocks_jax.models.huginn import MEAN_STEPS, DBlockHuginnShared, Huginn, RecurrentTrunk
from dblocks_jax.pages import charts
from dblocks_jax.pages.figures import Figure
from dblocks_jax.pages.findings import DataShown
from dblocks_jax.tasks.recurrent.denoiser import denoise, read_out
from dblocks_jax.tasks.recurrent.task import Recurrent
from dblocks_jax.tasks.text_show import ABOUT_TEXTS, FIGURES_OF_TEXTS, curve_of_bits, text_shown

FIGURES = (
    Figure("bits", "bits per character", has_spread=True, digits=4),
    Figure("bits_first", "bits at the first level", has_spread=True, digits=4),
    *FIGURES_OF_TEXTS,
)
ABOUT_FIGURES = (
    "Bits that a character of the test text takes, given those before it, exactly: less is better; after all steps or "
    f"at the last noise level, and at the first one, where nothing is denoised yet. {ABOUT_TEXTS}"
)
ABOUT_LEVELS = "How often training meets each noise level sigma, and at which of them a token is looked at."
ONE_EXAMPLE = "one sequence"
ABOUT_CURVE = "bits on text kept apart"
curve = curve_of_bits


class Steps(nnx.Module):
    """Huginn at the mean number of steps."""

    def __init__(self, model: Huginn):
        self.model = model

    def __call__(self, tokens, state):
        """Logits."""
        return self.model.head(self.model.features(tokens, state, jnp.int32(MEAN_STEPS)))


class Pass(nnx.Module):
    """One denoising pass."""

    def __init__(self, shared: DBlockHuginnShared, trunk: RecurrentTrunk, sigma_data: float):
        self.shared, self.trunk, self.sigma_data = shared, trunk, sigma_data

    def __call__(self, tokens, z, sigma):
        """Logits."""
        c = precondition(sigma, self.sigma_data)
        return read_out(self.shared, denoise(self.shared, self.trunk, tokens, z, c), z, c)


def step_of(task: Recurrent, modules: tuple[Any, ...]) -> tuple[nnx.Module, tuple[jax.Array, ...]]:
    """What one step of training runs, as one module, and arguments of it for one sequence."""
    tokens = jnp.zeros((1, task.card.length), jnp.int32)
    z = jnp.zeros((*tokens.shape, task.config.hidden_size))
    if task.is_plain:
        return Steps(*modules), (tokens, z)
    shared, trunk = modules
    return Pass(shared, trunk, task.config.sigma_data), (tokens, z, jnp.ones(1))


def draw_levels(task: Recurrent) -> dict[str, str]:
    """A picture of the noise of training, and of the levels that a token goes through."""
    if task.corruption is None:
        return {}
    return {"levels": charts.noise(task.corruption.noise, task.corruption.edges, task.levels().tolist())}


def data_shown(task: Recurrent, data: Any) -> DataShown:
    """The text, for the page that is made before training."""
    del task
    return text_shown(data)

"""What a person wants to see of masked diffusion before it is trained, and of several runs side by side."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from dblocks_jax.data.pixels import GREY_LEVELS, Pixels
from dblocks_jax.models.conditioned import ConditionedBlock
from dblocks_jax.models.masked_transformer import MaskedShared, run_block
from dblocks_jax.pages import charts
from dblocks_jax.pages.figures import Figure
from dblocks_jax.pages.findings import DataShown
from dblocks_jax.tasks.image_show import images_shown
from dblocks_jax.tasks.mask.task import Mask
from dblocks_jax.tasks.text_show import ABOUT_TEXTS, FIGURES_OF_TEXTS, curve_of_bits, text_shown

FIGURES = (
    Figure("bits", "bits per character or dimension, at most", has_spread=True, digits=4),
    *FIGURES_OF_TEXTS,
)
ABOUT_FIGURES = (
    "Bits that a character of the test text takes at most, or a dimension of a test image: less is better. "
    + ABOUT_TEXTS
)
ABOUT_LEVELS = "How often training hides each share of a text or image, and which block answers for it."
ONE_EXAMPLE = "one sequence"
ABOUT_CURVE = "bits on data kept apart"
curve = curve_of_bits


class Step(nnx.Module):
    """One uncovering step: a block with what it shares."""

    def __init__(self, shared: MaskedShared, block: ConditionedBlock):
        self.shared, self.block = shared, block

    def __call__(self, tokens, is_hidden, level):
        """Logits."""
        return run_block(self.shared, self.block, tokens, is_hidden, level)


def step_of(task: Mask, modules: tuple[Any, ...]) -> tuple[nnx.Module, tuple[Any, ...]]:
    """What one step runs, as one module, and arguments of it for one sequence."""
    tokens = jnp.zeros((1, task.card.length), jnp.int32)
    return Step(*modules), (tokens, tokens == 0, jnp.ones(1))


def draw_levels(task: Mask) -> dict[str, str]:
    """A picture of how much is hidden for each block, and when the sampler looks, where nothing is given."""
    ranges = [(float(low), float(high)) for low, high in task.corruption.shares]
    return {"levels": charts.shares(ranges, task.corruption.levels(task.config.num_inference_steps).tolist())}


def data_shown(task: Mask, data: Any) -> DataShown:
    """The text, or the images that are seen as sequences, for the page that is made before training."""
    if not isinstance(data, Pixels):
        return text_shown(data)
    return images_shown(data.images, f"Each is a sequence of {task.card.length} of {GREY_LEVELS} grey levels.")

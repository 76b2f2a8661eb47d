"""A masked model as a program: (tokens int32 [b, t], which are hidden bool [b, t]) to logits float32 [b, t, symbols].

One step, not the whole sampler: whoever has logits can score a text, fill in what is missing, and make texts in any
order and at any temperature with a loop of five lines, where the whole sampler would only make texts. The share that is
hidden of each sequence decides which block answers for it. What tokens hold where they are hidden is not looked at.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from dblocks_jax.data.datasets import NAMES
from dblocks_jax.models.blueprint import Blueprint
from dblocks_jax.models.masked_transformer import run_block
from dblocks_jax.tasks.mask.bound import hidden_of_draw
from dblocks_jax.tasks.mask.task import Mask

PROGRAM = "uncover.stablehlo"
DIFFERENCE = "largest_difference_of_logits"
TOLERANCE = 1e-5  # of the logits of what was written, as a share of the largest
TRIED_SEQUENCES = 4


def inputs(task: Mask, count: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What the program takes, for `count` sequences."""
    shape = (count, task.card.length)
    return jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_)


def answerer(task: Mask, blueprint: Blueprint) -> Callable[..., Float[Array, "b t v"]]:
    """(parameters by part, tokens, which are hidden) -> logits, of each sequence by the block that owns its share.

    A block of which a batch has no sequence does not run, so that a sampler's step costs one block.
    """
    length, symbols = task.card.length, len(task.card.vocabulary)
    owners = np.array(task.corruption.owners(np.arange(length + 1) / length), np.int32)  # by how many are hidden

    def answer(params, tokens, is_hidden) -> Array:
        tokens, is_hidden = jnp.asarray(tokens), jnp.asarray(is_hidden)
        number = jnp.sum(is_hidden, axis=1)
        level, owner = number.astype(jnp.float32) / length, jnp.asarray(owners)[number]
        logits = jnp.zeros((*tokens.shape, symbols))
        for number_of_block in range(task.corruption.num_blocks):
            is_mine = owner == number_of_block
            together = [params[name] for name in blueprint.names(number_of_block)]

            def ask(logits, together=together, is_mine=is_mine):
                shared, block = blueprint.together(together)
                return jnp.where(is_mine[:, None, None], run_block(shared, block, tokens, is_hidden, level), logits)

            logits = jax.lax.cond(jnp.any(is_mine), ask, lambda logits: logits, logits)
        return logits

    return answer


def output(task: Mask, logits: Float[Array, "b t v"]) -> Float[Array, "b t v"]:
    """What the program returns of an answer."""
    del task
    return logits


def trials(task: Mask) -> list[tuple[np.ndarray, ...]]:
    """Inputs on which the program is tried: random symbols, of which more and more are hidden."""
    shape = (TRIED_SEQUENCES, task.card.length)
    tokens = np.random.default_rng(0).integers(0, len(task.card.vocabulary), shape, np.int32)
    return [(tokens, hidden_of_draw(0, *shape)), (tokens, np.ones(shape, bool))]


def difference(task: Mask, returned: np.ndarray, expected: np.ndarray) -> float:
    """Between what the program returned and the answer."""
    del task
    return float(np.abs(returned - expected).max())


def safe(card: Any) -> Any:
    """The card; a template that shows symbols escapes them."""
    return card


def describe(config: ConfigDict) -> str:
    """The model in words."""
    if config.num_blocks == 1:
        return "A plain masked diffusion transformer"
    return f"DiffusionBlocks of masked diffusion, {config.num_blocks} blocks"


def facts(config: ConfigDict, trained_on: str, scores: dict[str, Any]) -> dict[str, Any]:
    """What a model hub searches by. The scores stand on the card alone: none of them is one that hubs rank by."""
    del trained_on, scores
    blocks = ["diffusion-blocks"] if config.num_blocks > 1 else []
    return {
        "library_name": "dblocks_jax",
        "pipeline_tag": "unconditional-image-generation" if config.dataset in NAMES else "fill-mask",
        "tags": ["jax", "flax", "diffusion", "masked-diffusion", *blocks],
    }

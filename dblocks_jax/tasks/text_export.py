"""A decoder as a program: tokens int32 [b, t] to logits float32 [b, t - 1, symbols], those at i of token i + 1.

What is at the end changes nothing before it, so a shorter text is padded there with anything. The logits are those that
the task scores a text by, see its `logits_of`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from dblocks_jax.models.blueprint import Blueprint
from dblocks_jax.tasks.table import entry_of
from dblocks_jax.tasks.text_order import InOrder

PROGRAM = "decoder.stablehlo"
DIFFERENCE = "largest_difference_of_logits"
TOLERANCE = 1e-5  # of the logits of what was written, as a share of the largest
TRIED_SEQUENCES = 3


def inputs(task: InOrder, count: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What the program takes, for `count` sequences."""
    return (jax.ShapeDtypeStruct((count, task.card.length), jnp.int32),)


def answerer(task: InOrder, blueprint: Blueprint) -> Callable[..., Float[Array, "b n v"]]:
    """(parameters by part, tokens) -> logits of all tokens but the first."""
    logits_of = task.logits_of(blueprint)

    def answer(params, tokens) -> Array:
        tokens = jnp.asarray(tokens)
        together = tuple(params[name] for name in blueprint.names(0))
        return logits_of(together, tokens, jnp.zeros(tokens.shape[:1], jnp.int32))

    return answer


def output(task: InOrder, logits: Float[Array, "b n v"]) -> Float[Array, "b n v"]:
    """What the program returns of an answer."""
    del task
    return logits


def trials(task: InOrder) -> list[tuple[np.ndarray, ...]]:
    """Inputs on which the program is tried: random tokens."""
    shape = (TRIED_SEQUENCES, task.card.length)
    return [(np.random.default_rng(0).integers(0, len(task.card.vocabulary), shape, np.int32),)]


def difference(task: InOrder, returned: np.ndarray, expected: np.ndarray) -> float:
    """Between what the program returned and the answer."""
    del task
    return float(np.abs(returned - expected).max())


def safe(card: Any) -> Any:
    """The card; a template that shows symbols escapes them."""
    return card


def describe(config: ConfigDict) -> str:
    """The model in words."""
    words = entry_of(config).describe(config)
    return words[0].upper() + words[1:]


def facts(config: ConfigDict, trained_on: str, scores: dict[str, Any]) -> dict[str, Any]:
    """What a model hub searches by. The scores stand on the card alone: none of them is one that hubs rank by."""
    del trained_on, scores
    blocks = ["diffusion-blocks"] if config.model_type == "dblock" else []
    return {
        "library_name": "dblocks_jax",
        "pipeline_tag": "text-generation",
        "tags": ["jax", "flax", "decoder", *blocks],
    }

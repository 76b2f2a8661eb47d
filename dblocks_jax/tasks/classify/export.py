"""A classifier as a program of its own: uint8 images [b, h, w, c] to float32 logits [b, classes]."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from dblocks_jax.data.datasets import Card
from dblocks_jax.models.blueprint import Blueprint
from dblocks_jax.run.naming import shown
from dblocks_jax.tasks.classify.task import Classify

PROGRAM = "classifier.stablehlo"
DIFFERENCE = "largest_difference_of_logits"
TOLERANCE = 1e-5  # of the logits of what was written, as a share of the largest
TRIED_IMAGES = 3


def inputs(task: Classify, count: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What the program takes, for `count` images."""
    return (jax.ShapeDtypeStruct((count, *task.card.image_shape), jnp.uint8),)


def answerer(task: Classify, blueprint: Blueprint) -> Callable[..., Float[Array, "b classes"]]:
    """(parameters by part, images) -> logits, by the whole sampler."""
    classify = task.classifier(blueprint)
    return lambda params, images: classify(params, images, jnp.arange(images.shape[0], dtype=jnp.int32))[-1]


def output(task: Classify, logits: Float[Array, "b classes"]) -> Float[Array, "b classes"]:
    """What the program returns of an answer."""
    del task
    return logits


def trials(task: Classify) -> list[tuple[np.ndarray, ...]]:
    """Inputs on which the program is tried: random images."""
    return [(np.random.default_rng(0).integers(0, 256, (TRIED_IMAGES, *task.card.image_shape), np.uint8),)]


def difference(task: Classify, returned: np.ndarray, expected: np.ndarray) -> float:
    """Between what the program returned and the answer."""
    del task
    return float(np.abs(returned - expected).max())


def safe(card: Card) -> Card:
    """The card with names that can be shown."""
    return replace(card, class_names=tuple(map(shown, card.class_names)))


def describe(config: ConfigDict) -> str:
    """The model in words."""
    if config.model_type == "dblock":
        return f"DiffusionBlocks of {config.num_blocks} blocks"
    return "A plain vision transformer"


def facts(config: ConfigDict, trained_on: str, scores: dict[str, Any]) -> dict[str, Any]:
    """What a model hub searches by."""
    is_dblock = config.model_type == "dblock"
    found: dict[str, Any] = {
        "library_name": "dblocks_jax",
        "pipeline_tag": "image-classification",
        "tags": ["jax", "flax", "vision-transformer", *(["diffusion-blocks"] if is_dblock else [])],
    }
    if "top1" not in scores:
        return found
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"type": config.dataset, "name": trained_on, "split": "test"},
        "metrics": [{"type": "accuracy", "value": scores["top1"]}],
    }
    return found | {"metrics": ["accuracy"], "model-index": [{"name": "classifier", "results": [result]}]}

"""What a classifier came to believe of an image, step by step, in words."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from dblocks_jax.tasks.classify.classifier import sampler_plan

MOST_LABELS = 5


def describe_steps(config: ConfigDict) -> list[dict[str, Any]]:
    """The noise level and the block of each denoising step; for the plain model one step without either."""
    if config.model_type == "vit":
        return [{}]
    return [{"sigma": float(sigma), "block": block} for sigma, block in zip(*sampler_plan(config), strict=True)]


def describe(
    path: str, probabilities: Float[np.ndarray, "n classes"], class_names: Sequence[str], steps: list[dict[str, Any]]
) -> dict[str, Any]:
    """One image: the likeliest classes, and after each step what was believed and how likely the answer was."""
    final = probabilities[-1]
    best = np.argsort(-final, kind="stable")[:MOST_LABELS]
    by_step = [
        step
        | {
            "label": class_names[int(np.argmax(believed))],
            "probability": float(np.max(believed)),
            "probability_of_answer": float(believed[best[0]]),
        }
        for step, believed in zip(steps, probabilities, strict=True)
    ]
    top = [{"label": class_names[int(label)], "probability": float(final[label])} for label in best]
    return {"image": path, "top5": top, "by_step": by_step}

"""A classifier to play with: what it believes of a drawing or a picture after each denoising step."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dblocks_jax.data.datasets import Source
from dblocks_jax.data.images import read_image
from dblocks_jax.models.blueprint import Blueprint, Params
from dblocks_jax.pages import charts
from dblocks_jax.pages.pictures import base64_png, data_uri
from dblocks_jax.run.errors import NOT_FINITE, Diverged
from dblocks_jax.run.naming import shown
from dblocks_jax.tasks.classify.beliefs import MOST_LABELS, describe_steps
from dblocks_jax.tasks.classify.task import Classify
from dblocks_jax.tasks.demo import Demo, Frame, Wanted, bytes_of, kept

EXAMPLES = 12  # test images to choose from


def demo(task: Classify, blueprint: Blueprint, params: dict[str, Params], test: Source | None) -> Demo:
    """A request is {"image": a JPEG or PNG file in base64}; its answer has a frame for each denoising step."""
    card, classify, steps = task.card, task.classifier(blueprint), describe_steps(task.config)
    names, which = [shown(name) for name in card.class_names], kept(len(steps))

    def answer(wanted: Wanted) -> Iterator[Frame]:
        image = read_image(bytes_of(wanted, "image"), card.image_shape)
        logits = classify(params, jnp.asarray(image[None]), jnp.zeros(1, jnp.int32))
        probabilities = np.asarray(jax.nn.softmax(logits, axis=-1))[:, 0]
        if not np.isfinite(probabilities).all():
            raise Diverged(NOT_FINITE)
        for i, (step, believed) in enumerate(zip(steps, probabilities, strict=True)):
            best = np.argsort(-believed, kind="stable")[:MOST_LABELS]
            likeliest = [{"label": names[label], "probability": float(believed[label])} for label in best]
            if i in which:
                yield step | {"step": i + 1, "of": len(steps), "seen": data_uri(image), "likeliest": likeliest}

    nothing = {"image": base64_png(np.zeros(card.image_shape, np.uint8))}
    values = {
        "is_plain": task.is_plain,
        "is_grey": card.image_shape[2] == 1,
        "num_classes": len(names),
        "tints": charts.tints(task.config.num_blocks),
        "examples": [] if test is None else examples(test, names),
    }
    return Demo("demo_classify.html", values, [nothing], answer)


def examples(test: Source, names: list[str]) -> list[dict[str, Any]]:
    """Some test images and what they show, evenly from the whole split."""
    places = np.unique(np.linspace(0, len(test) - 1, EXAMPLES).astype(int))
    return [
        {"picture": data_uri(image), "label": names[label]}
        for image, label in zip(test.images(places), test.labels[places], strict=True)
    ]

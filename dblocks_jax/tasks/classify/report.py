"""What a person wants to see of a trained classifier: where it errs, and what each denoising step believed."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from dblocks_jax.data.datasets import Dataset, Source, Subset
from dblocks_jax.models.blueprint import Blueprint, Params
from dblocks_jax.pages import charts
from dblocks_jax.pages.findings import Findings, block_curves
from dblocks_jax.pages.pictures import data_uri
from dblocks_jax.tasks.classify.beliefs import describe, describe_steps
from dblocks_jax.tasks.classify.classifier import Classifier, sampler_plan
from dblocks_jax.tasks.classify.config import num_inference_steps
from dblocks_jax.tasks.classify.scores import answers, metrics
from dblocks_jax.tasks.classify.task import Classify

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)  # of denoising steps, to be tried
IMAGES_FOR_COUNTS = 2000  # at most, evenly spaced in the test split
SHOWN_RIGHT, SHOWN_WRONG = 8, 16
WORST_CLASSES = 10


def look(
    task: Classify,
    blueprint: Blueprint,
    params: dict[str, Params],
    data: Dataset,
    mesh: Mesh,
    lines: list[dict[str, Any]],
) -> Findings:
    """Score a classifier on its test split, and choose what is shown of it. `lines` are those of its log.

    Where its answers are not finite, the scores say so, and there is nothing to be shown.
    """
    config, class_names = task.config, task.card.class_names
    test: Any = data.split("test")
    classify = task.classifier(blueprint)
    believed, logits = answers(classify, params, test, batch_size=config.eval_batch_size, mesh=mesh)
    found = metrics(believed, logits, test.labels)
    if "diverged" in found:
        return Findings(found, {}, {}, {})
    has_sampler = not task.is_plain and config.answer == "sampler"
    by_count = {} if not has_sampler else accuracy_by_count(config, classify, params, test, mesh)
    steps = describe_steps(config)
    right, wrong = choose(believed[-1], logits, test.labels)
    pixels = test.images(np.array([*right, *wrong]))
    seen = classify(params, jax.numpy.asarray(pixels), jax.numpy.array([*right, *wrong], np.int32))
    shown = examples([*right, *wrong], pixels, test.labels, np.asarray(jax.nn.softmax(seen, -1)), class_names, steps)
    matrix = confusion_matrix(test.labels, believed[-1], len(class_names))
    values = {
        "images_for_counts": min(len(test), IMAGES_FOR_COUNTS),
        "worst": worst_classes(matrix, class_names),
        "right": shown[: len(right)],
        "wrong": shown[len(right) :],
        "steps": steps,
        "guessing": math.log(len(class_names)),
    }
    drawn = {"confusion": charts.confusion(matrix, class_names), **draw(task, lines, found, steps, by_count)}
    return Findings(found, values, drawn, {"accuracy_by_num_steps": by_count})


def draw(
    task: Classify,
    lines: list[dict[str, Any]],
    found: dict[str, Any],
    steps: list[dict[str, Any]],
    by_count: dict[int, float],
) -> dict[str, str]:
    """Curves over the training steps, and bars over the denoising steps."""
    num_blocks = None if task.is_plain else task.config.num_blocks
    drawn = {}
    if any("blocks" in line for line in lines):
        drawn["ce"] = block_curves(lines, "ce", "cross-entropy, in nats", num_blocks)
        drawn["accuracy"] = block_curves(lines, "accuracy", "accuracy on training batches", num_blocks)
    if num_blocks is not None:
        blocks = [step["block"] for step in steps]
        drawn["by_step"] = charts.by_denoising_step(found["accuracy_by_step"], blocks, num_blocks)
    if by_count:
        drawn["by_count"] = charts.by_num_steps({"": by_count}, [charts.ACCENT])
    return drawn


def accuracy_by_count(
    config: ConfigDict, classify: Classifier, params: dict[str, Params], test: Source, mesh: Mesh
) -> dict[int, float]:
    """The number of denoising steps -> accuracy, on IMAGES_FOR_COUNTS images."""
    some = Subset(test, np.unique(np.linspace(0, len(test) - 1, min(len(test), IMAGES_FOR_COUNTS)).astype(int)))
    accuracies = {}
    for count in sorted({*COUNTS, num_inference_steps(config)}):
        plan = sampler_plan(ConfigDict({**config.to_dict(), "num_inference_steps": count}))
        planned = partial(classify, plan=plan)
        believed, _ = answers(planned, params, some, batch_size=config.eval_batch_size, mesh=mesh)
        accuracies[count] = float(np.mean(believed[-1] == some.labels))
    return accuracies


def choose(
    answered: Int[np.ndarray, " n"], logits: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"]
) -> tuple[Sequence[int], Sequence[int]]:
    """(images that are classified rightly, spread over the split; those most confidently classified wrongly)."""
    right, wrong = np.flatnonzero(answered == labels), np.flatnonzero(answered != labels)
    spread = np.linspace(0, len(right) - 1, min(SHOWN_RIGHT, len(right))).astype(int)
    shifted = logits - logits.max(axis=1, keepdims=True)
    confidence = 1 / np.exp(shifted).sum(axis=1)  # the largest probability
    return right[spread].tolist(), wrong[np.argsort(-confidence[wrong], kind="stable")][:SHOWN_WRONG].tolist()


def confusion_matrix(
    labels: Int[np.ndarray, " n"], answered: Int[np.ndarray, " n"], num_classes: int
) -> Int[np.ndarray, "classes classes"]:
    """How often each class (row) was taken for each (column)."""
    from sklearn.metrics import confusion_matrix as count

    return count(labels, answered, labels=range(num_classes))


class WorstClass(NamedTuple):
    name: str
    images: int
    found: float  # share of its images that were recognised
    taken_for: str  # the most frequent mistake
    times: int


def worst_classes(matrix: Int[np.ndarray, "classes classes"], class_names: Sequence[str]) -> list[WorstClass]:
    """Those with the smallest share of images recognised, among those with a mistake."""
    classes = []
    for row, counts in enumerate(matrix):
        mistakes = np.where(np.arange(len(counts)) == row, 0, counts)
        if mistakes.any():
            most = int(np.argmax(mistakes))
            share = counts[row] / counts.sum()
            classes.append(
                WorstClass(class_names[row], int(counts.sum()), float(share), class_names[most], int(mistakes[most]))
            )
    return sorted(classes, key=lambda each: each.found)[:WORST_CLASSES]


def examples(
    indices: Sequence[int],
    pixels: np.ndarray,
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "steps m classes"],
    class_names: Sequence[str],
    steps: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Images of a split by their `indices`: the truth, and what each denoising step believed of each."""
    return [
        describe(f"image {index}", probabilities[:, i], class_names, steps)
        | {"pixels": data_uri(pixels[i]), "truth": class_names[labels[index]]}
        for i, index in enumerate(indices)
    ]

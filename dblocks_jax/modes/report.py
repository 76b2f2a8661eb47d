"""`--mode=report`: one page about a run, which explains itself to a stranger."""

import math
import platform
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from dblocks_jax.data.datasets import Source, Subset
from dblocks_jax.modes.evaluate import find_data, how_scored
from dblocks_jax.modes.load import Classifier, load_run, only
from dblocks_jax.modes.memory import step_memory, variant
from dblocks_jax.modes.predict import describe, describe_steps
from dblocks_jax.pages import charts
from dblocks_jax.pages.pictures import data_uri
from dblocks_jax.pages.template import write_page
from dblocks_jax.run.devices import make_mesh
from dblocks_jax.run.errors import NOT_FINITE, Diverged
from dblocks_jax.run.workdir import STARTS, logged, read_lines
from dblocks_jax.tasks.classify.classifier import sampler_plan
from dblocks_jax.tasks.classify.config import num_inference_steps
from dblocks_jax.tasks.classify.scores import answers, metrics
from dblocks_jax.tasks.classify.task import CLASSIFY
from dblocks_jax.training.config import arithmetic
from dblocks_jax.training.overview import describe_shares, num_parameters

PAGE = "report.html"
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)  # of denoising steps, to be tried
IMAGES_FOR_COUNTS = 2000  # at most, evenly spaced in the test split
SHOWN_RIGHT, SHOWN_WRONG = 8, 16
WORST_CLASSES = 10


def report(config: ConfigDict, workdir: Path, *, overrides: dict[str, Any], checkpoint: str) -> dict[str, Any]:
    """Score a run on its test split, look at it from all sides, and write PAGE into its folder.

    Raises:
      UserError: there is no such run or checkpoint, or its data cannot be had.
      Diverged: its answers are not finite.
      Unsaved: the page cannot be written.
    """
    mesh = make_mesh()
    loaded, run = load_run(workdir, checkpoint=checkpoint, config=config, overrides=overrides, mesh=mesh)
    trained = Classifier(only(CLASSIFY, loaded, workdir))
    test: Any = find_data(loaded, run, named=config, where=str(workdir)).split("test")
    config = trained.config
    with arithmetic(config):
        believed, logits = answers(
            trained.classify, trained.params, test, batch_size=config.eval_batch_size, mesh=mesh
        )  # fmt: skip
        found = metrics(believed, logits, test.labels)
        if "diverged" in found:
            raise Diverged(f"{workdir}: {NOT_FINITE}")
        by_count = accuracy_by_count(trained, test, mesh)
    steps = describe_steps(config)
    right, wrong = choose(believed[-1], logits, test.labels)
    shown = examples(trained, test, [*right, *wrong], steps)
    matrix = confusion_matrix(test.labels, believed[-1], len(trained.card.class_names))
    lines = [line for line in logged(workdir) if "blocks" in line]
    page = {
        "name": workdir.name,
        "config": config.to_dict(),
        "metrics": found,
        "step": trained.step,
        "parameters": {name: num_parameters(part) for name, part in trained.params.items()},
        "images": run["data"].get("images"),
        "noise_ranges": describe_shares(loaded.task),
        "class_names": trained.card.class_names,
        "charts": draw(config, lines, found, steps, by_count, matrix, trained),
        "by_count": by_count,
        "images_for_counts": min(len(test), IMAGES_FOR_COUNTS),
        "worst": worst_classes(matrix, trained.card.class_names),
        "right": shown[: len(right)],
        "wrong": shown[len(right) :],
        "steps": steps,
        "guessing": math.log(len(trained.card.class_names)),
        "starts": read_starts(workdir),
        "here": {"python": platform.python_version(), "jax": jax.__version__, "device": jax.devices()[0].device_kind},
        "skipped": sum(run.get("skipped", {}).get("total", {}).values()),
    }
    path = write_page(workdir / PAGE, page)
    return {
        "mode": "report",
        "workdir": str(workdir),
        "checkpoint": trained.step,
        "page": str(path),
        "split": "test",
        **found,
        "accuracy_by_num_steps": by_count,
        **how_scored(loaded),
    }


def accuracy_by_count(trained: Classifier, test: Source, mesh: Any) -> dict[int, float]:
    """The number of denoising steps -> accuracy, on IMAGES_FOR_COUNTS images; nothing for the plain model."""
    if trained.config.model_type == "vit":
        return {}
    some = Subset(test, np.unique(np.linspace(0, len(test) - 1, min(len(test), IMAGES_FOR_COUNTS)).astype(int)))
    accuracies = {}
    for count in sorted({*COUNTS, num_inference_steps(trained.config)}):
        plan = sampler_plan(ConfigDict({**trained.config.to_dict(), "num_inference_steps": count}))
        classify = partial(trained.classify, plan=plan)
        believed, _ = answers(classify, trained.params, some, batch_size=trained.config.eval_batch_size, mesh=mesh)
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
    trained: Classifier, test: Source, indices: Sequence[int], steps: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Test images, at least one: the truth, and what each denoising step believed of each."""
    pixels = test.images(np.array(indices))
    with arithmetic(trained.config):
        logits = trained.classify(trained.params, jax.numpy.asarray(pixels), jax.numpy.array(indices, np.int32))
    probabilities, names = np.asarray(jax.nn.softmax(logits, -1)), trained.card.class_names
    return [
        describe(f"image {index}", probabilities[:, i], names, steps)
        | {"pixels": data_uri(pixels[i]), "truth": names[test.labels[index]]}
        for i, index in enumerate(indices)
    ]


def read_starts(workdir: Path) -> list[dict[str, Any]]:
    """When and how the run was started; lines that are none of ours are left out."""
    kinds = {"time": str, "command": list, "devices": list, "host": str, "python": str, "versions": dict}
    starts = read_lines(workdir / STARTS)
    return [start for start in starts if all(isinstance(start.get(name), kind) for name, kind in kinds.items())]


def draw(
    config: ConfigDict,
    lines: list[dict[str, Any]],
    found: dict[str, Any],
    steps: list[dict[str, Any]],
    by_count: dict[int, float],
    matrix: Int[np.ndarray, "classes classes"],
    trained: Classifier,
) -> dict[str, str]:
    """The page's pictures by name."""
    names = sorted({block for line in lines for block in line["blocks"]}, key=int)
    is_dblock = config.model_type == "dblock"
    colors = [charts.block_colors(config.num_blocks if is_dblock else 1)[int(name)] for name in names]

    def curves(metric: str, ylabel: str) -> str:
        series = {}
        for name in names:
            of_block = [(line["step"], line["blocks"][name].get(metric)) for line in lines if name in line["blocks"]]
            series[f"block {name}" if is_dblock else "model"] = tuple(zip(*of_block, strict=True))
        return charts.over_steps(series, colors, ylabel)

    drawn = {"confusion": charts.confusion(matrix, trained.card.class_names), "memory": _draw_memory(trained)}
    if lines:
        drawn |= {"loss": curves("loss", "loss"), "ce": curves("ce", "cross-entropy, in nats")}
        drawn |= {"accuracy": curves("accuracy", "accuracy on training batches")}
    if is_dblock:
        noise: Any = trained.trained.task.corruption
        drawn["noise"] = charts.noise(noise.noise, noise.edges, [step["sigma"] for step in steps])
        blocks = [step["block"] for step in steps]
        drawn["by_step"] = charts.by_denoising_step(found["accuracy_by_step"], blocks, config.num_blocks)
        drawn["by_count"] = charts.by_num_steps({"": by_count}, [charts.ACCENT])
    return drawn


def _draw_memory(trained: Classifier) -> str:
    """The plain model's training step beside that of the blocks, on one device, as `--mode=memory` computes it."""
    rows = {}
    config, entry = trained.config, trained.trained.entry
    for name, plain in (("plain", True), ("DiffusionBlocks", False)):
        if not plain and config.model_type == "vit":
            continue
        row = variant(entry, config, plain=plain, remat=config.gradient_checkpointing)
        needed = step_memory(entry, row, trained.card)
        rows[name] = {
            "parameters": needed.parameters,
            "moments": needed.optimizer,
            "gradients": needed.gradients,
            "activations": needed.activations,
        }
    return charts.memory(rows)

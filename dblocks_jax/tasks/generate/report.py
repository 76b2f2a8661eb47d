"""What a person wants to see of a trained generator: samples, what each block decides of them, and whether they are
copies."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

from dblocks_jax.data.datasets import Dataset
from dblocks_jax.models.blueprint import Blueprint, Params
from dblocks_jax.pages.findings import Findings, block_curves, held_out_picture
from dblocks_jax.pages.pictures import data_uri
from dblocks_jax.tasks.generate.config import LATENTS
from dblocks_jax.tasks.generate.pixels import to_pixels
from dblocks_jax.tasks.generate.sampler import Sampler, make_sampler, sampler_plan
from dblocks_jax.tasks.generate.scores import Made
from dblocks_jax.tasks.generate.task import Generate

CLASSES, OF_A_CLASS = 20, 10  # samples that are shown
FOLLOWED = 8  # samples that are shown after each block
PAIRS = 8  # of a sample and the training image nearest to it
# Distances between distributions: (figure, in words). Each has a "_floor" and a "_ceiling".
DISTANCES = (
    ("frechet_judge", "Fréchet distance in the judge's features"),
    ("kid_judge", "kernel distance (KID's estimator) in the judge's features"),
    ("frechet_pixels", "Fréchet distance in principal components of the pixels"),
    ("kid_pixels", "kernel distance in principal components of the pixels"),
)


class Stage(NamedTuple):
    """What a block leaves to the next: its estimate D at the last level that it was asked at."""

    block: int
    sigma: float  # that level
    levels: int  # how many it was asked at
    denoised: Float[np.ndarray, "b h w c"]


def look(
    task: Generate,
    blueprint: Blueprint,
    params: dict[str, Params],
    data: Dataset,
    found: dict[str, Any],
    made: Made | None,
    lines: list[dict[str, Any]],
) -> Findings:
    """Choose what is shown of a generator. `found` are its scores, `made` the samples they are of, if any were made.

    `lines` are those of its log. Latents are nothing to look at: only curves and figures are shown of them.
    """
    config, class_names = task.config, task.card.class_names
    has_pixels = config.dataset != LATENTS
    values: dict[str, Any] = {
        "samples": {}, "stages": [], "pairs": [], "cfg_scale": config.cfg_scale,
        "distances": [row for name, words in DISTANCES if (row := distance_row(found, name, words))],
    }  # fmt: skip
    if has_pixels:
        sampler = make_sampler(config, blueprint, task.card)
        labels = one_of_each(len(class_names)) if made is None else made.labels
        followed = first_of_each(labels, FOLLOWED)
        stages = after_each_block(task, sampler, params, followed.astype(np.int32), labels[followed])
        values["stages"] = [stage._replace(denoised=show(stage.denoised)) for stage in stages]
        images = to_images(stages[-1].denoised) if made is None else made.images
        values["samples"] = by_class(images, labels, class_names)
        values["followed"] = [class_names[label] for label in labels[followed]]
    if made is not None:
        values["pairs"] = closest_pairs(made, data.split("train"), class_names)
    return Findings(found, values, draw(lines, config.num_blocks), {})


def draw(lines: list[dict[str, Any]], num_blocks: int) -> dict[str, str]:
    """Curves over the training steps."""
    drawn = {}
    if any("blocks" in line for line in lines):
        drawn["error"] = block_curves(lines, "error", "squared error on training batches", num_blocks)
    return drawn | held_out_picture(lines, "loss", "loss on images kept apart")


def distance_row(found: dict[str, Any], name: str, words: str) -> dict[str, Any] | None:
    """A distance between where real test images and where noise would be; None where it was not measured."""
    if name not in found:
        return None
    spread = found.get(f"{name}_spread") if name.startswith("kid") else None
    ends = {end: found[f"{name}_{end}"] for end in ("floor", "ceiling")}
    return {"words": words, "value": found[name], "spread": spread, **ends}


def one_of_each(num_classes: int) -> Int[np.ndarray, " n"]:
    """A label for each class that there is room for."""
    return np.arange(min(num_classes, FOLLOWED), dtype=np.int32)


def first_of_each(labels: Int[np.ndarray, " n"], count: int) -> Int[np.ndarray, " m"]:
    """Where the first samples of at most `count` classes lie."""
    _, places = np.unique(labels, return_index=True)
    return np.sort(places)[:count]


def after_each_block(
    task: Generate,
    sampler: Sampler,
    params: dict[str, Params],
    positions: Int[np.ndarray, " b"],
    labels: Int[np.ndarray, " b"],
) -> list[Stage]:
    """What each block that the sampler asks leaves to the next; the last one's is the sample."""
    sigmas, owners = sampler_plan(task.config)
    last_of = {owner: level for level, owner in enumerate(owners)}
    stages = []
    for level, (denoised, _) in enumerate(sampler(params, positions, labels, task.config.cfg_scale)):
        owner = owners[level]
        if level == last_of[owner]:
            stages.append(Stage(owner, float(sigmas[level]), owners.count(owner), jax.device_get(denoised)))
    return stages


def to_images(signal: Float[np.ndarray, "b h w c"]) -> UInt8[np.ndarray, "b h w c"]:
    """What is denoised, as pixels."""
    return np.asarray(to_pixels(jax.numpy.asarray(signal)))


def show(signal: Float[np.ndarray, "b h w c"]) -> Any:
    """What is denoised, as pictures for a page."""
    return [data_uri(pixels) for pixels in to_images(signal)]


def by_class(
    images: UInt8[np.ndarray, "n h w c"], labels: Int[np.ndarray, " m"], class_names: tuple[str, ...]
) -> dict[str, list[str]]:
    """The first images of the first classes, as pictures for a page."""
    found = {}
    for label in np.unique(labels)[:CLASSES]:
        places = np.flatnonzero(labels == label)[:OF_A_CLASS]
        found[class_names[label]] = [data_uri(images[place]) for place in places]
    return found


def closest_pairs(made: Made, train: Any, class_names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The samples that are nearest to a training image, beside it, the nearest first."""
    pairs = []
    for sample, image in made.copies.closest(PAIRS):
        real = train.take(np.array([image]))
        pairs.append(
            {
                "sample": data_uri(made.images[sample]),
                "wanted": class_names[made.labels[sample]],
                "image": data_uri(real["image"][0]),
                "index": int(image),
                "truth": class_names[real["label"][0]],
                "distance": float(made.copies.to_train[sample]),
            }
        )
    return pairs

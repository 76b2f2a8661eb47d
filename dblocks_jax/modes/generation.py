"""Scores of generated images: how their distribution differs from the data's, whether they are of the class asked for,
and whether they are copies. None is called FID: the features are not Inception's."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Num

from dblocks_jax.modes.judge import find_judge
from dblocks_jax.modes.load import Trained
from dblocks_jax.modes.sample import check_scale, make_images, share_out
from dblocks_jax.run.errors import Diverged
from dblocks_jax.run.files import saving
from dblocks_jax.tasks.generate.config import LATENTS
from dblocks_jax.tasks.generate.pictures import write_grid
from dblocks_jax.tasks.generate.scores import (
    Made,
    Moments,
    frechet_distance,
    kernel_distance,
    nearest,
    noised,
    pixel_features,
)

PICTURE = "samples.png"
A_CLASS, CLASSES = 8, 12  # of the picture: images of a class in a row, and rows


class Scored(NamedTuple):
    """What came of scoring samples: nothing but an empty `figures` where none are asked for."""

    figures: dict[str, Any]
    made: Made | None


def sample_and_score(trained: Trained, data: Any, workdir: Path) -> Scored:
    """Make `score_samples` images, of all classes alike, score them, and write PICTURE into the workdir.

    Distances are to the training images; beside each stand "floor", that of the test images, and "ceiling", that of
    noised test images. Images that are not finite have no score: the figures say "diverged".
    """
    config, card = trained.config, trained.card
    count = config.score_samples
    if count == 0:
        return Scored({}, None)
    if config.dataset == LATENTS:
        logging.warning("samples of latents are not scored here: decode those of --mode=sample and score the images")
        return Scored({}, None)
    train, test = data.split("train"), data.split("test")
    labels = share_out(range(len(card.class_names)), count)
    try:
        images = make_images(trained, labels, check_scale(config.cfg_scale))
    except Diverged:
        return Scored({"diverged": True}, None)
    rows = [np.flatnonzero(labels == label)[:A_CLASS] for label in range(min(CLASSES, len(card.class_names)))]
    columns = min(map(len, rows))
    picture = workdir / PICTURE
    if columns:
        with saving(picture):
            write_grid(picture, images[np.concatenate([row[:columns] for row in rows])], columns)
        logging.info("samples by class: %s", picture)
    real, held_out = train.images(np.arange(len(train))), test.images(np.arange(len(test)))
    judge = find_judge(config, card, len(train), workdir.parent)
    spoiled = noised(held_out)
    features, answers = judge(images)
    found: dict[str, Any] = {
        "num_samples": count,
        "sampled_with": {name: config[name] for name in ("num_inference_steps", "solver", "cfg_scale")},
        "judge": judge.describe(),
        "accuracy_of_samples": float(np.mean(answers == labels)),
        **({"picture": str(picture)} if columns else {}),
    }
    found |= distances("judge", features, *(judge(each)[0] for each in (real, held_out, spoiled)))
    components = pixel_features(real)
    found |= distances("pixels", *(components(each) for each in (images, real, held_out, spoiled)))
    copies = nearest(images, real, held_out)
    found |= {
        "nearest_ratio": copies.ratio,
        "nearest_ratio_expected": copies.expected_ratio,
        "share_of_close_samples": copies.share_close,
    }
    return Scored(found, Made(images, labels, copies))


def distances(
    name: str,
    samples: Num[np.ndarray, "n k"],
    train: Num[np.ndarray, "t k"],
    test: Num[np.ndarray, "m k"],
    spoiled: Num[np.ndarray, "m k"],
) -> dict[str, Any]:
    """Frechet and kernel distance of features to those of the training images, with floor and ceiling."""
    reference = Moments.of(train)
    found: dict[str, Any] = {}
    for suffix, features in (("", samples), ("_floor", test), ("_ceiling", spoiled)):
        kernel = kernel_distance(features, train)
        found[f"frechet_{name}{suffix}"] = frechet_distance(Moments.of(features), reference)
        found[f"kid_{name}{suffix}"] = float(kernel.mean)
        found[f"kid_{name}{suffix}_spread"] = float(kernel.spread)
    return found

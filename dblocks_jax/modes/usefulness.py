"""What generated images are good for: a classifier that has seen nothing else, on real test images."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

from dblocks_jax.data.datasets import ArraySource, Source
from dblocks_jax.modes.judge import judge_config
from dblocks_jax.run.errors import UserError
from dblocks_jax.run.processes import are_several
from dblocks_jax.tasks.classify.task import CLASSIFY
from dblocks_jax.tasks.generate.config import LATENTS
from dblocks_jax.tasks.generate.task import GENERATE
from dblocks_jax.tasks.task import Entry
from dblocks_jax.training import loop


def check_trains_on_samples(entry: Entry, config: ConfigDict) -> None:
    """Refuse where there will be no samples to train on, before any are made.

    Raises:
      UserError: the run does not generate images, none are asked for, or several processes score.
    """
    if entry is not GENERATE or config.dataset == LATENTS:
        raise UserError("--train_on_samples is for runs that generate images")
    if config.score_samples == 0:
        raise UserError("--train_on_samples needs samples: set score_samples, such as --config.score_samples=1000")
    if are_several():
        raise UserError("--train_on_samples is for one process: leave out --distributed")


def train_on_samples(
    config: ConfigDict, data: Any, images: UInt8[np.ndarray, "n h w c"], labels: Int[np.ndarray, " n"]
) -> dict[str, Any]:
    """Accuracies on the test split of the classifier that the judge is, trained anew: on samples, and on real images.

    Both are trained alike, on `num_trained_on` images: as many samples as there are, or training images if these are
    fewer, drawn at random. `accuracy_trained_on_real` is what that many images allow; samples that are as good as
    training images have the same.
    """
    train = data.split("train")
    count = min(len(images), len(train))
    made, real = drawn(len(images), count), drawn(len(train), count)
    sources = {
        "samples": ArraySource(images[made], labels[made].astype(np.int32)),
        "real": ArraySource(train.images(real), train.labels[real]),
    }
    found: dict[str, Any] = {"num_trained_on": count}
    for name, source in sources.items():
        logging.info("training a classifier on %s images: %s", f"{count:,}", name)
        found[f"accuracy_trained_on_{name}"] = accuracy_after_training(config, data, source)
    return found


def drawn(of: int, count: int) -> Int[np.ndarray, " count"]:
    """Which `count` of so many, ascending: the same every time."""
    return np.sort(np.random.default_rng(0).choice(of, count, replace=False))


def accuracy_after_training(config: ConfigDict, data: Any, source: Source) -> float:
    """Of the judge's network and training, on `source` in place of the training images. Nothing of it is kept."""
    instead = replace(data, load={"train": source, "val": None, "test": data.split("test")}.__getitem__)
    entry = replace(CLASSIFY, find_data=lambda config: instead)
    with TemporaryDirectory(prefix="dblocks_jax_") as folder:
        return loop.train(entry, judge_config(config, len(source)), Path(folder) / "run")["top1"]

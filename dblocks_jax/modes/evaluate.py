"""Score a classifier on a split: every image exactly once, whatever the batch size."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from dblocks_jax.data.batches import eval_batches
from dblocks_jax.data.datasets import Source
from dblocks_jax.modes.load import Trained, load_run
from dblocks_jax.run.devices import DATA, gather, make_mesh, shard
from dblocks_jax.run.processes import check_alike, first_process_first
from dblocks_jax.training.build import Classifier, summarize
from dblocks_jax.training.config import (
    ARITHMETIC_FIELDS,
    SAMPLER_FIELDS,
    arithmetic,
    check_same_data,
    find_dataset,
    image_dropout,
)
from dblocks_jax.training.optimizer import Params


def evaluate_run(config: ConfigDict, workdir: Path, *, overrides: dict[str, Any], checkpoint: str) -> dict[str, Any]:
    """Score a saved run on its test split: `checkpoint` is "best", "last" or a step.

    Raises:
      UserError: there is no such run or checkpoint, or an override contradicts it.
    """
    mesh = make_mesh()
    trained, run = load_run(workdir, checkpoint=checkpoint, config=config, overrides=overrides, mesh=mesh)
    test = find_test_split(trained, run, named=config, where=str(workdir))
    with arithmetic(trained.config):
        size = trained.config.eval_batch_size
        found = metrics(*answers(trained.classify, trained.params, test, batch_size=size, mesh=mesh), test.labels)
    result = {"mode": "eval", "workdir": str(workdir), "checkpoint": trained.step, "split": "test", **found}
    return result | how_scored(trained.config)


def how_scored(config: ConfigDict) -> dict[str, Any]:
    """On what, and with which of the fields that evaluation may choose."""
    return {
        "data_dir": config.data_dir,
        "arithmetic": {field: config[field] for field in ARITHMETIC_FIELDS},
        "sampler": {field: config[field] for field in SAMPLER_FIELDS if config.model_type == "dblock"},
    }


def find_test_split(trained: Trained, run: dict[str, Any], *, named: ConfigDict, where: str) -> Source:
    """The test images of a saved run, checked to be of the classes that it was trained on. `named` is the command's.

    Raises:
      UserError: they cannot be had, or are others.
    """
    config = trained.config
    check_alike("command", (config.to_dict(), trained.step))
    with first_process_first("data"):
        # A checkpoint may be a stranger's: it cannot choose what is written where.
        dataset = find_dataset(config, may_prepare=config.data_dir == named.data_dir)
    check_same_data(run["data"], {"class_names": list(dataset.class_names)}, where)
    if config.cfg_scale > 0 and image_dropout(ConfigDict(run["config"])) == 0:
        logging.warning("guidance asks the model about blank images, but it was trained without any: cfg_scale was 0")
    return dataset.split("test")


def answers(
    classify: Classifier,
    params: dict[str, Params],
    source: Source,
    *,
    batch_size: int,
    mesh: Mesh,
    at_each_batch: Callable[[], None] = lambda: None,
) -> tuple[Int[np.ndarray, "n images"], Float[np.ndarray, "images classes"]]:
    """(the label each step believes, the last step's logits) for every image of a split, in its order.

    The batch is rounded up to a multiple of the devices. Each process reads and classifies its part of a batch, and
    gets the results of all. What `at_each_batch` raises ends it.
    """
    count = mesh.shape[DATA]
    batch_size = math.ceil(min(batch_size, len(source)) / count) * count
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    results = []
    for batch in eval_batches(source, batch_size=batch_size, **share):
        at_each_batch()
        on_device = shard({name: batch[name] for name in ("image", "position")}, mesh)
        logits = classify(params, on_device["image"], on_device["position"])
        results.append(gather(summarize(logits), mesh))
        if len(results) > 2:  # the device works on two batches while earlier results come home
            results[-3] = jax.device_get(results[-3])
    results = jax.device_get(results)
    # Results are in the order of the split; what fills the last batch is at the end.
    believed = np.concatenate([labels for labels, _ in results], axis=1)[:, : len(source)]
    logits = np.concatenate([logits for _, logits in results])[: len(source)]
    return believed, logits


def metrics(
    believed: Int[np.ndarray, "n images"],
    logits: Float[np.ndarray, "images classes"],
    labels: Int[np.ndarray, " images"],
) -> dict[str, Any]:
    """Scores in [0, 1] and cross-entropy in nats, from each step's labels and the last step's logits.

    top1, top5 (of equal logits the lower label ranks first), macro_f1 (the mean over all classes), cross_entropy,
    accuracy_by_step (its last entry is top1), num_images. An image whose logits are not all finite has no answer, and
    so a wrong one: then there is "diverged" too, and cross_entropy is not a number.
    """
    from sklearn.metrics import f1_score

    num_classes = logits.shape[1]
    is_sound = np.isfinite(logits).all(axis=1)
    logits = np.where(is_sound[:, None], logits, 0.0)
    believed = np.concatenate([believed[:-1], np.where(is_sound, believed[-1], -1)[None]])
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    log_probs[~is_sound] = np.nan
    top5 = np.where(is_sound[:, None], np.argsort(-logits, axis=1, kind="stable")[:, :5], -1)
    found = {
        "num_images": len(labels),
        "top1": float(np.mean(believed[-1] == labels)),
        "top5": float(np.mean((top5 == labels[:, None]).any(axis=1))),
        "macro_f1": float(f1_score(labels, believed[-1], labels=range(num_classes), average="macro", zero_division=0)),
        "cross_entropy": float(-np.mean(log_probs[np.arange(len(labels)), labels])),
        "accuracy_by_step": [float(accuracy) for accuracy in np.mean(believed == labels, axis=1)],
    }
    return found if is_sound.all() else found | {"diverged": True}

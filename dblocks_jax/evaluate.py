"""Score a classifier on a split: every image exactly once, whatever the batch size."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from dblocks_jax.build import Blueprint, Classifier, make_classifier, new_model, summarize
from dblocks_jax.checkpoint import FOLDER, Checkpoints
from dblocks_jax.config import (
    SAMPLER_FIELDS,
    architecture,
    arithmetic,
    check_config,
    check_same_data,
    find_dataset,
    for_evaluation,
    image_dropout,
    rest_on_host,
    trained_blocks,
)
from dblocks_jax.data import eval_batches
from dblocks_jax.datasets import Source
from dblocks_jax.devices import DATA, gather, make_mesh, on_cpu, replicate, shard
from dblocks_jax.errors import Unusable, UserError
from dblocks_jax.optimizer import Params
from dblocks_jax.processes import check_alike, first_process_first
from dblocks_jax.workdir import scores


def evaluate_run(config: ConfigDict, workdir: Path, *, overrides: dict[str, Any], checkpoint: str) -> dict[str, Any]:
    """Score a saved run on its test split: `checkpoint` is "best", "last" or a step.

    Raises:
      UserError: there is no such run or checkpoint, or an override contradicts it.
    """
    if not (workdir / FOLDER).is_dir():
        raise UserError(f"{workdir} holds no run: train it first, or name its folder with --workdir")
    mesh = make_mesh()
    with (
        Checkpoints(workdir, scores=scores(workdir, "val"), read_only=True) as checkpoints,
        _offering_others(checkpoints.steps()),
    ):
        step = checkpoints.find(checkpoint)
        run = checkpoints.run(step)
        named_data_dir = config.data_dir
        config = for_evaluation(run["config"], overrides, config)
        check_config(config)
        blocks = trained_blocks(config)
        if config.model_type == "dblock" and len(blocks) < config.num_blocks:
            raise UserError(
                f"{workdir} trained only blocks {list(blocks)} of {config.num_blocks}: join by --mode=merge"
            )
        check_alike("command", (config.to_dict(), step))
        with first_process_first("data"):
            # A checkpoint may be a stranger's: it cannot choose what is written where.
            dataset = find_dataset(config, may_prepare=config.data_dir == named_data_dir)
        check_same_data(run["data"], {"class_names": list(dataset.class_names)}, str(workdir))
        if config.cfg_scale > 0 and image_dropout(ConfigDict(run["config"])) == 0:
            logging.warning(
                "guidance asks the model about blank images, but it was trained without any: cfg_scale was 0"
            )
        with on_cpu():
            blueprint, params = Blueprint.of(new_model(config, architecture(config, dataset)))
            params = jax.device_get(params)
        memory = "pinned_host" if rest_on_host(config) else "device"
        params = checkpoints.restore_params(step, replicate(params, mesh, memory))
    classify = make_classifier(config, blueprint, mean=dataset.mean, std=dataset.std)
    with arithmetic(config):
        found = evaluate(classify, params, dataset.split("test"), batch_size=config.eval_batch_size, mesh=mesh)
    sampler = {field: config[field] for field in SAMPLER_FIELDS} if config.model_type == "dblock" else {}
    return {"mode": "eval", "workdir": str(workdir), "checkpoint": step, "split": "test", **found, "sampler": sampler}


@contextmanager
def _offering_others(steps: list[int]) -> Iterator[None]:
    try:
        yield
    except Unusable as error:
        raise UserError(f"{error}. --checkpoint chooses another; there are {steps}") from error


def evaluate(
    classify: Classifier,
    params: dict[str, Params],
    source: Source,
    *,
    batch_size: int,
    mesh: Mesh,
    at_each_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Metrics of one split, as `metrics` returns them. The batch is rounded up to a multiple of the devices.

    Each process reads and classifies its part of a batch, and gets the results of all. What `at_each_batch` raises ends
    it.
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
    return metrics(believed, logits, source.labels)


def metrics(
    believed: Int[np.ndarray, "n images"],
    logits: Float[np.ndarray, "images classes"],
    labels: Int[np.ndarray, " images"],
) -> dict[str, Any]:
    """Scores in [0, 1] and cross-entropy in nats, from each step's labels and the last step's logits.

    top1, top5 (of equal logits the lower label ranks first), macro_f1 (the mean over all classes), cross_entropy,
    accuracy_by_step (its last entry is top1), num_images.
    """
    from sklearn.metrics import f1_score

    num_classes = logits.shape[1]
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    top5 = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    return {
        "num_images": len(labels),
        "top1": float(np.mean(believed[-1] == labels)),
        "top5": float(np.mean((top5 == labels[:, None]).any(axis=1))),
        "macro_f1": float(f1_score(labels, believed[-1], labels=range(num_classes), average="macro", zero_division=0)),
        "cross_entropy": float(-np.mean(log_probs[np.arange(len(labels)), labels])),
        "accuracy_by_step": [float(accuracy) for accuracy in np.mean(believed == labels, axis=1)],
    }

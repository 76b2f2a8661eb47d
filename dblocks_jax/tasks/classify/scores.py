"""Score a classifier on a split: every image exactly once, whatever the batch size."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from dblocks_jax.data.batches import eval_batches
from dblocks_jax.data.datasets import Source
from dblocks_jax.models.blueprint import Params
from dblocks_jax.run.devices import DATA, gather, shard
from dblocks_jax.tasks.classify.classifier import Classifier, summarize

CALIBRATION_BINS = 15


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
    calibration_error, accuracy_by_step (its last entry is top1), num_images. An image whose logits are not all finite
    has no answer, and so a wrong one: then there is "diverged" too, and cross_entropy is not a number.
    """
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
        "macro_f1": _macro_f1(believed[-1], labels, num_classes),
        "cross_entropy": float(-np.mean(log_probs[np.arange(len(labels)), labels])),
        "calibration_error": _calibration_error(np.exp(log_probs.max(axis=1)), believed[-1] == labels),
        "accuracy_by_step": [float(accuracy) for accuracy in np.mean(believed == labels, axis=1)],
    }
    return found if is_sound.all() else found | {"diverged": True}


def _calibration_error(confidence: Float[np.ndarray, " images"], is_right: Bool[np.ndarray, " images"]) -> float:
    """Expected calibration error (Guo et al. 2017): |accuracy - mean confidence| over 15 equal bins of confidence.

    An image without an answer is in the highest bin, and wrong.
    """
    bins = np.minimum((np.nan_to_num(confidence, nan=1.0) * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    surplus = np.bincount(bins, np.nan_to_num(confidence, nan=1.0) - is_right, CALIBRATION_BINS)
    return float(np.abs(surplus).sum() / len(is_right))


def _macro_f1(answered: Int[np.ndarray, " images"], labels: Int[np.ndarray, " images"], num_classes: int) -> float:
    """The mean over classes of 2 hits / (images of the class + answers of it); 0 for a class that has neither.

    An answer that is no class counts for none.
    """
    answered_classes = answered[(answered >= 0) & (answered < num_classes)]
    hits = np.bincount(labels[answered == labels], minlength=num_classes)
    both = np.bincount(labels, minlength=num_classes) + np.bincount(answered_classes, minlength=num_classes)
    return float(np.mean(2 * hits / np.maximum(both, 1)))

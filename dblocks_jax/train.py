"""Training from start to end: data, model, resume, steps, evaluation, checkpoints. Read it top to bottom."""

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from dblocks_jax import workdir as run_folder
from dblocks_jax.build import Blueprint, make_classifier, make_objective, new_model
from dblocks_jax.checkpoint import FOLDER, Checkpoints
from dblocks_jax.config import (
    architecture,
    check_config,
    check_resumable,
    check_same_data,
    count_steps,
    find_dataset,
    schedule,
)
from dblocks_jax.data import train_batches
from dblocks_jax.devices import check_batch_size, make_mesh, replicate, shard_batch
from dblocks_jax.errors import UserError
from dblocks_jax.evaluate import evaluate
from dblocks_jax.optimizer import new_part
from dblocks_jax.processes import check_alike, first_process_first
from dblocks_jax.progress import Progress
from dblocks_jax.step import Augmentation, make_train_step


def train(config: ConfigDict, workdir: Path, *, command: list[str], overrides: dict[str, Any]) -> dict[str, Any]:
    """Train the run in `workdir` from where it stands to its end, and score it on the test split.

    Raises:
      UserError: config, data or workdir do not fit. Nothing has been compiled or written then, except that a checkpoint
        which cannot be read is found when the start is on record already.
    """
    # Checks that need no data.
    check_config(config)
    mesh = make_mesh()
    check_batch_size("batch_size", config.batch_size, mesh)
    check_alike("config", config.to_dict())
    saved = run_folder.read_saved(workdir, run_folder.CONFIG)
    if saved is not None:
        check_resumable(saved, config, str(workdir))
    elif (workdir / FOLDER).exists():
        raise UserError(f"{workdir} holds checkpoints but no {run_folder.CONFIG}: restore it, or use another --workdir")

    # Data.
    with first_process_first("data"):
        dataset = find_dataset(config)
    train_source = dataset.split("train")
    total_steps, steps_per_epoch = count_steps(config, len(train_source))
    images_per_step = config.batch_size * config.accumulate_grad_batches
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    batches = train_batches(train_source, batch_size=images_per_step, seed=config.seed, **share)
    val_source, test_source = dataset.split("val"), dataset.split("test")
    card = {"class_names": list(dataset.class_names), "images": len(train_source)}
    saved_card = run_folder.read_saved(workdir, run_folder.DATA)
    if saved_card is not None:
        check_same_data(saved_card, card, str(workdir))
    watched, watched_name = (val_source, "val") if val_source is not None else (test_source, "test")

    # Model, and what a step does to it.
    blueprint, params = Blueprint.of(new_model(config, architecture(config, dataset)))
    parts = replicate({name: new_part(part) for name, part in params.items()}, mesh)
    loss_fn, curriculum = make_objective(config, blueprint)
    train_step = make_train_step(
        loss_fn,
        augmentation=Augmentation(config.crop_padding, config.flip, config.resized_crop, config.add_rand_aug),
        mean=dataset.mean,
        std=dataset.std,
        seed=config.seed,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        accumulate=config.accumulate_grad_batches,
    )
    classify = make_classifier(config, blueprint, mean=dataset.mean, std=dataset.std)
    lr_at = schedule(config, total_steps)

    def scores_of(params, source) -> dict[str, Any]:
        return evaluate(classify, params, source, batch_size=config.eval_batch_size, mesh=mesh)

    # Resume, or start.
    with first_process_first("workdir"):
        run_folder.open_run(workdir, config.to_dict(), card, command=command, overrides=overrides)
    with Checkpoints(workdir, save_top_k=config.save_top_k if val_source is not None else 0) as checkpoints:
        start = checkpoints.latest() or 0
        check_alike("checkpoints", start)
        if start:
            parts = checkpoints.restore(start, parts, batches)
        run_folder.forget_metrics_after(workdir, start)
        logging.info(
            "%s: %s of %d training images, %d parameters, %d steps, %d an epoch, %s",
            workdir, config.dataset, len(train_source), _count(params), total_steps, steps_per_epoch,
            f"resumed at step {start}" if start else "from the start",
        )  # fmt: skip

        # Steps.
        began = time.perf_counter()
        progress = Progress(
            workdir,
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            log_every=config.log_every_n_steps,
            images_per_step=images_per_step,
        )
        for step in range(start, total_steps):
            batch = shard_batch(next(batches), mesh)
            names, block, within = curriculum.at(step)
            active = tuple(parts.pop(name) for name in names)  # donated: nothing else may hold them
            lr = lr_at(step)
            active, metrics = train_step(active, batch["image"], batch["label"], np.int32(step), np.float32(lr), within)
            parts.update(zip(names, active, strict=True))
            done = step + 1
            progress.add(done, block, lr, metrics)

            # Evaluation and checkpoints.
            if done == total_steps or done % (config.save_every_n_epochs * steps_per_epoch) == 0:
                progress.flush(done, lr)
                scores = None
                if done < total_steps or val_source is not None:
                    scores = scores_of({name: part.params for name, part in parts.items()}, watched)
                    progress.evaluated(done, watched_name, scores)
                kept = _selection(scores) if val_source is not None else None
                checkpoints.save(done, parts, batches, {"config": config.to_dict(), "data": card}, kept)
        jax.block_until_ready(parts)
        seconds = time.perf_counter() - began

        # The result: the best checkpoint by validation, or the last, on the test split.
        checkpoints.wait()
        chosen = checkpoints.best()
        assert chosen is not None
        params = checkpoints.restore_params(chosen, {name: part.params for name, part in parts.items()})
        test_scores = scores_of(params, test_source)
        if start < total_steps:
            progress.evaluated(chosen, "test", test_scores)
    return {
        "mode": "train",
        "workdir": str(workdir),
        "step": total_steps,
        "checkpoint": chosen,
        "split": "test",
        **test_scores,
        "steps_run": total_steps - start,
        "seconds": round(seconds, 2),
    }


def _selection(scores: dict[str, Any] | None) -> dict[str, float]:
    """What a checkpoint keeps of its validation scores."""
    assert scores is not None
    return {name: scores[name] for name in ("top1", "top5", "macro_f1", "cross_entropy")}


def _count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))

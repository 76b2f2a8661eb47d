"""Training from start to end: data, model, resume, steps, evaluation, checkpoints. Read it top to bottom."""

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from dblocks_jax import workdir as run_folder
from dblocks_jax.build import Blueprint, make_classifier, make_objective, make_step, new_model
from dblocks_jax.checkpoint import FOLDER, Checkpoints
from dblocks_jax.config import (
    architecture,
    arithmetic,
    check_config,
    check_resumable,
    check_same_data,
    count_steps,
    curriculum,
    find_dataset,
    rest_on_host,
    schedule,
    trained_blocks,
)
from dblocks_jax.devices import check_batch_size, make_mesh, on_cpu, replicate
from dblocks_jax.diffusion.noise import stack_ranges
from dblocks_jax.errors import UserError
from dblocks_jax.evaluate import evaluate
from dblocks_jax.feed import make_feed
from dblocks_jax.optimizer import new_part, params_of
from dblocks_jax.processes import check_alike, first_process_first
from dblocks_jax.progress import Progress
from dblocks_jax.residence import OneAtATime, SideBySide
from dblocks_jax.step import Parallel, Steps


def train(config: ConfigDict, workdir: Path, *, command: list[str], overrides: dict[str, Any]) -> dict[str, Any]:
    """Train the run in `workdir` from where it stands to its end, and score it on the test split.

    Raises:
      UserError: config, data or workdir do not fit. Nothing has been compiled or written then, except that a checkpoint
        which cannot be read is found when the start is on record already.
    """
    check_config(config)
    with arithmetic(config):
        return _train(config, workdir, command=command, overrides=overrides)


def _train(config: ConfigDict, workdir: Path, *, command: list[str], overrides: dict[str, Any]) -> dict[str, Any]:
    # Checks that need no data.
    mesh = make_mesh(config.num_blocks if config.block_parallel else 1)
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
    total_steps, updates, steps_per_epoch = count_steps(config, len(train_source))
    images_per_step = config.batch_size * config.accumulate_grad_batches
    val_source, test_source = dataset.split("val"), dataset.split("test")
    card = {"class_names": list(dataset.class_names), "images": len(train_source)}
    saved_card = run_folder.read_saved(workdir, run_folder.DATA)
    if saved_card is not None:
        check_same_data(saved_card, card, str(workdir))
    watched, watched_name = (val_source, "val") if val_source is not None else (test_source, "test")

    # Model, and what a step does to it.
    blocks = trained_blocks(config)
    with on_cpu():
        blueprint, params = Blueprint.of(new_model(config, architecture(config, dataset)))
        mine = sorted({name for block in blocks for name in blueprint.names(block)})
        parts = jax.device_get({name: new_part(params[name]) for name in mine})
    parts = replicate(parts, mesh, "pinned_host" if rest_on_host(config) else "device")
    loss_fn, ranges = make_objective(config, blueprint)
    parallel = Parallel(mesh, isolated=config.sharing == "isolated") if config.block_parallel else None
    train_step = make_step(config, loss_fn, mean=dataset.mean, std=dataset.std, parallel=parallel)
    plan = curriculum(config, total_steps)
    lr_at = schedule(config, updates)
    classify = make_classifier(config, blueprint, mean=dataset.mean, std=dataset.std)

    # Some blocks alone cannot classify: a run of theirs is merged with the others' before it is scored.
    whole = config.model_type == "vit" or len(blocks) == config.num_blocks

    def scores_of(params, source) -> dict[str, Any]:
        return evaluate(classify, params, source, batch_size=config.eval_batch_size, mesh=mesh)

    # Resume, or start.
    with first_process_first("workdir"):
        run_folder.open_run(workdir, config.to_dict(), card, command=command, overrides=overrides)
    with Checkpoints(workdir, save_top_k=config.save_top_k if whole and val_source is not None else 0) as checkpoints:
        start = checkpoints.latest() or 0
        check_alike("checkpoints", start)
        if start:
            parts = checkpoints.restore(start, parts)
        run_folder.forget_metrics_after(workdir, start)
        logging.info(
            "%s: %s of %d training images, %d parameters, %d steps, %d an epoch, %s",
            workdir, config.dataset, len(train_source), _count(params), total_steps, steps_per_epoch,
            f"resumed at step {start}" if start else "from the start",
        )  # fmt: skip
        if config.block_parallel:
            model = SideBySide(train_step, parts, blueprint.names, mesh, isolated=config.sharing == "isolated")
        else:
            model = OneAtATime(train_step, parts, blueprint.names, idle_on_host=rest_on_host(config))
        del params, parts  # the model has them now
        feed = make_feed(
            train_source,
            image_shape=dataset.image_shape,
            batch_size=images_per_step,
            seed=config.seed,
            most=min(config.steps_per_call, config.log_every_n_steps),
            mesh=mesh,
        )

        # Steps.
        began = time.perf_counter()
        progress = Progress(
            workdir,
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            log_every=config.log_every_n_steps,
            images_per_step=images_per_step * (len(blocks) if config.block_parallel else 1),
        )
        save_every = config.save_every_n_epochs * steps_per_epoch
        step = start
        while step < total_steps:
            # As many steps as one call can make: of the same block, up to the next line of the log or checkpoint.
            stop = min(_next_multiple(step, config.log_every_n_steps), _next_multiple(step, save_every), total_steps)
            count = plan.run(step, min(feed.most, stop - step))
            block, position = plan.at(step)
            lr = [lr_at(plan.rate_step(position + i)) for i in range(count)]
            data = feed.take(position, count)
            steps = Steps(
                count=np.int32(count),
                block=np.int32(block),
                position=np.int32(position),
                lr=np.array(lr + [0.0] * (feed.most - count), np.float32),
                within=ranges[block],
            )
            if isinstance(model, SideBySide):
                steps = steps._replace(block=np.arange(len(blocks), dtype=np.int32), within=stack_ranges(ranges))
                metrics, trained = model.train(data, steps), blocks
            else:
                metrics, trained = model.train(block, data, steps), (block,)
            step += count
            progress.add(step, trained, count, lr[-1], metrics, feed.waited)

            # Evaluation and checkpoints.
            if step == total_steps or step % save_every == 0:
                progress.flush(step, lr[-1], feed.waited)
                parts = model.parts()
                scores = None
                if whole and (step < total_steps or val_source is not None):
                    scores = scores_of(params_of(parts), watched)
                    progress.evaluated(step, watched_name, scores)
                kept = _selection(scores) if whole and val_source is not None else None
                checkpoints.save(step, parts, {"config": config.to_dict(), "data": card}, kept)
                del parts  # copies, where blocks train side by side
        model.wait()
        seconds = time.perf_counter() - began

        # The result: the best checkpoint by validation, or the last, on the test split.
        checkpoints.wait()
        chosen = checkpoints.best()
        assert chosen is not None
        result = {"mode": "train", "workdir": str(workdir), "step": total_steps, "checkpoint": chosen}
        if whole:
            params = checkpoints.restore_params(chosen, params_of(model.parts()))
            test_scores = scores_of(params, test_source)
            if start < total_steps:
                progress.evaluated(chosen, "test", test_scores)
            result |= {"split": "test", **test_scores}
        else:
            logging.info("blocks %s are trained: join them with the others by --mode=merge", list(blocks))
            result |= {"blocks": list(blocks)}
    return result | {"steps_run": total_steps - start, "seconds": round(seconds, 2)}


def _next_multiple(step: int, of: int) -> int:
    """The first multiple that lies beyond `step`."""
    return (step // of + 1) * of


def _selection(scores: dict[str, Any] | None) -> dict[str, float]:
    """What a checkpoint keeps of its validation scores."""
    assert scores is not None
    return {name: scores[name] for name in ("top1", "top5", "macro_f1", "cross_entropy")}


def _count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))

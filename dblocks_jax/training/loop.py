"""Training from start to end: data, model, resume, steps, evaluation, checkpoints. Read it top to bottom."""

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from dblocks_jax.data.datasets import Source
from dblocks_jax.data.feed import make_feed
from dblocks_jax.diffusion.noise import stack_ranges
from dblocks_jax.modes.evaluate import answers, metrics
from dblocks_jax.run import workdir as run_folder
from dblocks_jax.run.checkpoint import FOLDER, Checkpoints
from dblocks_jax.run.devices import check_batch_size, make_mesh, on_cpu, replicate
from dblocks_jax.run.errors import Stopped, Unsaved, Unusable, UserError
from dblocks_jax.run.logs import Logs, check_wandb
from dblocks_jax.run.processes import check_alike, first_process_first, is_first
from dblocks_jax.run.stop import Stop
from dblocks_jax.training.build import Blueprint, make_classifier, make_objective, make_step, new_model
from dblocks_jax.training.config import (
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
from dblocks_jax.training.display import Display
from dblocks_jax.training.health import Health
from dblocks_jax.training.optimizer import Params, new_part, params_of
from dblocks_jax.training.overview import noise_ranges, overview
from dblocks_jax.training.pace import Pace
from dblocks_jax.training.progress import Progress
from dblocks_jax.training.residence import OneAtATime, SideBySide
from dblocks_jax.training.step import Parallel, Steps


def train(
    config: ConfigDict, workdir: Path, *, command: list[str], overrides: dict[str, Any], stop: Stop | None = None
) -> dict[str, Any]:
    """Train the run in `workdir` from where it stands to its end, and score it on the test split.

    Raises:
      UserError: config, data or workdir do not fit. Nothing has been compiled or written then, except that a checkpoint
        which cannot be read, or was imported, and a W&B that does not start are found when the start is on record
        already, and an image may become unreadable later:
        then the state has been saved.
      Stopped: `stop` was asked for; the state has been saved.
      Diverged: too many steps in a row had numbers that are not finite.
      Unsaved: what a `Stopped` or unreadable image ended could not be saved.
    """
    check_config(config)
    if config.wandb:
        check_wandb()
    with arithmetic(config), ExitStack() as held:
        return _train(config, workdir, held, command=command, overrides=overrides, stop=stop or Stop())


def _train(
    config: ConfigDict,
    workdir: Path,
    held: ExitStack,
    *,
    command: list[str],
    overrides: dict[str, Any],
    stop: Stop,
) -> dict[str, Any]:
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
    length = count_steps(config, len(train_source))
    total_steps, updates, steps_per_epoch = length
    images_per_step = config.batch_size * config.accumulate_grad_batches
    val_source, test_source = dataset.split("val"), dataset.split("test")
    card = dataset.to_dict() | {"images": len(train_source)}
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
    train_step = make_step(config, loss_fn, dataset, parallel)
    plan = curriculum(config, total_steps)
    lr_at = schedule(config, updates)
    classify = make_classifier(config, blueprint, dataset)

    # Some blocks alone cannot classify: a run of theirs is merged with the others' before it is scored.
    whole = config.model_type == "vit" or len(blocks) == config.num_blocks
    save_every = config.save_every_n_epochs * steps_per_epoch

    def is_scored(step: int) -> bool:
        """Whether training stops to evaluate here. At the end the test split is scored in any case."""
        return whole and step > 0 and (step % save_every == 0 if step < total_steps else val_source is not None)

    # Resume, or start.
    with run_folder.writing(workdir), first_process_first("workdir"):
        held.enter_context(run_folder.claim(workdir))
        run_folder.open_run(workdir, config.to_dict(), card, was=saved, command=command, overrides=overrides)
    scores: dict[int, float] = {}  # step -> accuracy on the validation split
    with run_folder.writing(workdir):
        checkpoints = held.enter_context(Checkpoints(workdir, scores=scores, save_top_k=config.save_top_k))
        start, parts, saved_run = checkpoints.resume(parts)
        check_alike("checkpoints", start)
        if "imported" in saved_run:
            raise UserError(
                f"{workdir} was imported from {saved_run['imported']}, without the optimizer's moments: "
                "it can be scored and exported, but not trained on"
            )
        with first_process_first("log"):
            run_folder.forget_metrics_after(workdir, start)
            on_record = {split: run_folder.scores(workdir, split) for split in ("val", "test")}
    scores.update(on_record["val"])
    if is_first():
        sources = {"training": train_source, "validation": val_source, "test": test_source}
        images = {split: len(source) for split, source in sources.items() if source is not None}
        together = blueprint.names(blocks[0])
        about = overview(
            config, workdir, dataset=dataset, images=images, mesh=mesh, params=params, trained=together, length=length,
            start=start,
        )  # fmt: skip
        print(about, file=sys.stderr)
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
    health = Health(config.max_bad_steps, saved_run.get("skipped", {}))
    logs = Logs(workdir, start=start, wandb=config.wandb, config=config.to_dict())
    held.callback(logs.close)
    display = held.enter_context(Display(total_steps=total_steps, start=start, sigmas=noise_ranges(config)))
    progress = Progress(
        logs,
        display,
        steps_per_epoch=steps_per_epoch,
        log_every=config.log_every_n_steps,
        images_per_step=images_per_step * (len(blocks) if config.block_parallel else 1),
        health=health,
    )
    pace = Pace(feed.most, adapt=jax.process_count() == 1)

    def save(step: int) -> None:
        progress.flush()
        pace.rest()
        run_folder.restore_if_lost(workdir, config.to_dict(), card)
        checkpoints.save(step, model.parts(), {"config": config.to_dict(), "data": card, "skipped": health.record})

    def score(step: int, params: dict[str, Params], source: Source, split: str) -> dict[str, Any]:
        size = config.eval_batch_size
        display.say_doing(f"scoring the {split} split")
        answered = answers(classify, params, source, batch_size=size, mesh=mesh, at_each_batch=stop.check)
        found = metrics(*answered, source.labels)
        if step not in on_record[split]:
            progress.evaluated(step, split, found)
        return found

    step = start
    stop.is_safe = lambda: checkpoints.holds(step) and not checkpoints.is_saving() and logs.is_whole()
    # A run that ended after its checkpoint and before its evaluation owes that.
    owes_score = is_scored(start) and start not in on_record[watched_name]
    try:
        while step < total_steps or owes_score:
            stop.check()
            checkpoints.look()
            if owes_score:
                found = score(step, params_of(model.parts()), watched, watched_name)
                if val_source is not None:  # nothing is chosen by the test split
                    scores[step] = found["top1"]
                owes_score = False
                continue

            # As many steps as one call can make: of the same block, up to the next line of the log or checkpoint.
            until = min(_next_multiple(step, config.log_every_n_steps), _next_multiple(step, save_every), total_steps)
            count = plan.run(step, min(pace.steps, until - step))
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
                log, trained = model.train(data, steps), blocks
            else:
                log, trained = model.train(block, data, steps), (block,)
            step += count
            progress.add(step, trained, count, lr[-1], log, feed.waited)
            pace.add(count, log)

            if step == total_steps or step % save_every == 0:
                save(step)
                owes_score = is_scored(step)
        model.wait()
        seconds = time.perf_counter() - began

        # The result: the best checkpoint by validation, or the last, on the test split.
        checkpoints.wait()
        result = {"mode": "train", "workdir": str(workdir), "step": total_steps, "checkpoint": total_steps}
        if whole:
            chosen, params = _chosen(checkpoints, total_steps, params_of(model.parts()))
            result |= {"checkpoint": chosen, "split": "test", **score(chosen, params, test_source, "test")}
        else:
            logging.info("blocks %s are trained: join them with the others by --mode=merge", list(blocks))
            result |= {"blocks": list(blocks)}
    except (Stopped, UserError) as reason:  # asked to stop, or an image that cannot be read
        stop.is_safe = lambda: False  # what remains is done here
        if isinstance(reason, UserError) and jax.process_count() > 1:
            raise  # the other processes know nothing of it, and cannot be asked to save
        save(step)
        checkpoints.wait()
        why = f"{reason}. Stopped" if isinstance(reason, UserError) else "stopped"
        if not checkpoints.holds(step):
            raise Unsaved(f"{why} at step {step} of {total_steps}, which could not be saved") from reason
        if unsaved := logs.unsaved():
            raise Unsaved(
                f"{why} at step {step} of {total_steps}; not everything could be saved: {unsaved}"
            ) from reason
        raise type(reason)(f"{why} at step {step} of {total_steps}: the same command goes on from there") from reason
    result |= {"steps_run": total_steps - start, "seconds": round(seconds, 2)}
    if skipped := sum(health.record["total"].values()):
        result |= {"steps_skipped": skipped}
    if not checkpoints.holds(total_steps):  # the disk may have room again
        save(total_steps)
        checkpoints.wait()
    lost = {step: why for step, why in checkpoints.failed.items() if not checkpoints.holds(step)}
    if not checkpoints.holds(result["checkpoint"]):
        result["checkpoint"] = None  # "unsaved" says why
    unsaved = [f"step {step}: {why}" for step, why in lost.items()] + logs.unsaved()
    return result | {"unsaved": unsaved} if unsaved else result


def _chosen(checkpoints: Checkpoints, last: int, params: dict[str, Params]) -> tuple[int, dict[str, Params]]:
    """The step to be scored and its parameters: the best by validation that can be read, else the last, `params`."""
    for step in checkpoints.best():
        if step == last:
            break
        try:
            return step, checkpoints.restore_params(step, params)
        except Unusable as error:
            logging.error("%s: taking the next best", error)
    return last, params


def _next_multiple(step: int, of: int) -> int:
    """The first multiple that lies beyond `step`."""
    return (step // of + 1) * of

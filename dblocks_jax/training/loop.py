"""Training from start to end: prepare, open the folder, resume, steps, scores, checkpoints. Read it bottom up."""

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from dblocks_jax.data.feed import make_feed
from dblocks_jax.models.blueprint import Params
from dblocks_jax.run import workdir as run_folder
from dblocks_jax.run.errors import Diverged, Stopped, Unsaved, Unusable, UserError
from dblocks_jax.run.logs import Logs, check_wandb
from dblocks_jax.run.processes import is_first
from dblocks_jax.run.stop import Stop
from dblocks_jax.tasks.task import Entry
from dblocks_jax.training.config import arithmetic, check_config, schedule
from dblocks_jax.training.display import Display
from dblocks_jax.training.health import Health
from dblocks_jax.training.opened import Opened, open_run
from dblocks_jax.training.optimizer import Part, used_params
from dblocks_jax.training.overview import overview
from dblocks_jax.training.pace import Pace
from dblocks_jax.training.progress import Progress
from dblocks_jax.training.residence import OneAtATime, SideBySide
from dblocks_jax.training.setting import Setting, make_step, memoized, prepare
from dblocks_jax.training.step import Steps, stack_shares


@dataclass
class Trainer:
    """A run under way."""

    setting: Setting
    opened: Opened
    logs: Logs
    display: Display
    stop: Stop
    step: int = field(init=False)

    def __post_init__(self) -> None:
        setting, config = self.setting, self.setting.config
        self.step = self.start = self.opened.step
        self.total = setting.length.steps
        self.save_every = config.save_every_n_epochs * setting.length.steps_per_epoch
        self.model_of = memoized(setting.model)
        self.lr_at = schedule(config, setting.length.updates)
        self.health = Health(config.max_bad_steps, self.opened.skipped)
        examples = config.batch_size * config.accumulate_grad_batches
        self.feed = make_feed(
            setting.data.split("train"),
            batch_size=examples,
            seed=config.seed,
            most=min(config.steps_per_call, config.log_every_n_steps),
            mesh=setting.mesh,
        )
        self.progress = Progress(
            self.logs,
            self.display,
            steps_per_epoch=setting.length.steps_per_epoch,
            log_every=config.log_every_n_steps,
            examples_per_step=examples * (len(setting.blocks) if config.block_parallel else 1),
            health=self.health,
        )
        self.pace = Pace(self.feed.most, adapt=jax.process_count() == 1)
        self.stage = setting.stage_of(self.step)
        model = self.model_of(self.stage)
        self.train_step = make_step(config, model.task, model.blueprint, setting.mesh)
        self.residence = self._settle(self.opened.parts)
        self.opened.parts = {}  # the residence has them now

    def _settle(self, parts: dict[str, Part]) -> OneAtATime | SideBySide:
        """Give `parts` of this stage their place."""
        setting, model = self.setting, self.model_of(self.stage)
        self.display.describe_blocks(model.task.corruption)
        if setting.config.block_parallel:
            isolated = setting.config.sharing == "isolated"
            return SideBySide(self.train_step, parts, model.blueprint.names, setting.mesh, isolated=isolated)
        return OneAtATime(self.train_step, parts, model.blueprint.names, away=setting.away)

    def grow_if_due(self) -> None:
        """At the end of a stage: more blocks, which begin as copies. What was saved before is of the smaller model."""
        following = self.setting.stage_of(min(self.step + 1, self.total))
        if following is self.stage:
            return
        self.progress.flush()
        names = self.model_of(following).blueprint.parts
        grown = self.setting.grow(self.residence.parts(), names, before=self.stage.config, after=following.config)
        logging.info("step %d: %d blocks from now on", self.step, self.model_of(following).blueprint.num_blocks)
        self.stage = following
        self.residence = self._settle(grown)

    def take_steps(self) -> None:
        """As many steps as one call can make: of one block, up to the next line of the log, checkpoint or stage."""
        config, stage = self.setting.config, self.stage
        ends = (next_multiple(self.step, config.log_every_n_steps), next_multiple(self.step, self.save_every))
        until = min(*ends, stage.end)
        count = stage.run(self.step, min(self.pace.steps, until - self.step))
        block, position = stage.at(self.step)
        lr = [self.lr_at(stage.rate_step(position + i)) for i in range(count)]
        data = self.feed.take(position, count)
        corruption = self.model_of(stage).task.corruption
        steps = Steps(
            count=np.int32(count),
            block=np.int32(block),
            position=np.int32(position),
            lr=np.array(lr + [0.0] * (self.feed.most - count), np.float32),
            share=None if corruption is None else corruption.shares[block],
        )
        if isinstance(self.residence, SideBySide):
            assert corruption is not None
            blocks = self.setting.blocks
            steps = steps._replace(block=np.arange(len(blocks), dtype=np.int32), share=stack_shares(corruption.shares))
            log, trained = self.residence.train(data, steps), blocks
        else:
            log, trained = self.residence.train(block, data, steps), (block,)
        self.step += count
        self.progress.add(self.step, trained, count, lr[-1], log, self.feed.waited)
        self.pace.add(count, log)

    def is_scored(self, step: int) -> bool:
        """Whether training stops to evaluate here. At the end the test split is scored in any case."""
        if not self.setting.is_whole or step == 0:
            return False
        return step % self.save_every == 0 if step < self.total else self.setting.watched == "val"

    def save(self) -> None:
        """Everything, as of this step."""
        setting = self.setting
        self.progress.flush()
        self.pace.rest()
        run_folder.restore_if_lost(setting.workdir, setting.config.to_dict(), setting.card)
        about = {"config": self.stage.config.to_dict(), "data": setting.card, "skipped": self.health.record}
        self.opened.checkpoints.save(self.step, self.residence.parts(), about)

    def score(self, step: int, params: dict[str, Params], split: str, *, at_end: bool = False) -> dict[str, Any]:
        """Judge the model of a step: the scores that are due while it trains, or all of them at the end."""
        model = self.model_of(self.setting.stage_of(step))
        show = self.display.doing(f"scoring the {split} split")

        def at_each_batch() -> None:
            self.stop.check()
            show()

        found = model.score(params, self.setting.data, split, at_each_batch)
        if at_end or step not in self.opened.on_record[split]:
            self.progress.evaluated(step, split, found, model.task.tell(found))
            self.opened.on_record[split].add(step)
        return found

    def score_as_owed(self) -> None:
        """The watched split, at this step; on it depends which checkpoint is kept."""
        split = self.setting.watched
        found = self.score(self.step, used_params(self.residence.parts()), split)
        main = self.setting.entry.main_score
        if split == "val" and np.isfinite(found[main.name]):  # nothing is chosen by the test split
            self.opened.scores[self.step] = found[main.name] if main.more_is_better else -found[main.name]

    def run(self) -> float:
        """Every step that is left, with its scores and checkpoints; returns the seconds it took."""
        began = time.perf_counter()
        checkpoints = self.opened.checkpoints
        self.stop.is_safe = lambda: (
            checkpoints.holds(self.step) and not checkpoints.is_saving() and self.logs.is_whole()
        )
        # A run that ended after its checkpoint and before its evaluation owes that.
        owes_score = self.is_scored(self.step) and self.step not in self.opened.on_record[self.setting.watched]
        while self.step < self.total or owes_score:
            self.stop.check()
            checkpoints.look()
            if owes_score:
                self.score_as_owed()
                owes_score = False
                continue
            self.grow_if_due()
            self.take_steps()
            if self.step == self.total or self.step % self.save_every == 0:
                self.save()
                owes_score = self.is_scored(self.step)
        self.residence.wait()
        return time.perf_counter() - began

    def result(self, seconds: float) -> dict[str, Any]:
        """The best checkpoint by validation, or the last, on the test split."""
        checkpoints, total = self.opened.checkpoints, self.total
        checkpoints.wait()
        result = {"mode": "train", "workdir": str(self.setting.workdir), "step": total, "checkpoint": total}
        if self.setting.is_whole:
            chosen, params = self._chosen(used_params(self.residence.parts()))
            result |= {"checkpoint": chosen, "split": "test", **self.score(chosen, params, "test", at_end=True)}
        else:
            blocks = list(self.setting.blocks)
            logging.info("blocks %s are trained: join them with the others by --mode=merge", blocks)
            result |= {"blocks": blocks}
        return result | {"steps_run": total - self.start, "seconds": round(seconds, 2)}

    def _chosen(self, last: dict[str, Params]) -> tuple[int, dict[str, Params]]:
        """The step to be scored and its parameters: the best by validation that can be read, else `last`."""
        for step in self.opened.checkpoints.best():
            if step == self.total:
                break
            try:
                like = {name: part.params for name, part in self.setting.like(self.setting.stage_of(step)).items()}
                return step, self.opened.checkpoints.restore_params(step, like, self.setting.settle)
            except Unusable as error:
                logging.error("%s: taking the next best", error)
        return self.total, last

    def leave(self, reason: Stopped | UserError) -> None:
        """Save, and say where the run stands.

        Raises:
          Stopped, UserError: what `reason` is, with what to do.
          Unsaved: it could not be saved.
        """
        self.stop.is_safe = lambda: False  # what remains is done here
        if isinstance(reason, UserError) and jax.process_count() > 1:
            raise reason  # the other processes know nothing of it, and cannot be asked to save
        self.save()
        self.opened.checkpoints.wait()
        why = f"{reason}. Stopped" if isinstance(reason, UserError) else "stopped"
        where = f"{why} at step {self.step} of {self.total}"
        if not self.opened.checkpoints.holds(self.step):
            raise Unsaved(f"{where}, which could not be saved") from reason
        if unsaved := self.logs.unsaved():
            raise Unsaved(f"{where}; not everything could be saved: {unsaved}") from reason
        raise type(reason)(f"{where}: the same command goes on from there") from reason

    def record_divergence(self) -> None:
        """Leave a result that says so: other modes tell such a run from one that goes on."""
        checkpoints = self.opened.checkpoints
        checkpoints.wait()
        newest = max(checkpoints.steps(), default=None)
        result = {"mode": "train", "workdir": str(self.setting.workdir), "step": self.step, "checkpoint": newest}
        try:
            run_folder.write_json(self.setting.workdir / "train.json", result | {"diverged": True})
        except OSError as error:
            logging.error("cannot write train.json, which would say that the run diverged: %s", error.strerror)

    def close(self, result: dict[str, Any]) -> dict[str, Any]:
        """`result`, with what was skipped and what could not be saved."""
        checkpoints = self.opened.checkpoints
        if skipped := sum(self.health.record["total"].values()):
            result |= {"steps_skipped": skipped}
        if not checkpoints.holds(self.total):  # the disk may have room again
            self.save()
            checkpoints.wait()
        lost = {step: why for step, why in checkpoints.failed.items() if not checkpoints.holds(step)}
        if not checkpoints.holds(result["checkpoint"]):
            result["checkpoint"] = None  # "unsaved" says why
        unsaved = [f"step {step}: {why}" for step, why in lost.items()] + self.logs.unsaved()
        return result | {"unsaved": unsaved} if unsaved else result


def next_multiple(step: int, of: int) -> int:
    """The first multiple that lies beyond `step`."""
    return (step // of + 1) * of


def train(
    entry: Entry,
    config: ConfigDict,
    workdir: str | Path,
    *,
    command: list[str] | None = None,
    overrides: dict[str, Any] | None = None,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Train the run in `workdir` from where it stands to its end, and score it on the test split.

    Raises:
      UserError: config, data or workdir do not fit. Nothing has been compiled or written then, except that a checkpoint
        which cannot be read, or was imported, and a W&B that does not start are found when the start is on record
        already, and a file may become unreadable later:
        then the state has been saved.
      Stopped: `stop` was asked for; the state has been saved.
      Diverged: too many steps in a row had numbers that are not finite. train.json says so.
      Unsaved: what a `Stopped` or an unreadable file ended could not be saved.
    """
    check_config(entry, config)
    if config.wandb:
        check_wandb()
    with arithmetic(config), ExitStack() as held:
        setting = prepare(entry, config, Path(workdir))
        opened = open_run(setting, held, command=command or [], overrides=overrides or {})
        if is_first():
            print(overview(setting, opened.step), file=sys.stderr)
        logs = Logs(setting.workdir, start=opened.step, wandb=config.wandb, config=config.to_dict())
        held.callback(logs.close)
        display = held.enter_context(Display(total_steps=setting.length.steps, start=opened.step))
        trainer = Trainer(setting, opened, logs, display, stop or Stop())
        try:
            try:
                result = trainer.result(trainer.run())
            except (Stopped, UserError) as reason:  # asked to stop, or data that cannot be read
                trainer.leave(reason)
                raise
        except Diverged:
            trainer.record_divergence()
            raise
        return trainer.close(result)

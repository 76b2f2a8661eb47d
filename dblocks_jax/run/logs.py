"""Where a run's figures go: `metrics.jsonl` and TensorBoard always, Weights & Biases when asked.

Only the first of several processes writes. A disk that fails ends nothing: lines of `metrics.jsonl` wait in memory
until it works again; what TensorBoard misses meanwhile is in there.
"""

import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import logging

from dblocks_jax.run.errors import UserError, brief
from dblocks_jax.run.files import Journal, write_whole
from dblocks_jax.run.processes import is_first
from dblocks_jax.run.workdir import METRICS

TENSORBOARD = "tensorboard"
WANDB_ID = "wandb_id"  # a file with the name under which Weights & Biases knows the run


class Logs:
    """The records of one start of a run, which begins after `start` steps: what was logged beyond is void."""

    def __init__(self, workdir: Path, *, start: int, wandb: bool, config: dict[str, Any]):
        """With `wandb` the run is known there by the folder's name; it goes on there when it goes on here.

        Raises:
          UserError: Weights & Biases cannot be used.
        """
        self._journal = Journal(workdir / METRICS)
        self._folder = workdir / TENSORBOARD
        self._start = start
        self._events: Any = None
        self._failed = self._lost_wandb = ""
        self._wandb: Any = _start_wandb(workdir, config) if wandb and is_first() else None

    def add(self, line: dict[str, Any]) -> None:
        """Record means over a window of steps, or an evaluation; `step` says when."""
        self._journal.add(line)
        if not is_first():
            return
        values = scalars(line)
        try:
            self._write_events(line["step"], values)
        except OSError as error:
            self._events = None  # what follows a broken record is not read: begin another file
            if not self._failed:
                self._failed = error.strerror or brief(error)
                logging.error("cannot write %s (%s); %s has what is missing there", self._folder, self._failed, METRICS)
        self._ask_wandb(lambda run: run.log(values | {"step": line["step"]}))

    def _ask_wandb(self, what: Callable[[Any], None]) -> None:
        """Its service is a process of its own, which may have died: then this run goes on without it."""
        if self._wandb is None:
            return
        try:
            what(self._wandb)
        except Exception as error:  # of many types, and none of them worth a training run
            self._wandb = None
            self._lost_wandb = brief(error)
            logging.error("Weights & Biases fails (%s); %s has what is missing there", self._lost_wandb, METRICS)

    def _write_events(self, step: int, values: dict[str, float]) -> None:
        # What is below SummaryWriter, which writes in a thread: when that fails, it waits for ever.
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.record_writer import RecordWriter

        now = time.time()
        events = []
        if self._events is None or not Path(self._events.path).exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._events = RecordWriter(str(self._folder / f"events.out.tfevents.{time.time_ns()}"))
            # TensorBoard forgets what an interrupted run logged beyond this start.
            begin = SessionLog(status=SessionLog.START)
            events = [
                Event(wall_time=now, file_version="brain.Event:2"),
                Event(step=self._start + 1, session_log=begin),
            ]
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        for event in [*events, Event(step=step, wall_time=now, summary=summary)]:
            self._events.write(event.SerializeToString())
        self._events.flush()
        self._start = step  # should another file be begun

    def is_whole(self) -> bool:
        """Whether no line of METRICS waits in memory. From any thread."""
        return self._journal.is_whole()

    def unsaved(self) -> list[str]:
        """What could not be written, in words."""
        failed = {TENSORBOARD: self._failed, "Weights & Biases": self._lost_wandb}
        unsaved = [f"{where}: {why}" for where, why in failed.items() if why]
        try:
            self._journal.flush()
        except OSError as error:
            unsaved.append(f"{METRICS}: {error.strerror}")
        return unsaved

    def close(self) -> None:
        """Let go of files and services; what W&B has not sent yet is sent now."""
        if self._events is not None:
            try:
                self._events.close()
            except OSError as error:
                self._failed = self._failed or brief(error)
        self._ask_wandb(lambda run: run.finish())


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """A record's figures by name: "train/block_0/loss", "train/lr", "val/top1", "test/accuracy_after_step_1"..."""
    split = line.get("split", "train")
    values = {f"{split}/{name}": value for name, value in line.items() if name not in ("step", "split")}
    for block, means in values.pop("train/blocks", {}).items():
        values |= {f"train/block_{block}/{name}": value for name, value in means.items()}
    for name in [name for name, value in values.items() if isinstance(value, list) and name.endswith("_by_step")]:
        for i, value in enumerate(values.pop(name), 1):
            values[f"{name.removesuffix('_by_step')}_after_step_{i}"] = value
    values["train/skipped_steps"] = len(values.pop("train/skipped", [])) if split == "train" else None
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


def check_wandb() -> None:
    """Refuse to start without the package, before anything else is done.

    Raises:
      UserError: it is not installed.
    """
    try:
        import wandb  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("config.wandb needs the package: `uv sync --extra wandb`, or leave it out") from None


def _start_wandb(workdir: Path, config: dict[str, Any]) -> Any:
    import wandb  # pyright: ignore[reportMissingImports]

    path = workdir / WANDB_ID
    try:
        if not path.exists():
            write_whole(path, secrets.token_hex(4))
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "dblocks_jax"),
            id=path.read_text(),
            name=workdir.name,
            dir=str(workdir),
            config=config,
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )
    except Exception as error:  # of the disk, of the network, of the service, of a missing login
        raise UserError(
            f"Weights & Biases cannot start ({brief(error)}): `wandb login`, or set WANDB_MODE=offline"
        ) from error
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run

"""The running record of training: means over windows of steps, written as they arrive, never waiting for the device."""

import time
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from dblocks_jax.objective import Metrics
from dblocks_jax.workdir import METRICS, append_json

WINDOWS_AHEAD = 2  # how far the host may run ahead of the device before it waits, so that batches cannot pile up


class Progress:
    """Collects each step's metrics and logs means by block for every window of `log_every` steps."""

    def __init__(
        self, workdir: Path, *, start: int, total_steps: int, steps_per_epoch: int, log_every: int, images_per_step: int
    ):
        self._path = workdir / METRICS
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._log_every = log_every
        self._images_per_step = images_per_step
        self._window: list[tuple[int, Metrics]] = []
        self._closed: deque[tuple[int, float, list[tuple[int, Metrics]]]] = deque()
        self._last_step, self._last_time = start, time.perf_counter()

    def add(self, step: int, block: int, lr: float, metrics: Metrics) -> None:
        """Take the metrics of update number `step` (from 1); they may still be under way."""
        self._window.append((block, metrics))
        if step % self._log_every == 0:
            self._closed.append((step, lr, self._window))
            self._window = []
        while self._closed and (len(self._closed) > WINDOWS_AHEAD or _is_ready(self._closed[0][2])):
            self._write(*self._closed.popleft())

    def flush(self, step: int, lr: float) -> None:
        """Write everything that is left, waiting for it."""
        if self._window:
            self._closed.append((step, lr, self._window))
            self._window = []
        while self._closed:
            self._write(*self._closed.popleft())

    def evaluated(self, step: int, split: str, scores: dict[str, Any]) -> None:
        """Record an evaluation, and start the clock of the next window after it."""
        append_json(self._path, {"step": step, "split": split, **scores})
        by_step = ", ".join(f"{accuracy:.4f}" for accuracy in scores["accuracy_by_step"])
        logging.info("step %d: %s top1 %.4f (after each denoising step: %s)", step, split, scores["top1"], by_step)
        self._last_time = time.perf_counter()

    def _write(self, step: int, lr: float, window: list[tuple[int, Metrics]]) -> None:
        by_block: dict[int, list[dict[str, np.ndarray]]] = defaultdict(list)
        for block, metrics in jax.device_get(window):
            by_block[block].append(metrics)
        means = {
            str(block): {name: float(np.mean([m[name] for m in by_block[block]])) for name in by_block[block][0]}
            for block in sorted(by_block)
        }
        now = time.perf_counter()
        steps_per_second = (step - self._last_step) / (now - self._last_time)
        self._last_step, self._last_time = step, now
        record = {
            "step": step,
            "epoch": step / self._steps_per_epoch,
            "lr": lr,
            "images_per_second": steps_per_second * self._images_per_step,
            "blocks": means,
        }
        append_json(self._path, record)
        blocks = "  ".join(
            f"[{block}] loss {mean['loss']:.4g} ce {mean['ce']:.4f} acc {mean['accuracy']:.3f}"
            for block, mean in means.items()
        )
        logging.info(
            "step %d/%d epoch %.1f  %s  %.0f images/s, %s left",
            step, self._total_steps, record["epoch"], blocks, record["images_per_second"],
            _clock((self._total_steps - step) / steps_per_second),
        )  # fmt: skip


def _is_ready(window: list[tuple[int, Metrics]]) -> bool:
    return all(value.is_ready() for value in window[-1][1].values())  # pyright: ignore[reportAttributeAccessIssue]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"

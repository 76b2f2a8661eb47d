"""The running record of training: means over windows of steps, written as they arrive, never waiting for the device."""

import math
import time
from collections import defaultdict, deque
from typing import Any

import jax
import numpy as np
from absl import logging

from dblocks_jax.run.logs import Logs
from dblocks_jax.training.display import Display, memory_in_use
from dblocks_jax.training.health import Health
from dblocks_jax.training.pace import is_home
from dblocks_jax.training.step import SKIPPED, WORST_LEVEL, Log

WINDOWS_AHEAD = 2  # how far the host may run ahead of the device before it waits, so that batches cannot pile up


Entry = tuple[int, tuple[int, ...], int, Log]  # number of the first step, blocks, number of steps, their metrics


class Progress:
    """Collects each step's metrics and logs means by block for every window of `log_every` steps."""

    def __init__(
        self,
        logs: Logs,
        display: Display,
        *,
        steps_per_epoch: int,
        log_every: int,
        examples_per_step: int,
        health: Health,
    ):
        self._logs = logs
        self._display = display
        self._health = health
        self._steps_per_epoch = steps_per_epoch
        self._log_every = log_every
        self._examples_per_step = examples_per_step
        self._window: list[Entry] = []
        self._closed: deque[tuple[int, float, float, list[Entry]]] = deque()
        self._latest = (0, 0.0, 0.0)  # step, lr, waited
        self._waited = 0.0  # of the feed, when the last window was closed
        # Where the clock of the throughput stands. It starts with the first window that has come home, so that
        # compilation is not counted.
        self._since: tuple[int, float] | None = None

    def add(self, step: int, blocks: tuple[int, ...], count: int, lr: float, metrics: Log, waited: float) -> None:
        """Take the metrics of the `count` steps up to number `step` (from 1), which may still be under way.

        Each metric is [k] for one block or [blocks, k] for several, of which the first `count` columns count. `lr` is
        that of the last step, `waited` the seconds that all steps so far have waited for data.

        Raises:
          Diverged: see `Health`.
        """
        self._window.append((step - count + 1, blocks, count, metrics))
        self._latest = (step, lr, waited)
        if step % self._log_every == 0:
            self._close(*self._latest)
        home = 0
        while home < len(self._closed) and (
            len(self._closed) - home > WINDOWS_AHEAD or is_home(self._closed[home][-1][-1][-1])
        ):
            home += 1
        self._write_first(home)

    def flush(self) -> None:
        """Write everything that is left, waiting for it."""
        if self._window:
            self._close(*self._latest)
        self._write_first(len(self._closed))

    def _close(self, step: int, lr: float, waited: float) -> None:
        self._closed.append((step, lr, waited - self._waited, self._window))
        self._window, self._waited = [], waited

    def evaluated(self, step: int, split: str, scores: dict[str, Any], told: str) -> None:
        """Record an evaluation, `told` in words, and start the clock anew after it."""
        self._logs.add({"step": step, "split": split, **scores})
        logging.info("step %d: %s %s", step, split, told)
        self._since = None if self._since is None else (self._since[0], time.perf_counter())

    def _write_first(self, count: int) -> None:
        """Write the oldest `count` closed windows, all at the rate at which they came home together."""
        if not count:
            return
        windows = [self._closed.popleft() for _ in range(count)]
        jax.block_until_ready(windows[-1][-1])
        last, now = windows[-1][0], time.perf_counter()
        rate, share_waited = None, None
        if self._since:
            seconds = now - self._since[1]
            rate = (last - self._since[0]) / seconds
            share_waited = sum(waited for _, _, waited, _ in windows) / seconds
        self._since = (last, now)
        for step, lr, _, window in windows:
            self._write(step, lr, window, rate, share_waited)

    def _write(
        self, step: int, lr: float, window: list[Entry], steps_per_second: float | None, share_waited: float | None
    ) -> None:
        by_block: dict[int, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
        skipped = []
        for first_step, blocks, count, metrics in jax.device_get(window):
            values = {name: np.reshape(value, (len(blocks), -1))[:, :count] for name, value in metrics.items()}
            for i, block in enumerate(blocks):
                of_block = {name: value[i] for name, value in values.items()}
                skipped += self._health.take(first_step, block, of_block)
                for name in of_block.keys() - {SKIPPED, WORST_LEVEL}:
                    by_block[block][name].append(of_block[name][of_block[SKIPPED] == 0])
        means = {
            str(block): {name: _mean(np.concatenate(values)) for name, values in sorted(by_block[block].items())}
            for block in sorted(by_block)
        }
        line = {
            "step": step,
            "epoch": step / self._steps_per_epoch,
            "lr": lr,
            # By the name that logs have had since there were images alone.
            "images_per_second": None if steps_per_second is None else steps_per_second * self._examples_per_step,
            "input_wait": share_waited,
            "memory_bytes": memory_in_use(),
            "blocks": means,
        }
        self._logs.add(line | {"skipped": skipped} if skipped else line)
        self._display.show(line, steps_per_second)
        self._health.check()


def _mean(values: np.ndarray) -> float:
    """The mean of the steps that counted; not a number where all were skipped."""
    return float(np.mean(values)) if values.size else math.nan

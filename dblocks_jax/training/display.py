"""What a person sees while a run trains: a live display in a terminal, else a plain line every few seconds."""

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import logging
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from dblocks_jax.run.processes import is_first
from dblocks_jax.tasks.task import Corruption

LINE_SECONDS = 5  # a plain line at most so often
REFRESH_PER_SECOND = 4
MIB = 2**20


class Display:
    """Shows the latest figures. As a context manager it owns the last lines of the terminal, if there is one."""

    def __init__(self, *, total_steps: int, start: int):
        self._total_steps = total_steps
        self._shares: list[str] = []  # of each block, in words
        self._blocks: dict[str, dict[str, float]] = {}  # the latest means of each
        self._summary = ""
        self._last_line = 0.0
        console = Console(stderr=True)
        self._bar = Progress(
            BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), console=console
        )
        self._task = self._bar.add_task("", total=total_steps, completed=start, text="compiling")
        self._live: Live | None = None
        if console.is_terminal and is_first():
            self._live = Live(
                console=console, get_renderable=self._render, refresh_per_second=REFRESH_PER_SECOND, transient=True
            )
        self._handler: Any = logging.get_absl_handler().python_handler

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.start()
            # A signal may end the process at once, with nobody left to bring the cursor back.
            self._live.console.show_cursor(True)
            self._was_stream = self._handler.stream
            self._handler.setStream(sys.stderr)  # which Live has replaced: what is logged appears above it
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._handler.setStream(self._was_stream)

    def describe_blocks(self, corruption: Corruption | None) -> None:
        """Tell whose share is what from now on; nothing of a plain network."""
        self._blocks = {}
        self._shares = [] if corruption is None else [corruption.describe(b) for b in range(corruption.num_blocks)]

    def show(self, line: dict[str, Any], steps_per_second: float | None) -> None:
        """Show the means over a window of steps."""
        step, examples_per_second = line["step"], line["images_per_second"]
        self._blocks |= line["blocks"]
        left = "" if steps_per_second is None else f"{clock((self._total_steps - step) / steps_per_second)} left"
        self._bar.update(self._task, completed=step, text=f"epoch {line['epoch']:.1f}  {left}")
        about = [f"lr {line['lr']:.3g}"]
        if examples_per_second is not None:
            about.append(f"{examples_per_second:,.0f} examples/s")
        if line["input_wait"]:
            about.append(f"{line['input_wait']:.1%} waiting for data")
        about.append(f"{line['memory_bytes'] / MIB:,.0f} MiB")
        self._summary = "  ".join(about)
        now = time.monotonic()
        if self._live is None and (now - self._last_line >= LINE_SECONDS or step == self._total_steps):
            self._last_line = now
            means = "  ".join(
                f"[{block}] " + " ".join(f"{name} {mean[name]:.4g}" for name in figures(mean))
                for block, mean in sorted(self._blocks.items(), key=lambda item: int(item[0]))
            )
            head = f"step {step}/{self._total_steps} epoch {line['epoch']:.1f}"
            logging.info("%s", "  ".join(filter(None, (head, means, *about, left))))

    def doing(self, text: str) -> Callable[[], None]:
        """Show what is being done other than steps. What is returned is to be called at each batch of it."""
        began, count = time.monotonic(), 0
        self._bar.update(self._task, text=text)

        def at_each_batch() -> None:
            nonlocal count
            count, now = count + 1, time.monotonic()
            line = f"{text}: batch {count}, after {clock(now - began)}"
            self._bar.update(self._task, text=line)
            if self._live is None and now - max(began, self._last_line) >= LINE_SECONDS:
                self._last_line = now
                logging.info("%s", line)

        return at_each_batch

    def _render(self) -> Group:
        table = Table(box=None, header_style="dim")
        names = figures(next(iter(self._blocks.values()), {}))
        for name in ("block", *(["share"] if self._shares else []), *names):
            table.add_column(name, justify="right")
        for block, mean in sorted(self._blocks.items(), key=lambda item: int(item[0])):
            share = [self._shares[int(block)]] if self._shares else []
            table.add_row(block, *share, *[f"{mean[name]:.4g}" for name in names])
        return Group(*([table, self._summary] if self._blocks else []), self._bar)


def figures(mean: dict[str, float]) -> list[str]:
    """The names of a block's figures, the loss first."""
    return sorted(mean, key=lambda name: (name != "loss", name))


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def memory_in_use() -> int:
    """Bytes of the first device at their peak so far; where it does not count, those this process has now.

    On a CPU that is the same memory.
    """
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    if Path("/proc/self/statm").exists():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes, at their peak

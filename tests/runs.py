"""Tiny runs of launch.py in processes of their own, to be stopped, starved and killed."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = {
    "num_layers": 2, "num_blocks": 2, "hidden_size": 12, "num_heads": 2, "intermediate_size": 16, "batch_size": 700,
    "num_warmup_steps": 0, "scheduler_type": "constant_with_warmup", "log_every_n_steps": 5, "steps_per_call": 5,
    "save_every_n_epochs": 5,
}  # fmt: skip


def command(workdir: Path, *args: str, **fields: object) -> list[str]:
    """A launch of dblock_digits at tiny size, with `fields` changed."""
    settings = [f"--config.{field}={value}" for field, value in (TINY | fields).items()]
    return [sys.executable, "launch.py", "--config=configs/dblock_digits.py", f"--workdir={workdir}", *settings, *args]


def finish(*args: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """Run a command to its end."""
    return subprocess.run(
        args, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@contextmanager
def started(
    *args: str, quiet: bool = False, stderr: int | None = None, **environment: str
) -> Iterator[subprocess.Popen]:
    """A command under way; killed at the end, should it still run. What it prints waits to be read, unless `quiet`."""
    output = subprocess.DEVNULL if quiet else subprocess.PIPE
    pipes = {"stdout": output, "stderr": output if stderr is None else stderr}
    process = subprocess.Popen(args, cwd=ROOT, env=os.environ | environment, text=True, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def files_of_at_most(size: int):
    """The system refuses longer files, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    no_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # Python would leave it cut short, for ever
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[0][1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        sys.dont_write_bytecode = no_bytecode
        signal.signal(signal.SIGXFSZ, before[1])


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Look every few milliseconds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.005)


def saved_steps(workdir: Path) -> list[int]:
    """Steps with a complete checkpoint."""
    return sorted(int(path.name) for path in (workdir / "state").glob("*") if path.name.isdecimal())


def logged(workdir: Path) -> list[dict]:
    """The whole lines of a run's log, which may be growing."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def result_of(done: subprocess.CompletedProcess) -> dict:
    """What a mode printed as its last line."""
    return json.loads(done.stdout.splitlines()[-1])

"""The folder of a run: its config, the record of every start, its metrics and results."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from dblocks_jax.errors import UserError

CONFIG, STARTS, METRICS = "config.json", "starts.jsonl", "metrics.jsonl"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def saved_config(workdir: Path) -> dict[str, Any] | None:
    """The config of the run in `workdir`, or None where there is no run.

    Raises:
      UserError: the file is there but cannot be read.
    """
    path = workdir / CONFIG
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it, or use another --workdir") from None


def open_run(workdir: Path, config: dict[str, Any], *, command: list[str], overrides: dict[str, Any]) -> None:
    """Make the folder, keep the config, and add this start (when, what, with what, on what) to the record.

    Raises:
      UserError: the folder cannot be written.
    """
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command,
        "overrides": overrides,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "devices": [f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()],
        "host": platform.node(),
        "git": git_state(),
    }
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / CONFIG, config)
        append_json(workdir / STARTS, start)
    except OSError as error:
        raise UserError(
            f"cannot write the run's folder {workdir}: {error.strerror}; choose another --workdir"
        ) from None


def git_state() -> dict[str, Any] | None:
    """Commit of the program and whether its files were changed since; None outside a git checkout."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=Path(__file__).parent, check=True, capture_output=True, text=True, timeout=10
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    _write_whole(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def append_json(path: Path, value: Any) -> None:
    """Add one line of JSON."""
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")


def forget_metrics_after(workdir: Path, step: int) -> None:
    """Drop logged lines beyond `step`, which a resumed run logs anew, and a last line cut short by a crash."""
    path = workdir / METRICS
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        _write_whole(path, "".join(line + "\n" for line in lines))


def _step_of(line: str) -> int | float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")


def finish(workdir: Path, result: dict[str, Any]) -> None:
    """Keep a mode's result in the workdir and print it as the last line of standard output."""
    write_json(workdir / f"{result['mode']}.json", result)
    sys.stderr.flush()
    print(json.dumps(result), flush=True)

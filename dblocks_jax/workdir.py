"""The folder of a run: its config, the record of every start, its metrics and results.

Of several processes that train together the first one writes; in the others every function that writes does nothing.
"""

import json
import math
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
from dblocks_jax.processes import is_first

CONFIG, DATA, STARTS, METRICS = "config.json", "data.json", "starts.jsonl", "metrics.jsonl"
SHARED_SECONDS = 30  # a network disk may take so long to show what another machine wrote
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def read_saved(workdir: Path, name: str) -> dict[str, Any] | None:
    """A JSON file of the run in `workdir` (CONFIG or DATA), or None where there is none.

    Raises:
      UserError: the file is there but cannot be read.
    """
    path = workdir / name
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it, or use another --workdir") from None


def open_run(
    workdir: Path, config: dict[str, Any], data: dict[str, Any], *, command: list[str], overrides: dict[str, Any]
) -> None:
    """Make the folder, keep config and data card, and add this start (when, what, with what, on what) to the record.

    Raises:
      UserError: the folder cannot be written, or another process does not see what the first one wrote.
    """
    if not is_first():
        return _see(workdir / STARTS)
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
        write_json(workdir / DATA, data)
        append_json(workdir / STARTS, start)
    except OSError as error:
        raise UserError(
            f"cannot write the run's folder {workdir}: {error.strerror}; choose another --workdir"
        ) from None


def _see(path: Path) -> None:
    seen_by = time.monotonic() + SHARED_SECONDS
    while not path.exists():
        if time.monotonic() > seen_by:
            raise UserError(f"{path} is not there for all processes: --workdir must be on a disk that they share")
        time.sleep(1)


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
    """Write a file whole or not at all. Numbers that are not finite become null, which JSON has."""
    _write_whole(path, json.dumps(_finite(value), indent=2, sort_keys=True, allow_nan=False) + "\n")


def _write_whole(path: Path, text: str) -> None:
    if not is_first():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def append_json(path: Path, value: Any) -> None:
    """Add one line of JSON. Numbers that are not finite become null."""
    if not is_first():
        return
    with path.open("a") as file:
        file.write(json.dumps(_finite(value), allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    """Print a mode's result as the last line of standard output, and keep it in the workdir.

    Raises:
      UserError: it cannot be kept.
    """
    if not is_first():
        return
    sys.stderr.flush()
    print(json.dumps(_finite(result), allow_nan=False), flush=True)
    path = workdir / f"{result['mode']}.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
    except OSError as error:
        raise UserError(f"the result is printed, but cannot be written to {path}: {error.strerror}") from None

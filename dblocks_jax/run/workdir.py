"""The folder of a run: its config, the record of every start, its metrics and results.

Of several processes that train together the first one writes; in the others every function that writes does nothing.
"""

import errno
import fcntl
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from absl import logging

from dblocks_jax.run.errors import Unsaved, UserError, brief
from dblocks_jax.run.processes import is_first

CONFIG, DATA, STARTS, METRICS = "config.json", "data.json", "starts.jsonl", "metrics.jsonl"
LOCK = "in_use_by.json"
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


@contextmanager
def claim(workdir: Path) -> Iterator[None]:
    """Keep other runs out of the folder, which is made if need be. The system ends the claim with the process.

    Raises:
      UserError: another run holds it, which is named; or the folder cannot be written.
    """
    if not is_first():
        yield
        return
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                logging.warning("%s is on a disk without locks: see to it yourself that no other run uses it", workdir)
            else:
                file.seek(0)
                raise UserError(
                    f"{workdir} is in use by another run: {file.read().strip() or 'it does not say which'}. "
                    "Wait for it, or set --workdir or --config.postfix for a run of its own"
                ) from None
        with writing(workdir):
            file.truncate(0)
            owner = {"process": os.getpid(), "host": platform.node(), "since": _now()}
            file.write(json.dumps(owner) + "\n")
            file.flush()
        yield


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


@contextmanager
def writing(workdir: Path) -> Iterator[None]:
    """Where a run is opened: a disk that fails is the user's to mend.

    Raises:
      UserError: the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or brief(error)
        raise UserError(f"cannot write the run's folder {workdir}: {reason}; choose another --workdir") from error


def open_run(
    workdir: Path,
    config: dict[str, Any],
    data: dict[str, Any],
    *,
    was: dict[str, Any] | None,
    command: list[str],
    overrides: dict[str, Any],
) -> None:
    """Keep config and data card, and add this start (when, what, with what, on what) to the record.

    `was` is the config that lay there when it was compared with this one, before the folder was claimed.

    Raises:
      UserError: the folder cannot be written, another run came in between, or another process does not see what the
        first one wrote.
    """
    if not is_first():
        return _see(workdir / STARTS)
    if read_saved(workdir, CONFIG) != was:
        raise UserError(f"another run has begun in {workdir} meanwhile: run the command again")
    start = {
        "time": _now(),
        "command": command,
        "overrides": overrides,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "devices": [f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()],
        "host": platform.node(),
        "git": git_state(),
    }
    with writing(workdir):
        write_json(workdir / CONFIG, config)
        write_json(workdir / DATA, data)
        Journal(workdir / STARTS).append(start)


def restore_if_lost(workdir: Path, config: dict[str, Any], data: dict[str, Any]) -> None:
    """Write config and data card again, should somebody have deleted the folder: no checkpoint is of use without them.

    Where that cannot be done, nor can a checkpoint be saved, which says so.
    """
    if is_first() and not (workdir / CONFIG).exists():
        logging.error("%s is gone: making it anew", workdir / CONFIG)
        with suppress(OSError):
            workdir.mkdir(parents=True, exist_ok=True)
            write_json(workdir / CONFIG, config)
            write_json(workdir / DATA, data)


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}")  # evaluations may run at the same time
    temporary.write_text(text)
    temporary.replace(path)


class Journal:
    """A file of JSON lines that grows. Lines that cannot be written are kept, and written when that works again."""

    def __init__(self, path: Path):
        self._path = path
        self._waiting: list[str] = []

    def add(self, value: Any) -> None:
        """Add one line, now or later. Numbers that are not finite become null."""
        failed_before = bool(self._waiting)
        try:
            self.append(value)
        except OSError as error:
            if not failed_before:
                logging.error("cannot write %s (%s): its lines wait in memory", self._path, error.strerror)

    def append(self, value: Any) -> None:
        """Add one line, after those that wait.

        Raises:
          OSError: it waits too.
        """
        if is_first():
            self._waiting.append(json.dumps(_finite(value), allow_nan=False) + "\n")
            self.flush()

    def is_whole(self) -> bool:
        """Whether all lines are written. From any thread."""
        return not self._waiting

    def flush(self) -> None:
        """Write what waits.

        Raises:
          OSError: it still waits, and the file is as it was.
        """
        if not self._waiting:
            return
        with self._path.open("ab", buffering=0) as file:
            size = file.tell()
            lines = "".join(self._waiting).encode()
            try:
                written = file.write(lines)
                if written < len(lines):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)
                raise
        self._waiting.clear()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def forget_metrics_after(workdir: Path, step: int) -> None:
    """Drop logged lines beyond `step`, which a resumed run logs anew, and what a crash cut short."""
    path = workdir / METRICS
    if path.exists():
        lines = [json.dumps(line) + "\n" for line in logged(workdir) if line["step"] <= step]
        _write_whole(path, "".join(lines))


def logged(workdir: Path) -> list[dict[str, Any]]:
    """The whole lines of METRICS."""
    path = workdir / METRICS
    texts = path.read_text(errors="replace").splitlines() if path.exists() else []
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def scores(workdir: Path, split: str, name: str) -> dict[int, float]:
    """Step -> a figure of a split, as far as it is on record."""
    lines = [line for line in logged(workdir) if line.get("split") == split]
    return {line["step"]: line[name] for line in lines if isinstance(line.get(name), int | float)}


def finish(workdir: Path, result: dict[str, Any]) -> None:
    """Print a mode's result as the last line of standard output, and keep it in the workdir.

    Raises:
      Unsaved: it cannot be kept, or something of the run could not be.
    """
    if not is_first():
        return
    try:
        print(json.dumps(_finite(result), allow_nan=False), flush=True)
    except BrokenPipeError:  # nobody reads on, as behind `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    name = f"{result['mode']}.json"
    unsaved = list(result.get("unsaved", []))
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / name, result)
    except OSError as error:
        unsaved.append(f"{name}, which is the line above: {error.strerror}")
    if unsaved:
        raise Unsaved(f"not everything could be saved in {workdir}: {'; '.join(unsaved)}")

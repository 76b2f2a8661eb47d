"""The folder of a run: its config, the record of every start, its metrics and results.

Of several processes that train together the first one writes; in the others every function that writes does nothing.
"""

import errno
import fcntl
import json
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

from dblocks_jax.run.errors import NOT_FINITE, Diverged, InUse, Unsaved, UserError, brief
from dblocks_jax.run.files import Journal, finite, reason, write_json, write_whole
from dblocks_jax.run.processes import is_first

CONFIG, DATA, STARTS, METRICS = "config.json", "data.json", "starts.jsonl", "metrics.jsonl"
LOCK = "in_use_by.json"
SHARED_SECONDS = 30  # a network disk may take so long to show what another machine wrote
SHOWN_WHOLE = 16  # numbers of a list that the line of a result shows
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def read_saved(workdir: Path, name: str) -> dict[str, Any] | None:
    """An object in a JSON file of the run in `workdir` (CONFIG, DATA, a result), or None where there is none.

    Raises:
      UserError: the file is there but cannot be read.
    """
    path = workdir / name
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text()) if path.is_file() else None  # a named pipe would never end
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}, not an object")
        if name == DATA and not isinstance(value.get("images"), int):
            raise ValueError("it lacks images")
    except (OSError, ValueError, RecursionError) as error:  # the last one of a thousand brackets
        raise UserError(f"{path} cannot be read ({brief(error)}); restore it, or use another --workdir") from None
    return value


@contextmanager
def claim(workdir: Path) -> Iterator[None]:
    """Keep other runs out of the folder, which is made if need be. The system ends the claim with the process.

    Raises:
      InUse: another run holds it, which is named.
      UserError: the folder cannot be written.
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
                raise InUse(
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
        why = reason(error, workdir)
        raise UserError(f"cannot write the run's folder {workdir}: {why}; choose another --workdir") from error


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


def forget_metrics_after(workdir: Path, step: int) -> None:
    """Drop logged lines beyond `step`, which a resumed run logs anew, and what a crash cut short."""
    path = workdir / METRICS
    if path.exists():
        lines = [json.dumps(line) + "\n" for line in logged(workdir) if line["step"] <= step]
        write_whole(path, "".join(lines))


def logged(workdir: Path) -> list[dict[str, Any]]:
    """The whole lines of METRICS."""
    lines = read_lines(workdir / METRICS)
    return [line for line in lines if isinstance(line.get("step"), int) and 0 <= line["step"] < 2**31]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines. What a crash cut short, or a stranger made up, is left out."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError, RecursionError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]


def scores(workdir: Path, split: str, name: str) -> dict[int, float]:
    """Step -> a figure of a split, as far as it is on record."""
    of_split = [line for line in logged(workdir) if line.get("split") == split]
    found = {line["step"]: line[name] for line in of_split if isinstance(line.get(name), int | float)}
    return {step: float(value) for step, value in found.items() if abs(value) <= sys.float_info.max}


def shortened(values: list[Any]) -> list[tuple[int, Any]]:
    """(place, value) of a list's entries, from 1; of a long one the first, the middle and the last."""
    places = range(1, len(values) + 1)
    return [
        (place, values[place - 1])
        for place in (places if len(values) <= SHOWN_WHOLE else (1, len(values) // 2, len(values)))
    ]


def _to_show(value: Any) -> Any:
    """A result for the eyes: of a long list of numbers, three by their places."""
    if isinstance(value, dict):
        return {key: _to_show(item) for key, item in value.items()}
    if isinstance(value, list) and len(value) > SHOWN_WHOLE and all(isinstance(item, int | float) for item in value):
        return {str(place): item for place, item in shortened(value)}
    return value


def finish(workdir: Path, result: dict[str, Any]) -> None:
    """Print a mode's result as the last line of standard output, long lists cut, and keep all of it in the workdir.

    Raises:
      Diverged: it says that the model's own answers are not finite.
      Unsaved: it cannot be kept, or something of the run could not be.
    """
    if not is_first():
        return
    name = f"{result['mode']}.json"
    unsaved = list(result.get("unsaved", []))
    try:
        print(json.dumps(finite(_to_show(result)), allow_nan=False), flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # nobody reads on, as behind `| head`
            unsaved.append(f"the line of the result: {error.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / name, result)
    except OSError as error:
        unsaved.append(f"{name}, which is the line above: {reason(error, workdir)}")
    lost = f"not everything could be saved in {workdir}: {'; '.join(unsaved)}" if unsaved else ""
    if result.get("diverged"):
        raise Diverged("; ".join(filter(None, (f"{workdir}: {NOT_FINITE}", lost))))
    if unsaved:
        raise Unsaved(lost)

"""How a file is written, in every mode: whole or not at all, and what is said when the disk fails."""

import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from absl import logging

from dblocks_jax.run.errors import Unsaved, UserError, brief
from dblocks_jax.run.processes import is_first

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # whatever was being written, the disk is to blame
NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENOTDIR)  # whatever was asked, the name is


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file: to another name beside it, which then takes its place. The first process alone does.

    Text is written as UTF-8; bytes of file names that are no text become question marks.

    Raises:
      OSError: it could not be written; what was there before is as it was.
    """
    if not is_first():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")  # evaluations may run at the same time
    try:
        temporary.write_bytes(content.encode("utf-8", "replace") if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # half a file would keep a full disk full
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all. Numbers that are not finite become null, which JSON has.

    Raises:
      OSError: it could not be written.
    """
    write_whole(path, json.dumps(finite(value), indent=2, sort_keys=True, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """A value for JSON: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Where a mode writes what it was asked for.

    Raises:
      Unsaved: the disk does not take it.
    """
    try:
        yield
    except OSError as error:
        raise Unsaved(f"cannot write {path}: {reason(error, path.parent)}") from error


@contextmanager
def naming_lack_of_room() -> Iterator[None]:
    """Wherever else a mode writes, as libraries and what prints do; and whatever path is looked at, by any mode.

    Raises:
      Unsaved: the disk is full or may not be written.
      UserError: a path cannot be, or may not be looked at.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_PATH and error.filename:
            raise UserError(f"cannot use {error.filename}: {error.strerror}") from error
        if error.errno not in NO_ROOM:
            raise
        where = f" {error.filename}" if error.filename else ""
        raise Unsaved(f"cannot write{where}: {error.strerror}") from error


def reason(error: OSError, folder: Path) -> str:
    """Why a folder, or a file in it, could not be made, in words."""
    return obstacle(folder) or error.strerror or brief(error)


def obstacle(folder: Path) -> str | None:
    """What lies where a folder, or one above it, should be: the system says "File exists" to all of it."""
    for place in (folder, *folder.parents):
        if os.path.islink(place) and not os.path.exists(place):
            return f"{place} is a link to {os.readlink(place)}, which is not there"
        if os.path.exists(place) and not os.path.isdir(place):
            return f"{place} is a file, not a folder"
    return None


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
            self._waiting.append(json.dumps(finite(value), allow_nan=False) + "\n")
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

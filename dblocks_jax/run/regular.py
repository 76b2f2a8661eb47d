"""A stranger's file, looked at before it is opened."""

import os
import stat
from pathlib import Path

from dblocks_jax.run.errors import UserError
from dblocks_jax.run.naming import shown

# To open some of these would wait for ever, or set a machine in motion.
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_regular(path: Path, what: str) -> os.stat_result:
    """What the system tells of a regular file, or of the one that a link leads to; `what` says what it should be.

    Raises:
      UserError: it is no such file, is empty (as those of /proc are, which may wait for ever), or is not there.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        why = "it is a link to nothing" if path.is_symlink() else "there is no such file"
        raise UserError(f"cannot read {what} {shown(path)}: {why}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {what} {shown(path)}: {getattr(error, 'strerror', None) or error}") from error
    for is_kind, kind in KINDS:
        if is_kind(found.st_mode):
            raise UserError(f"cannot read {what} {shown(path)}: it is {kind}, not a file")
    if not found.st_size:
        raise UserError(f"cannot read {what} {shown(path)}: it is empty")
    return found


def check_only_regular(folder: Path) -> None:
    """Refuse what would be waited for for ever: a checkpoint may be a stranger's, and Orbax opens whatever is there.

    Raises:
      ValueError: naming a linked folder, or a file that is a pipe, a device or the like.
    """
    for parent, folders, files in os.walk(folder):
        for name in folders:
            if os.path.islink(os.path.join(parent, name)):
                raise ValueError(f"{name} is a link, not a folder")
        for name in files:
            if not stat.S_ISREG(os.stat(os.path.join(parent, name)).st_mode):
                raise ValueError(f"{name} is not a regular file")

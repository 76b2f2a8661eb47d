"""How a run may end early: each exception is one line for the user and an exit code of its own."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from dblocks_jax.run.naming import shown_lines

# What the modes that ask a model for answers say of one that has none.
NOT_FINITE = (
    "the model's answers are not finite numbers: its training diverged. Choose an earlier --checkpoint, or train anew "
    "with a lower lr"
)


# What is raised by a field of a stranger's file that is missing, not of its type, or nested too deeply.
MALFORMED = (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError)


class UserError(Exception):
    """A mistake in the command, config, data or workdir: the launcher prints it as one line and exits with code 1.

    The message says what is wrong, where (field, path, class), and what to do about it. Names in it, which a
    stranger may have chosen, are shown escaped.
    """

    exit_code = 1

    def __init__(self, message: object):
        super().__init__(shown_lines(message))


class Unusable(UserError):
    """A checkpoint that cannot be used: damaged, of another model, or of another version of this program."""


class InUse(UserError):
    """Another run holds the folder."""


class Unsaved(Exception):
    """The run went on, but something of it could not be written: it is named, and what was there before is intact."""

    exit_code = 3


class Diverged(Exception):
    """The numbers of one training step after another, or the answers of the trained model, are not finite."""

    exit_code = 4


class Stopped(Exception):
    """A signal asked for the end: the state is saved, and the same command goes on from there."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again


@contextmanager
def naming_malformed(what: object) -> Iterator[None]:
    """Where the fields of a stranger's file, which is `what`, are used for the first time.

    Raises:
      UserError: a field is missing, or is not what it should be.
    """
    try:
        yield
    except MALFORMED as error:
        raise UserError(f"{what} cannot be used ({brief(error)})") from error


def brief(error: BaseException) -> str:
    """An error of a library on one line, cut between words."""
    return shown_lines(textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ..."))

"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """A mistake in the command, config, data or workdir: the launcher prints it as one line and exits with code 1.

    The message says what is wrong, where (field, path, class), and what to do about it.
    """

"""The config that a run starts from, by its task."""

from collections.abc import Callable

from ml_collections import ConfigDict

from dblocks_jax.fields import classify, common, generate, mask, next_token, recurrent
from dblocks_jax.run.errors import UserError

# task -> all of its fields
DEFAULTS: dict[str, Callable[[], ConfigDict]] = {
    "classify": classify.get_config,
    "generate": generate.get_config,
    "mask": mask.get_config,
    "next_token": next_token.get_config,
    "recurrent": recurrent.get_config,
}


def default_config(task: str | None = None) -> ConfigDict:
    """Every field of a task with its default; of no task those that all have, for a task of one's own.

    The tasks are "classify", "generate", "mask", "next_token" and "recurrent". `config.FIELD = VALUE` or
    `config.update(FIELD=VALUE)` sets a field: of a task of ours, an unknown one is refused with an AttributeError or a
    KeyError, and a value of another type with a TypeError; what cannot work, when training starts.
    docs/configuration.md explains every field.

    Raises:
      UserError: there is no such task.
    """
    if task is None:
        return common.get_config()
    if task not in DEFAULTS:
        raise UserError(f"there is no task {task!r}: choose one of {', '.join(DEFAULTS)}, or none for one of your own")
    return DEFAULTS[task]().lock()

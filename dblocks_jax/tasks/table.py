"""The tasks that a config can name."""

from ml_collections import ConfigDict

from dblocks_jax.run.errors import UserError
from dblocks_jax.tasks.classify.task import CLASSIFY
from dblocks_jax.tasks.generate.task import GENERATE
from dblocks_jax.tasks.mask.task import MASK
from dblocks_jax.tasks.next_token.task import NEXT_TOKEN
from dblocks_jax.tasks.recurrent.task import RECURRENT
from dblocks_jax.tasks.task import Entry

TASKS = {entry.name: entry for entry in (CLASSIFY, GENERATE, MASK, NEXT_TOKEN, RECURRENT)}


def entry_of(config: ConfigDict, own: Entry | None = None) -> Entry:
    """The task that a config names: your `own`, where it is given, else one of ours.

    Raises:
      UserError: there is none of that name.
    """
    name = config.get("task", "")
    if own is not None:
        if name != own.name:
            raise UserError(
                f"task is {name!r} in the config, but {own.name!r} is given: set the one or leave out the other"
            )
        return own
    if not isinstance(name, str) or name not in TASKS:
        raise UserError(f"task is {name!r}; choose one of {', '.join(TASKS)}")
    return TASKS[name]

"""`--mode=train`: start a run, or go on with it."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dblocks_jax.modes.made import MAKES, check_one_process, with_made
from dblocks_jax.run.files import saving, write_json
from dblocks_jax.run.stop import Stop
from dblocks_jax.tasks.generate.task import GENERATE
from dblocks_jax.tasks.table import entry_of
from dblocks_jax.tasks.task import Entry
from dblocks_jax.training import loop


def train(
    config: ConfigDict,
    workdir: str | Path,
    *,
    own: Entry | None = None,
    command: list[str] | None = None,
    overrides: dict[str, Any] | None = None,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Train the run in `workdir` from where it stands to its end, and score it on the test split.

    The config names one of our tasks, or your `own`. Of what generates, samples are scored at the end. The same call
    again goes on with a run that was interrupted, and ends in the same bits. `command` and `overrides` are kept on
    record with the start, nothing else.

    Returns what is known at the end: "checkpoint" (the step that was chosen), the scores of that, such as "top1" (a
    share of 1) or "bits" (of a character), and more, as the launcher prints and keeps it.

    Raises:
      UserError: config, data or workdir do not fit; the message says what to do.
      Stopped: `stop` was asked for; the state has been saved, and the same call goes on.
      Diverged: too many steps in a row had numbers that are not finite.
      Unsaved: something could not be written, and is named.
    """
    entry, workdir = entry_of(config, own), Path(workdir)
    if own is not None:
        return loop.train(entry, config, workdir, command=command, overrides=overrides, stop=stop)
    if entry is GENERATE:
        from dblocks_jax.modes.judge import check_judge

        check_judge(config)
    check_one_process(config)
    result = loop.train(entry, config, workdir, command=command, overrides=overrides, stop=stop)
    if entry.name not in MAKES:
        return result
    with saving(workdir):  # what is trained is not lost where samples cannot be made or judged
        write_json(workdir / "train.json", result)
    return with_made(result, config, workdir)

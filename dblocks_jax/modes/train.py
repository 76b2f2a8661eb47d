"""`--mode=train`: start a run of one of our tasks, or go on with it."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dblocks_jax.modes.made import MAKES, check_one_process, with_made
from dblocks_jax.run.files import saving, write_json
from dblocks_jax.run.stop import Stop
from dblocks_jax.tasks.generate.task import GENERATE
from dblocks_jax.tasks.table import entry_of
from dblocks_jax.training import loop


def train(
    config: ConfigDict,
    workdir: Path,
    *,
    command: list[str] | None = None,
    overrides: dict[str, Any] | None = None,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Train what a config names, see `dblocks_jax.training.loop.train`; of what generates, score samples at the end."""
    entry = entry_of(config)
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

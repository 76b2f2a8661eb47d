"""`--mode=train`: start a run of one of our tasks, or go on with it."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dblocks_jax.run.stop import Stop
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
    """Train what a config names; see `dblocks_jax.training.loop.train`."""
    return loop.train(entry_of(config), config, workdir, command=command, overrides=overrides, stop=stop)

"""`--mode=eval`: score a saved run on its test split."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dblocks_jax.data.source import Data
from dblocks_jax.modes.load import Trained, load_run
from dblocks_jax.modes.made import MAKES, check_one_process, score_made
from dblocks_jax.run.devices import make_mesh
from dblocks_jax.run.processes import check_alike, first_process_first
from dblocks_jax.training.config import ARITHMETIC_FIELDS, arithmetic
from dblocks_jax.training.heldout import scorer_of


def evaluate_run(
    config: ConfigDict, workdir: Path, *, overrides: dict[str, Any], checkpoint: str, train_on_samples: bool = False
) -> dict[str, Any]:
    """Score a saved run on its test split: `checkpoint` is "best", "last" or a step.

    `train_on_samples`: of what generates, also what a classifier learns from samples, see `modes/usefulness.py`.

    Raises:
      UserError: there is no such run or checkpoint, or an override contradicts it.
    """
    mesh = make_mesh()
    trained, run = load_run(workdir, checkpoint=checkpoint, config=config, overrides=overrides, mesh=mesh)
    if train_on_samples:
        from dblocks_jax.modes import usefulness

        usefulness.check_trains_on_samples(trained.entry, trained.config)
    check_one_process(trained.config)
    data = find_data(trained, run, named=config, where=str(workdir))
    with arithmetic(trained.config):
        found = scorer_of(trained.task, trained.blueprint, mesh)(trained.params, data, "test", lambda: None)
    if train_on_samples:
        from dblocks_jax.modes.generation import sample_and_score

        figures, made = sample_and_score(trained, data, workdir)
        found |= figures
        if made is not None:
            found |= usefulness.train_on_samples(trained.config, data, made.images, made.labels)
    elif "diverged" not in found:
        found |= score_made(trained, data, workdir)
    result = {"mode": "eval", "workdir": str(workdir), "checkpoint": trained.step, "split": "test", **found}
    return result | how_scored(trained)


def how_scored(trained: Trained) -> dict[str, Any]:
    """On what, and with which of the fields that evaluation may choose."""
    config = trained.config
    is_sampled = trained.task.corruption is not None or trained.entry.name in MAKES
    return {
        "data_dir": config.data_dir,
        "arithmetic": {field: config[field] for field in ARITHMETIC_FIELDS},
        "sampler": {field: config[field] for field in trained.entry.sampler_fields if is_sampled},
    }


def find_data(trained: Trained, run: dict[str, Any], *, named: ConfigDict, where: str) -> Data:
    """The data of a saved run, checked to be those that it was trained on. `named` is the command's config.

    Raises:
      UserError: they cannot be had, or are others.
    """
    config = trained.config
    check_alike("command", (config.to_dict(), trained.step))
    with first_process_first("data"):
        # A checkpoint may be a stranger's: it cannot choose what is written where.
        data = trained.entry.find_data(config, may_prepare=config.data_dir == named.data_dir)
    data.check_same(run["data"], where)
    trained.entry.warn(ConfigDict(run["config"]), config)
    return data

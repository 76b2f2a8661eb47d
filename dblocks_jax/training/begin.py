"""The parts that a run begins with: fresh ones, or copies of another run's."""

import os
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from dblocks_jax.run.arrays import differences, shapes_by_path
from dblocks_jax.run.checkpoint import Checkpoints, saved_steps
from dblocks_jax.run.errors import UserError, naming_malformed
from dblocks_jax.training.config import check_config, complete
from dblocks_jax.training.optimizer import Part
from dblocks_jax.training.setting import Setting, fresh_parts


def begin(setting: Setting) -> dict[str, Part]:
    """Parts of the first stage: fresh, or, where `begin_from` names a run, copies of its last checkpoint.

    None where the run has a checkpoint: it goes on with that.

    Raises:
      UserError: there is no such run, or its model is not one that this run's blocks can begin as.
    """
    if saved_steps(setting.workdir):
        return {}
    source = setting.config.begin_from
    if not source:
        return setting.fresh(setting.stages[0])
    return _copies(setting, Path(os.path.expanduser(source)))  # ~nobody stays as it is


def _copies(setting: Setting, source: Path) -> dict[str, Part]:
    """Parameters and moments come along; an average begins where the other run's stands, or at its parameters."""
    if not saved_steps(source):
        raise UserError(f"begin_from: {source} holds no run that was saved")
    with Checkpoints(source, read_only=True) as checkpoints:
        step = checkpoints.find("last")
        about = checkpoints.run(step)
        with naming_malformed(f"begin_from: what checkpoint {step} of {source} tells of its run"):
            config = ConfigDict({**setting.config.to_dict(), **complete(about["config"])})
            if config.task != setting.config.task:
                raise UserError(f"begin_from: {source} is of the task {config.task}, not of {setting.config.task}")
            if about["data"].get("vocabulary") != setting.card.get("vocabulary"):
                raise UserError(f"begin_from: {source} has another vocabulary: its embeddings are of other symbols")
            check_config(setting.entry, config)
            task = setting.entry.make(config, setting.entry.card(about["data"]))
            smaller = fresh_parts(setting.entry, config, task)
        parts = checkpoints.restore(step, smaller)
    if setting.config.ema_decay == 0:
        parts = {name: part._replace(average=()) for name, part in parts.items()}
    elif config.ema_decay == 0:
        parts = {name: part._replace(average=jax.tree.map(np.copy, part.params)) for name, part in parts.items()}
    shapes = setting.like(setting.stages[0])
    try:
        copies = setting.grow(parts, shapes, before=config, after=setting.stages[0].config)
    except UserError as error:
        raise UserError(f"begin_from: {source}: {error}") from error
    differing = differences(expected=shapes_by_path(shapes), found=shapes_by_path(copies))
    if differing:
        raise UserError(
            f"begin_from: {source} has other shapes than one of this run's blocks ({len(differing)} differ; "
            f"{differing[0]}): its depth must be num_layers / num_blocks, its sizes the same"
        )
    return copies

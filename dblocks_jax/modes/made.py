"""Scores of what a trained model makes, by task. Each imports what it needs when it is called: charts take a while."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dblocks_jax.modes.load import Trained, load_run
from dblocks_jax.run.errors import UserError
from dblocks_jax.run.processes import are_several
from dblocks_jax.training.config import FREE_TO_CHANGE

MAKES = ("generate", "mask", "next_token", "recurrent")  # tasks whose models make something


def check_one_process(config: ConfigDict) -> None:
    """Refuse to score what is made by several processes.

    Raises:
      UserError: with what to do.
    """
    if config.task in MAKES and config.score_samples and are_several():
        raise UserError("samples are scored by one process: set score_samples=0 here, and score by --mode=eval in one")


def score_made(trained: Trained, data: Any, workdir: Path) -> dict[str, Any]:
    """Make `score_samples` images or texts, score them beside the data, and leave them in the workdir."""
    match trained.entry.name:
        case "generate":
            from dblocks_jax.modes.generation import sample_and_score

            return sample_and_score(trained, data, workdir).figures
        case "mask":
            from dblocks_jax.modes.writing import make_and_score

            return make_and_score(trained, data, workdir).figures
        case "next_token" | "recurrent":
            from dblocks_jax.modes.continuing import continue_and_score, score_steps

            return continue_and_score(trained, data, workdir)[0] | score_steps(trained, data)
        case _:
            return {}


def with_made(result: dict[str, Any], config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """`result` of a run that is trained, with the scores of what its chosen checkpoint makes, if it has sound ones.

    Raises:
      UserError: the checkpoint cannot be read.
    """
    step = result.get("checkpoint")
    if step is None or "split" not in result or "diverged" in result or config.score_samples == 0:
        return result
    free = {field: config[field] for field in FREE_TO_CHANGE}  # where the data lie now, and so on
    trained, _ = load_run(workdir, checkpoint=str(step), config=config, overrides=free)
    return result | score_made(trained, trained.entry.find_data(config), workdir)

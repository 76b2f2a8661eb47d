"""Scores of what a trained model makes, by task. Each imports what it needs when it is called: charts take a while."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dblocks_jax.modes.load import Trained, load_run
from dblocks_jax.training.config import FREE_TO_CHANGE

MAKES = ("generate", "mask", "next_token")  # tasks whose models make something


def score_made(trained: Trained, data: Any, workdir: Path) -> dict[str, Any]:
    """Make `score_samples` images or texts, score them beside the data, and leave them in the workdir."""
    match trained.entry.name:
        case "generate":
            from dblocks_jax.modes.generation import score_samples

            return score_samples(trained, data, workdir)
        case "mask":
            from dblocks_jax.modes.writing import score_texts

            return score_texts(trained, data, workdir)
        case "next_token":
            from dblocks_jax.modes.continuing import score_continuations

            return score_continuations(trained, data, workdir)
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

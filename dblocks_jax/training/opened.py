"""A run's folder, claimed, and where the run in it stands."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from dblocks_jax.run import workdir as run_folder
from dblocks_jax.run.checkpoint import Checkpoints
from dblocks_jax.run.errors import UserError
from dblocks_jax.run.processes import check_alike, first_process_first
from dblocks_jax.training.begin import begin
from dblocks_jax.training.optimizer import Part
from dblocks_jax.training.setting import Setting


@dataclass
class Opened:
    """A run whose folder is held: where it stands, and what is on record of it."""

    checkpoints: Checkpoints
    step: int
    parts: dict[str, Part]
    skipped: dict[str, Any]  # see `Health`
    scores: dict[int, float]  # step -> main score on the validation split, the more the better
    on_record: dict[str, set[int]]  # split -> steps that are scored


def open_run(setting: Setting, held: ExitStack, *, command: list[str], overrides: dict[str, Any]) -> Opened:
    """Claim the folder, put this start on record, and take up the newest checkpoint that is sound.

    Raises:
      UserError: the folder cannot be written, is in use, or holds nothing that can be gone on with.
    """
    workdir, config = setting.workdir, setting.config
    parts = begin(setting)
    with run_folder.writing(workdir), first_process_first("workdir"):
        held.enter_context(run_folder.claim(workdir))
        run_folder.open_run(
            workdir, config.to_dict(), setting.card, was=setting.saved, command=command, overrides=overrides
        )
    scores: dict[int, float] = {}
    with run_folder.writing(workdir):
        checkpoints = held.enter_context(Checkpoints(workdir, scores=scores, save_top_k=config.save_top_k))
        step, parts, about = checkpoints.resume(
            lambda step: setting.like(setting.stage_of(step)), parts, setting.settle
        )
        check_alike("checkpoints", step)
        if "imported" in about:
            raise UserError(
                f"{workdir} was imported from {about['imported']}, without the optimizer's moments: "
                "it can be scored and exported, but not trained on"
            )
        main = setting.entry.main_score
        with first_process_first("log"):
            run_folder.forget_metrics_after(workdir, step)
            on_record = {split: run_folder.scores(workdir, split, main.name) for split in ("val", "test")}
    sign = 1 if main.more_is_better else -1
    scores.update({at: sign * value for at, value in on_record["val"].items()})
    return Opened(
        checkpoints, step, parts, about.get("skipped", {}), scores, {split: set(at) for split, at in on_record.items()}
    )

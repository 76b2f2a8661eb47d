"""`--mode=report`: one page about a run, which explains itself to a stranger."""

import platform
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dblocks_jax.modes.continuing import continue_and_score, score_steps
from dblocks_jax.modes.evaluate import find_data, how_scored
from dblocks_jax.modes.generation import sample_and_score
from dblocks_jax.modes.load import Trained, load_run
from dblocks_jax.modes.memory import step_memory
from dblocks_jax.modes.program import variant
from dblocks_jax.modes.writing import make_and_score
from dblocks_jax.pages import charts
from dblocks_jax.pages.findings import Findings, block_curves
from dblocks_jax.pages.template import write_page
from dblocks_jax.run.devices import make_mesh
from dblocks_jax.run.errors import NOT_FINITE, Diverged
from dblocks_jax.run.workdir import STARTS, logged, read_lines
from dblocks_jax.tasks import text_report
from dblocks_jax.tasks.classify import report as classify_report
from dblocks_jax.tasks.generate import report as generate_report
from dblocks_jax.tasks.mask import report as mask_report
from dblocks_jax.tasks.shown import SHOWN
from dblocks_jax.training.config import arithmetic
from dblocks_jax.training.overview import describe_shares, num_parameters

PAGE = "report.html"


def report(config: ConfigDict, workdir: Path, *, overrides: dict[str, Any], checkpoint: str) -> dict[str, Any]:
    """Score a run on its test split, look at it from all sides, and write PAGE into its folder.

    Raises:
      UserError: there is no such run or checkpoint, or its data cannot be had.
      Diverged: its answers are not finite.
      Unsaved: the page cannot be written.
    """
    mesh = make_mesh()
    loaded, run = load_run(workdir, checkpoint=checkpoint, config=config, overrides=overrides, mesh=mesh)
    data = find_data(loaded, run, named=config, where=str(workdir))
    lines = logged(workdir)
    found = LOOK[loaded.entry.name](loaded, data, mesh, workdir, lines)
    if "diverged" in found.scores:
        raise Diverged(f"{workdir}: {NOT_FINITE}")
    page = {
        "name": workdir.name,
        "config": loaded.config.to_dict(),
        "metrics": found.scores,
        "step": loaded.step,
        "parameters": {name: num_parameters(part) for name, part in loaded.params.items()},
        "num_examples": run["data"].get("images"),
        "shares": describe_shares(loaded.task),
        "about_levels": SHOWN[loaded.entry.name].ABOUT_LEVELS,
        "card": loaded.card,
        "starts": read_starts(workdir),
        "here": {"python": platform.python_version(), "jax": jax.__version__, "device": jax.devices()[0].device_kind},
        "skipped": sum(run.get("skipped", {}).get("total", {}).values()),
        "charts": draw(loaded, lines) | found.charts,
    }
    path = write_page(workdir / PAGE, page | found.values, template=f"report_{loaded.entry.name}.html")
    return {
        "mode": "report",
        "workdir": str(workdir),
        "checkpoint": loaded.step,
        "page": str(path),
        "split": "test",
        **found.scores,
        **found.more,
        **how_scored(loaded),
    }


def _look_at_classifier(trained: Trained, data: Any, mesh: Mesh, workdir: Path, lines: list[dict]) -> Findings:
    del workdir
    task: Any = trained.task
    with arithmetic(trained.config):
        return classify_report.look(task, trained.blueprint, trained.params, data, mesh, lines)


def _look_at_generator(trained: Trained, data: Any, mesh: Mesh, workdir: Path, lines: list[dict]) -> Findings:
    """The judge is a run of its own, so samples are scored here."""
    task: Any = trained.task
    with arithmetic(trained.config):
        loss = task.scorer(trained.blueprint, mesh)(trained.params, data, "test", lambda: None)
    scored = sample_and_score(trained, data, workdir)
    found = loss | scored.figures
    if "diverged" in found:
        return Findings(found, {}, {}, {})
    with arithmetic(trained.config):
        return generate_report.look(task, trained.blueprint, trained.params, data, found, scored.made, lines)


def _look_at_masked(trained: Trained, data: Any, mesh: Mesh, workdir: Path, lines: list[dict]) -> Findings:
    task: Any = trained.task
    with arithmetic(trained.config):
        bits = task.scorer(trained.blueprint, mesh)(trained.params, data, "test", lambda: None)
    if "diverged" in bits:
        return Findings(bits, {}, {}, {})
    scored = make_and_score(trained, data, workdir)
    return mask_report.look(task, bits | scored.figures, scored.made, lines)


def _look_at_decoder(trained: Trained, data: Any, mesh: Mesh, workdir: Path, lines: list[dict]) -> Findings:
    task: Any = trained.task
    with arithmetic(trained.config):
        bits = task.scorer(trained.blueprint, mesh)(trained.params, data, "test", lambda: None)
    if "diverged" in bits:
        return Findings(bits, {}, {}, {})
    figures, written = continue_and_score(trained, data, workdir)
    figures |= score_steps(trained, data)
    return text_report.look(task, bits | figures, written, lines)


LOOK = {  # by task
    "classify": _look_at_classifier,
    "generate": _look_at_generator,
    "mask": _look_at_masked,
    "next_token": _look_at_decoder,
    "recurrent": _look_at_decoder,
}


def read_starts(workdir: Path) -> list[dict[str, Any]]:
    """When and how the run was started; lines that are none of ours are left out."""
    kinds = {"time": str, "command": list, "devices": list, "host": str, "python": str, "versions": dict}
    starts = read_lines(workdir / STARTS)
    return [start for start in starts if all(isinstance(start.get(name), kind) for name, kind in kinds.items())]


def draw(trained: Trained, lines: list[dict[str, Any]]) -> dict[str, str]:
    """The pictures that every task has, by name."""
    corruption = trained.task.corruption
    drawn = {"memory": _draw_memory(trained)}
    if any("blocks" in line for line in lines):
        drawn["loss"] = block_curves(lines, "loss", "loss", None if corruption is None else corruption.num_blocks)
    return drawn | SHOWN[trained.entry.name].draw_levels(trained.task)


def _draw_memory(trained: Trained) -> str:
    """The plain model's training step beside that of the blocks, on one device, as `--mode=memory` computes it."""
    config, entry = trained.config, trained.entry
    settings = {
        name: variant(entry, config, plain=plain, remat=config.gradient_checkpointing)
        for name, plain in (("plain", True), ("DiffusionBlocks", False))
    }
    if settings["plain"] == settings["DiffusionBlocks"]:  # it has no blocks
        del settings["DiffusionBlocks"]
    rows = {}
    for name, setting in settings.items():
        setting.block_parallel = False  # a block of those side by side is one as if in turn
        needed = step_memory(entry, setting, trained.card, jax.local_devices()[:1])
        rows[name] = {
            "parameters": needed.parameters,
            "moments": needed.optimizer,
            "gradients": needed.gradients,
            "activations": needed.activations,
        }
        if needed.averages:  # none has them, or both
            rows[name]["averages"] = needed.averages
    return charts.memory(rows)

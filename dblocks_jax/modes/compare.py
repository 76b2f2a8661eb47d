"""`--mode=compare`: several runs side by side. Runs that differ in their seed alone make a group."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dblocks_jax.pages import charts
from dblocks_jax.pages.template import write_page
from dblocks_jax.run.errors import UserError
from dblocks_jax.run.workdir import CONFIG, DATA, logged, read_saved
from dblocks_jax.tasks.table import entry_of
from dblocks_jax.training.config import FREE_TO_CHANGE, SINCE, count_steps

PAGE = "compare.html"
RESULT, EVAL, REPORT = "train.json", "eval.json", "report.json"
LONGEST_NAME = 24
# Which say nothing about the method: runs that differ in these belong together.
NOT_COMPARED = {"seed", *FREE_TO_CHANGE} - {"save_top_k"}  # it decides which checkpoint is scored


@dataclass(frozen=True)
class Run:
    """What a finished run left in its folder."""

    workdir: Path
    config: dict[str, Any]
    result: dict[str, Any]
    by_num_steps: dict[int, float]  # accuracy by the sampler's number of steps, if a report was made


@dataclass(frozen=True)
class Group:
    """Runs of one setting. `fields` are those in which the groups differ."""

    fields: dict[str, Any]
    runs: list[Run]

    @property
    def name(self) -> str:
        """The setting in words."""
        return ", ".join(f"{field}={value}" for field, value in self.fields.items()) or "all runs"

    def mean_and_deviation(self, metric: str) -> tuple[float, float | None]:
        """Over the runs; the sample's standard deviation, where there are two at least."""
        values = [run.result[metric] for run in self.runs]
        return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def compare(workdirs: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Print a table of the runs, and write PAGE into `folder`.

    Raises:
      UserError: a folder holds no finished run, or the page cannot be written.
    """
    named = {workdir.resolve(): workdir for workdir in workdirs}  # a run that is named twice counts once
    runs = [read(workdir) for workdir in named.values()]
    groups = group(runs)
    rows = [_row(each) for each in groups]
    _print(groups, rows)
    colors = list(mpl.colormaps["tab10"](range(10))) * (len(groups) // 10 + 1)
    # In the pictures there is room for short names only.
    names = [each.name if len(each.name) <= LONGEST_NAME else f"setting {i}" for i, each in enumerate(groups, 1)]
    accuracies = [[run.result["top1"] for run in each.runs] for each in groups]
    drawn = {
        "accuracies": charts.accuracies(dict(zip(names, accuracies, strict=True))),
        "ce": charts.over_steps(
            {name: _cross_entropy(each.runs[0].workdir) for name, each in zip(names, groups, strict=True)},
            colors[: len(groups)],
            "cross-entropy",
        ),
    }
    by_count = {name: _mean_by_num_steps(each) for name, each in zip(names, groups, strict=True)}
    if any(by_count.values()):
        drawn["by_count"] = charts.by_num_steps(by_count, colors[: len(by_count)])
    page = {
        "fields": list(groups[0].fields),
        "groups": groups,
        "rows": rows,
        "charts": drawn,
        "datasets": ", ".join(sorted({str(run.config["dataset"]) for run in runs})),
    }
    path = write_page(folder / PAGE, page)
    return {"mode": "compare", "page": str(path), "groups": rows}


def read(workdir: Path) -> Run:
    """The config and result of a finished run.

    Raises:
      UserError: it is not there.
    """
    config = read_saved(workdir, CONFIG)
    if config is None:
        raise UserError(f"{workdir} holds no run: --runs takes folders of runs")
    result = read_saved(workdir, RESULT) or read_saved(workdir, EVAL)
    if result is None or "top1" not in result:
        raise UserError(f"{workdir} is not finished: it has no {RESULT} with an accuracy. Run its command again")
    if not _is_sampled_as(config, result):
        raise UserError(
            f"{workdir} was scored with another sampler than its config says: repeat --mode=eval without it"
        )
    if result["mode"] == "train":
        images = (read_saved(workdir, DATA) or {}).get("images")
        if images is not None and result["step"] < (steps := _steps_of(config, images)):
            raise UserError(f"{workdir} is not finished: its result is of step {result['step']} of {steps}")
    report = read_saved(workdir, REPORT) or {}
    if report.get("checkpoint") != result["checkpoint"] or not _is_sampled_as(config, report, "num_inference_steps"):
        report = {}
    by_num_steps = {int(count): accuracy for count, accuracy in report.get("accuracy_by_num_steps", {}).items()}
    return Run(workdir, config, result, by_num_steps)


def _is_sampled_as(config: dict[str, Any], result: dict[str, Any], *but: str) -> bool:
    """Whether a result was made with the config's sampler, `but` for some fields."""
    return all(config.get(field, value) == value or field in but for field, value in result.get("sampler", {}).items())


def group(runs: Sequence[Run]) -> list[Group]:
    """The runs by setting, the most accurate first."""
    settings = [_setting(run) for run in runs]
    fields = {field for setting in settings for field in setting}
    differing = sorted(field for field in fields if len({json.dumps(each.get(field)) for each in settings}) > 1)
    groups: dict[str, Group] = {}
    for run, setting in zip(runs, settings, strict=True):
        mine = {field: setting.get(field) for field in differing}
        groups.setdefault(json.dumps(mine), Group(mine, [])).runs.append(run)
    return sorted(groups.values(), key=lambda each: -each.mean_and_deviation("top1")[0])


def _setting(run: Run) -> dict[str, Any]:
    """The fields by which runs are told apart. Of a data set of one's own the folder says which it is."""
    is_named = run.config["dataset"] != "folder"
    return {
        field: value
        for field, value in run.config.items()
        if field not in NOT_COMPARED or (field == "data_dir" and not is_named)
    }


def _row(each: Group) -> dict[str, Any]:
    top1, deviation = each.mean_and_deviation("top1")
    return {
        "fields": each.fields,
        "runs": [str(run.workdir) for run in each.runs],
        "seeds": [run.config.get("seed") for run in each.runs],
        "accuracy": f"{100 * top1:.1f} %" if deviation is None else f"{100 * top1:.1f} ± {100 * deviation:.1f} %",
        "top1_mean": top1,
        "top1_std": deviation,
        "macro_f1_mean": each.mean_and_deviation("macro_f1")[0],
        "cross_entropy_mean": each.mean_and_deviation("cross_entropy")[0],
    }


def _steps_of(config: dict[str, Any], images: int) -> int:
    of_run = ConfigDict(SINCE | config)
    return count_steps(entry_of(of_run), of_run, images).steps


def _cross_entropy(workdir: Path) -> tuple[list[int], list[float]]:
    steps, values = [], []
    for line in logged(workdir):
        means = [block["ce"] for block in line.get("blocks", {}).values() if block.get("ce") is not None]
        if means:
            steps.append(line["step"])
            values.append(float(np.mean(means)))
    return steps, values


def _mean_by_num_steps(each: Group) -> dict[int, float]:
    """Over the runs of which a report was made."""
    found = [run.by_num_steps for run in each.runs if run.by_num_steps]
    counts = sorted(set.intersection(*(set(accuracies) for accuracies in found))) if found else []
    return {count: statistics.mean(accuracies[count] for accuracies in found) for count in counts}


def _print(groups: Sequence[Group], rows: Sequence[dict[str, Any]]) -> None:
    table = Table("", "accuracy", "runs", "macro F1", "cross-entropy", "setting", box=None)
    for i, (each, row) in enumerate(zip(groups, rows, strict=True), 1):
        numbers = (f"{row['macro_f1_mean']:.3f}", f"{row['cross_entropy_mean']:.3f}")
        table.add_row(str(i), row["accuracy"], str(len(each.runs)), *numbers, Text(each.name))
    Console().print(table)

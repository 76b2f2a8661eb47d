"""`--mode=compare`: several runs side by side, a table for each data set.

Runs that differ in their seed alone make a group. A seed counts once, however many of a group's runs have it.
"""

import json
import math
import os
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
from dblocks_jax.run.errors import UserError, brief
from dblocks_jax.run.results import read_result
from dblocks_jax.run.workdir import CONFIG, DATA, logged, read_saved
from dblocks_jax.tasks.table import entry_of
from dblocks_jax.training.config import FREE_TO_CHANGE, SINCE, count_steps

PAGE = "compare.html"
RESULT, EVAL, REPORT = "train.json", "eval.json", "report.json"
LONGEST_NAME = 24
# Which say nothing about the method: runs that differ in these belong together.
# "save_top_k" decides which checkpoint is scored; a data set has a table of its own.
NOT_COMPARED = {"seed", "dataset", *FREE_TO_CHANGE} - {"save_top_k"}


@dataclass(frozen=True)
class Run:
    """What a finished run left in its folder."""

    workdir: Path
    config: dict[str, Any]
    result: dict[str, Any]
    by_num_steps: dict[int, float]  # accuracy by the sampler's number of steps, if a report was made
    curve: tuple[list[int], list[float]]  # steps, and the cross-entropy there

    @property
    def is_diverged(self) -> bool:
        """Whether its answers were not finite numbers. Older results say so by their cross-entropy alone."""
        return self.result.get("diverged", False) or self.result["cross_entropy"] is None

    @property
    def dataset(self) -> str:
        """The images that it was scored on. Of those of one's own the folder says which they are."""
        name = str(self.config["dataset"])
        if name == "folder":
            name += f" {self.result.get('data_dir', self.config['data_dir'])}"
        return f"{name}, {self.result['num_images']:,} images" if "num_images" in self.result else name


@dataclass(frozen=True)
class Group:
    """Runs of one setting. `fields` are those in which the groups of a data set differ."""

    dataset: str
    fields: dict[str, Any]
    runs: list[Run]  # with answers
    diverged: list[Run]

    @property
    def name(self) -> str:
        """The setting in words."""
        return ", ".join(f"{field}={value}" for field, value in self.fields.items()) or "all runs"

    @property
    def seeds(self) -> list[Any]:
        """Of the runs with answers, each once."""
        return list(dict.fromkeys(run.config.get("seed") for run in self.runs))

    def mean_and_deviation(self, metric: str) -> tuple[float | None, float | None]:
        """Over the seeds, each the mean of its runs; the sample's standard deviation, where there are two at least.

        No mean where all runs diverged.
        """
        values = [
            statistics.mean(run.result[metric] for run in self.runs if run.config.get("seed") == seed)
            for seed in self.seeds
        ]
        mean = statistics.mean(values) if values else None
        return mean, statistics.stdev(values) if len(values) > 1 else None


def compare(workdirs: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Print a table of the runs for each data set, and write PAGE into `folder`.

    Raises:
      UserError: a folder holds no finished run, or files that no run writes.
      Unsaved: the page cannot be written.
    """
    named = {os.path.realpath(workdir): workdir for workdir in workdirs}  # a run that is named twice counts once
    runs = [read(workdir) for workdir in named.values()]
    datasets = list(dict.fromkeys(run.dataset for run in runs))
    tables, drawn, all_rows = [], {}, []
    for i, dataset in enumerate(datasets):
        groups = group([run for run in runs if run.dataset == dataset])
        rows = [_row(each) for each in groups]
        _print(dataset if len(datasets) > 1 else "", groups, rows)
        all_rows += rows
        drawn |= {f"{name} {i}": svg for name, svg in _draw(groups).items()}
        tables.append({"dataset": dataset, "groups": groups, "rows": rows})
    path = write_page(folder / PAGE, {"tables": tables, "charts": drawn})
    return {"mode": "compare", "page": str(path), "groups": all_rows}


def _draw(groups: Sequence[Group]) -> dict[str, str]:
    """A data set's pictures, of the groups that have something to show."""
    # There is room for short names only.
    names = [each.name if len(each.name) <= LONGEST_NAME else f"setting {i}" for i, each in enumerate(groups, 1)]
    colors = list(mpl.colormaps["tab10"](range(10))) * (len(groups) // 10 + 1)
    drawn = {
        "ce": charts.over_steps(
            {name: (each.runs or each.diverged)[0].curve for name, each in zip(names, groups, strict=True)},
            colors[: len(groups)],
            "cross-entropy",
        )
    }
    accuracies = {
        name: [run.result["top1"] for run in each.runs] for name, each in zip(names, groups, strict=True) if each.runs
    }
    if accuracies:
        drawn["accuracies"] = charts.accuracies(accuracies)
    by_count = {name: _mean_by_num_steps(each) for name, each in zip(names, groups, strict=True)}
    if any(by_count.values()):
        drawn["by_count"] = charts.by_num_steps(by_count, colors[: len(by_count)])
    return drawn


def read(workdir: Path) -> Run:
    """The config and result of a finished run.

    Raises:
      UserError: it is not there, or not what a run writes.
    """
    try:
        return _read(workdir)
    except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"the files in {workdir} are not what a run writes ({brief(error)})") from error


def _read(workdir: Path) -> Run:
    config = read_saved(workdir, CONFIG)
    if config is None:
        raise UserError(f"{workdir} holds no run: --runs takes folders of runs")
    result = read_result(workdir, RESULT) or read_result(workdir, EVAL)
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
    report = read_result(workdir, REPORT) or {}
    if report.get("checkpoint") != result["checkpoint"] or not _is_sampled_as(config, report, "num_inference_steps"):
        report = {}
    by_num_steps = {int(count): accuracy for count, accuracy in report.get("accuracy_by_num_steps", {}).items()}
    run = Run(workdir, config, result, by_num_steps, _cross_entropy(workdir))
    hash((run.dataset, run.is_diverged, result["macro_f1"], config.get("seed")))  # what is missing is missed here
    return run


def _is_sampled_as(config: dict[str, Any], result: dict[str, Any], *but: str) -> bool:
    """Whether a result was made with the config's sampler, `but` for some fields."""
    return all(config.get(field, value) == value or field in but for field, value in result.get("sampler", {}).items())


def group(runs: Sequence[Run]) -> list[Group]:
    """The runs on one data set by setting, the most accurate first and those without answers last."""
    settings = [{field: value for field, value in run.config.items() if field not in NOT_COMPARED} for run in runs]
    fields = {field for setting in settings for field in setting}
    differing = sorted(field for field in fields if len({json.dumps(each.get(field)) for each in settings}) > 1)
    groups: dict[str, Group] = {}
    for run, setting in zip(runs, settings, strict=True):
        mine = {field: setting.get(field) for field in differing}
        each = groups.setdefault(json.dumps(mine), Group(run.dataset, mine, [], []))
        (each.diverged if run.is_diverged else each.runs).append(run)

    def rank(each: Group) -> float:
        mean, _ = each.mean_and_deviation("top1")
        return 1.0 if mean is None else -mean

    return sorted(groups.values(), key=rank)


def _row(each: Group) -> dict[str, Any]:
    top1, deviation = each.mean_and_deviation("top1")
    accuracy = "diverged" if top1 is None else f"{100 * top1:.1f} %"
    if top1 is not None and deviation is not None:
        accuracy = f"{100 * top1:.1f} ± {100 * deviation:.1f} %"
    return {
        "dataset": each.dataset,
        "fields": each.fields,
        "runs": [str(run.workdir) for run in each.runs],
        "diverged": [str(run.workdir) for run in each.diverged],
        "seeds": each.seeds,
        "accuracy": accuracy,
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
        if means and math.isfinite(mean := float(np.mean(means))):
            steps.append(line["step"])
            values.append(mean)
    return steps, values


def _mean_by_num_steps(each: Group) -> dict[int, float]:
    """Over the runs of which a report was made."""
    found = [run.by_num_steps for run in each.runs if run.by_num_steps]
    counts = sorted(set.intersection(*(set(accuracies) for accuracies in found))) if found else []
    return {count: statistics.mean(accuracies[count] for accuracies in found) for count in counts}


def how_many(each: Group) -> str:
    """A group's seeds in words, and its runs where they are not as many."""
    words = [str(len(each.seeds))] if each.runs else []
    if len(each.runs) > len(each.seeds):
        words.append(f"{len(each.runs)} runs")
    if each.diverged:
        words.append(f"{len(each.diverged)} diverged")
    return ", ".join(words)


def _print(title: str, groups: Sequence[Group], rows: Sequence[dict[str, Any]]) -> None:
    table = Table(box=None, title=Text(title, "bold") if title else None, title_justify="left")
    for name in ("", "accuracy", "seeds", "macro F1", "cross-entropy"):
        table.add_column(name, no_wrap=True)
    table.add_column("setting", overflow="fold")  # whole, however long
    for i, (each, row) in enumerate(zip(groups, rows, strict=True), 1):
        means = (row["macro_f1_mean"], row["cross_entropy_mean"])
        numbers = ("" if mean is None else f"{mean:.3f}" for mean in means)
        table.add_row(str(i), row["accuracy"], how_many(each), *numbers, Text(each.name))
    Console().print(table)

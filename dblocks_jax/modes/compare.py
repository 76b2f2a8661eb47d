"""`--mode=compare`: several runs side by side, a table for each task and data set.

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
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dblocks_jax.pages import charts
from dblocks_jax.pages.figures import Figure
from dblocks_jax.pages.template import write_page
from dblocks_jax.run.errors import UserError, brief
from dblocks_jax.run.naming import shown
from dblocks_jax.run.results import read_result
from dblocks_jax.run.workdir import CONFIG, DATA, logged, read_saved
from dblocks_jax.tasks.table import SHOWN, entry_of
from dblocks_jax.tasks.task import Entry
from dblocks_jax.training.config import FREE_TO_CHANGE, complete, count_steps

PAGE = "compare.html"
RESULT, EVAL, REPORT = "train.json", "eval.json", "report.json"
LONGEST_NAME = 24
UNLIMITED = 100_000  # columns
OF_ONES_OWN = ("folder", "latents", "text_file")  # data sets that a path names
COUNTED = {"num_images": "images", "num_sequences": "sequences"}  # how a result says what it is of: in words
# Which say nothing about the method: runs that differ in these belong together.
# "save_top_k" decides which checkpoint is scored; a data set has a table of its own.
NOT_COMPARED = {"seed", "dataset", *FREE_TO_CHANGE} - {"save_top_k"}


@dataclass(frozen=True)
class Run:
    """What a finished run left in its folder."""

    workdir: Path
    entry: Entry  # its task
    config: dict[str, Any]
    result: dict[str, Any]
    by_num_steps: dict[int, float]  # accuracy by the sampler's number of steps, if a report was made
    curve: tuple[list[int], list[float]]  # steps, and what its task draws there

    @property
    def is_diverged(self) -> bool:
        """Whether its numbers were not finite. Older results of classifiers say so by their cross-entropy alone."""
        names = {self.entry.main_score.name, "cross_entropy"}
        return self.result.get("diverged", False) or any(self.result.get(name, 0) is None for name in names)

    @property
    def data(self) -> str:
        """The data set. Of one's own the path says which they are."""
        name = str(self.config["dataset"])
        if name in OF_ONES_OWN:
            name += f" {self.result.get('data_dir', self.config['data_dir'])}"
        return name

    @property
    def dataset(self) -> str:
        """What it was scored on."""
        return ", ".join(
            [self.data, *(f"{self.result[key]:,} {what}" for key, what in COUNTED.items() if key in self.result)]
        )


@dataclass(frozen=True)
class Group:
    """Runs of one setting. `fields` are those in which the groups of a table differ."""

    dataset: str
    fields: dict[str, Any]
    runs: list[Run]  # with answers
    diverged: list[Run]

    @property
    def name(self) -> str:
        """The setting in words."""
        return ", ".join(f"{shown(field)}={shown(value)}" for field, value in self.fields.items()) or "all runs"

    @property
    def seeds(self) -> list[Any]:
        """Of the runs with answers, each once."""
        return list(dict.fromkeys(run.config.get("seed") for run in self.runs))

    def mean_and_deviation(self, metric: str) -> tuple[float | None, float | None]:
        """Over the seeds, each the mean of its runs; the sample's standard deviation, where there are two at least.

        No mean where all runs diverged, or none has such a figure.
        """
        of_seeds = [[run.result.get(metric) for run in self.runs if run.config.get("seed") == s] for s in self.seeds]
        measured = [[value for value in values if value is not None] for values in of_seeds]
        values = [statistics.mean(each) for each in measured if each]
        mean = statistics.mean(values) if values else None
        return mean, statistics.stdev(values) if len(values) > 1 else None


def compare(workdirs: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Print a table of the runs for each task and data set, and write PAGE into `folder`.

    Raises:
      UserError: a folder holds no finished run, or files that no run writes.
      Unsaved: the page cannot be written.
    """
    named = {os.path.realpath(workdir): workdir for workdir in workdirs}  # a run that is named twice counts once
    runs = [read(workdir) for workdir in named.values()]
    together: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        together.setdefault((run.entry.name, scored_on(run, runs)), []).append(run)
    several_tasks = len({task for task, _ in together}) > 1
    tables, drawn, all_rows = [], {}, []
    for i, ((task, dataset), alike) in enumerate(together.items()):
        title = f"{task}: {dataset}" if several_tasks else dataset
        entry, figures = alike[0].entry, figures_of(alike)
        groups = group(alike, dataset)
        rows = [_row(each, figures) for each in groups]
        cells = [[figure.show(*_cell(each, figure)) for figure in figures] for each in groups]
        _print(title if len(together) > 1 else "", groups, figures, cells)
        all_rows += rows
        drawn |= {f"{name} {i}": svg for name, svg in _draw(groups, entry).items()}
        about = {"about": SHOWN[task].ABOUT_FIGURES, "about_curve": SHOWN[task].ABOUT_CURVE}
        tables.append({"title": title, "figures": figures, "groups": groups, "rows": rows, "cells": cells, **about})
    path = write_page(folder / PAGE, {"tables": tables, "charts": drawn})
    return {"mode": "compare", "page": str(path), "groups": all_rows}


def scored_on(run: Run, runs: Sequence[Run]) -> str:
    """The data set whose table a run is in. One that was ended while it trained was not scored: it joins the others."""
    others = [each.dataset for each in runs if (each.entry, each.data) == (run.entry, run.data)]
    scored = [dataset for dataset in others if dataset != run.data]
    return scored[0] if run.is_diverged and scored and run.dataset == run.data else run.dataset


def figures_of(runs: Sequence[Run]) -> list[Figure]:
    """The figures of a task, the main score and those others that a run has."""
    main, *others = SHOWN[runs[0].entry.name].FIGURES
    return [main, *(each for each in others if any(run.result.get(each.name) is not None for run in runs))]


def _draw(groups: Sequence[Group], entry: Entry) -> dict[str, str]:
    """A table's pictures, of the groups that have something to show."""
    # There is room for short names only.
    names = [each.name if len(each.name) <= LONGEST_NAME else f"setting {i}" for i, each in enumerate(groups, 1)]
    main, about_curve = SHOWN[entry.name].FIGURES[0], SHOWN[entry.name].ABOUT_CURVE
    colors = list(mpl.colormaps["tab10"](range(10))) * (len(groups) // 10 + 1)
    curves = {name: (each.runs or each.diverged)[0].curve for name, each in zip(names, groups, strict=True)}
    drawn = {"curve": charts.over_steps(curves, colors[: len(groups)], about_curve.split(" on ")[0])}
    scores = {
        name: [run.result[main.name] for run in each.runs]
        for name, each in zip(names, groups, strict=True)
        if each.runs
    }
    if scores:
        drawn["scores"] = charts.by_group(scores, f"{main.words} on the test split", percent=main.is_share)
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
    config = complete(config)  # of earlier versions
    try:
        entry = entry_of(ConfigDict(complete(config)))
    except UserError as error:
        raise UserError(f"{workdir / CONFIG}: {error}") from error
    main = SHOWN[entry.name].FIGURES[0]
    result = read_result(workdir, RESULT) or read_result(workdir, EVAL)
    if result is None or not (main.name in result or result.get("diverged")):
        raise UserError(f"{workdir} is not finished: it has no {RESULT} with its {main.words}. Run its command again")
    if not _is_sampled_as(config, result):
        raise UserError(
            f"{workdir} was scored with another sampler than its config says: repeat --mode=eval without it"
        )
    if result["mode"] == "train" and not result.get("diverged"):
        images = (read_saved(workdir, DATA) or {}).get("images")
        if images is not None and result["step"] < (steps := _steps_of(config, images)):
            raise UserError(f"{workdir} is not finished: its result is of step {result['step']} of {steps}")
    report = read_result(workdir, REPORT) or {}
    if report.get("checkpoint") != result["checkpoint"] or not _is_sampled_as(config, report, "num_inference_steps"):
        report = {}
    by_num_steps = {int(count): accuracy for count, accuracy in report.get("accuracy_by_num_steps", {}).items()}
    run = Run(workdir, entry, config, result, by_num_steps, SHOWN[entry.name].curve(logged(workdir)))
    hash((run.dataset, config.get("seed")))  # what is missing is missed here
    return run


def _is_sampled_as(config: dict[str, Any], result: dict[str, Any], *but: str) -> bool:
    """Whether a result was made with the config's sampler, `but` for some fields."""
    return all(config.get(field, value) == value or field in but for field, value in result.get("sampler", {}).items())


def group(runs: Sequence[Run], dataset: str) -> list[Group]:
    """The runs of one table by setting, the best first and those without answers last."""
    settings = [{field: value for field, value in run.config.items() if field not in NOT_COMPARED} for run in runs]
    fields = {field for setting in settings for field in setting}
    differing = sorted(field for field in fields if len({json.dumps(each.get(field)) for each in settings}) > 1)
    groups: dict[str, Group] = {}
    for run, setting in zip(runs, settings, strict=True):
        mine = {field: setting.get(field) for field in differing}
        each = groups.setdefault(json.dumps(mine), Group(dataset, mine, [], []))
        (each.diverged if run.is_diverged else each.runs).append(run)
    main = runs[0].entry.main_score

    def rank(each: Group) -> float:
        mean, _ = each.mean_and_deviation(main.name)
        if mean is None:
            return math.inf
        return -mean if main.more_is_better else mean

    return sorted(groups.values(), key=rank)


def _cell(each: Group, figure: Figure) -> tuple[float | None, float | None]:
    mean, deviation = each.mean_and_deviation(figure.name)
    return mean, deviation if figure.has_spread else None


def _row(each: Group, figures: Sequence[Figure]) -> dict[str, Any]:
    main = figures[0]
    row = {
        "dataset": each.dataset,
        "fields": each.fields,
        "runs": [str(run.workdir) for run in each.runs],
        "diverged": [str(run.workdir) for run in each.diverged],
        "seeds": each.seeds,
        main.words: main.show(*_cell(each, main)) or "diverged",
    }
    for figure in figures:
        mean, deviation = _cell(each, figure)
        row |= {f"{figure.name}_mean": mean} | ({f"{figure.name}_std": deviation} if figure.has_spread else {})
    return row


def _steps_of(config: dict[str, Any], images: int) -> int:
    of_run = ConfigDict(complete(config))
    return count_steps(entry_of(of_run), of_run, images).steps


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


def _print(title: str, groups: Sequence[Group], figures: Sequence[Figure], cells: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, title=Text(shown(title), "bold") if title else None, title_justify="left")
    main, *others = (figure.words for figure in figures)
    for name in ("", main, "seeds"):
        table.add_column(name, no_wrap=True)
    for name in others:  # a narrow terminal breaks their lines, which cuts nothing
        table.add_column(name)
    table.add_column("setting", overflow="fold")  # whole, however long
    for i, (each, (score, *rest)) in enumerate(zip(groups, cells, strict=True), 1):
        table.add_row(str(i), score or "diverged", how_many(each), *rest, Text(each.name))
    console = Console()
    if not console.is_terminal:  # a file or another program reads it: whole lines
        console = Console(width=UNLIMITED)
    console.print(table)

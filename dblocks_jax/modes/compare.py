"""`--mode=compare`: several runs side by side, a table for each task and data set.

Runs that differ in their seed alone make a group. A seed counts once, however many of a group's runs have it.
"""

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dblocks_jax.modes.arms import CONFIDENCE, difference
from dblocks_jax.modes.finished import Group, Run, arms_of, group, read, scored_on
from dblocks_jax.pages import charts
from dblocks_jax.pages.figures import Figure
from dblocks_jax.pages.template import write_page
from dblocks_jax.run.naming import shown
from dblocks_jax.tasks.shown import SHOWN
from dblocks_jax.tasks.task import Entry

PAGE = "compare.html"
FROM_BEST = f"from the best, {CONFIDENCE:.0%} in all"
LONGEST_NAME = 24
UNLIMITED = 100_000  # columns


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
        rows = [_row(each, arm, groups, figures) for each, arm in zip(groups, arms_of(groups), strict=True)]
        cells = [[figure.show(*_cell(each, figure)) for figure in figures] for each in groups]
        _print(title if len(together) > 1 else "", groups, rows, figures, cells)
        all_rows += rows
        drawn |= {f"{name} {i}": svg for name, svg in _draw(groups, rows, entry).items()}
        about = {"about": SHOWN[task].ABOUT_FIGURES, "about_curve": SHOWN[task].ABOUT_CURVE}
        tables.append({"title": title, "figures": figures, "groups": groups, "rows": rows, "cells": cells, **about})
    path = write_page(folder / PAGE, {"tables": tables, "charts": drawn, "confidence": f"{CONFIDENCE:.0%}"})
    return {"mode": "compare", "page": str(path), "groups": all_rows}


def figures_of(runs: Sequence[Run]) -> list[Figure]:
    """The figures of a task, the main score and those others that a run has."""
    main, *others = SHOWN[runs[0].entry.name].FIGURES
    return [main, *(each for each in others if any(run.result.get(each.name) is not None for run in runs))]


def _draw(groups: Sequence[Group], rows: Sequence[dict[str, Any]], entry: Entry) -> dict[str, str]:
    """A table's pictures, of the groups that have something to show."""
    # There is room for short names only.
    names = [
        row["arm"] or (each.name if len(each.name) <= LONGEST_NAME else f"setting {i}")
        for i, (each, row) in enumerate(zip(groups, rows, strict=True), 1)
    ]
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


def _cell(each: Group, figure: Figure) -> tuple[float | None, float | None]:
    mean, deviation = each.mean_and_deviation(figure.name)
    return mean, deviation if figure.has_spread else None


def _row(each: Group, arm: str, groups: Sequence[Group], figures: Sequence[Figure]) -> dict[str, Any]:
    main, best = figures[0], groups[0]
    behind = None
    if each is not best:
        behind = difference(each.by_seed(main.name), best.by_seed(main.name), len(groups))
    row = {
        "dataset": each.dataset,
        "arm": arm,
        "fields": each.fields,
        "runs": [str(run.workdir) for run in each.runs],
        "diverged": [str(run.workdir) for run in each.diverged],
        "seeds": each.seeds,
        main.words: main.show(*_cell(each, main)) or "diverged",
        "from_best": None if behind is None else list(behind),
        "from_best_words": "" if behind is None else main.show_difference(*behind),
    }
    for figure in figures:
        mean, deviation = _cell(each, figure)
        row |= {f"{figure.name}_mean": mean} | ({f"{figure.name}_std": deviation} if figure.has_spread else {})
    return row


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


def _print(
    title: str,
    groups: Sequence[Group],
    rows: Sequence[dict[str, Any]],
    figures: Sequence[Figure],
    cells: Sequence[Sequence[str]],
) -> None:
    table = Table(box=None, title=Text(shown(title), "bold") if title else None, title_justify="left")
    main, *others = (figure.words for figure in figures)
    has_differences = any(row["from_best"] for row in rows)
    for name in ("", main, "seeds", *([FROM_BEST] if has_differences else [])):
        table.add_column(name, no_wrap=name != FROM_BEST)
    for name in others:  # a narrow terminal breaks their lines, which cuts nothing
        table.add_column(name)
    table.add_column("setting", overflow="fold")  # whole, however long
    for i, (each, row, (score, *rest)) in enumerate(zip(groups, rows, cells, strict=True), 1):
        setting = Text(f"{row['arm']}: {each.name}" if row["arm"] else each.name)
        apart = [row["from_best_words"]] if has_differences else []
        table.add_row(str(i), score or "diverged", how_many(each), *apart, *rest, setting)
    console = Console()
    if not console.is_terminal:  # a file or another program reads it: whole lines
        console = Console(width=UNLIMITED)
    console.print(table)

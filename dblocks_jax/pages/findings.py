"""A task's part of the pages about a run and its data, and the curves that all tasks have."""

from typing import Any, NamedTuple

from dblocks_jax.pages import charts


class DataShown(NamedTuple):
    """What a task has to say of its data, for the page that is made before anything is trained."""

    about: str  # in sentences
    splits: dict[str, dict[str, int]]  # split -> how many of what, the same for all
    result: dict[str, Any]  # the same for programs
    pictures: dict[str, list[str]]  # examples of each kind
    kinds_left: int  # of which no examples are shown
    beginning: str  # of a text


class Findings(NamedTuple):
    """What a task has to say of a trained model, for the template report_<task>.html."""

    scores: dict[str, Any]  # as evaluation measures them
    values: dict[str, Any]  # what the template shows besides
    charts: dict[str, str]  # SVG by name
    more: dict[str, Any]  # that the mode's result has besides the scores


def block_curves(lines: list[dict[str, Any]], metric: str, ylabel: str, num_blocks: int | None) -> str:
    """A figure of the log over the steps, a line for each block; `num_blocks` is None where there are none."""
    lines = [line for line in lines if "blocks" in line]
    names = sorted({block for line in lines for block in line["blocks"]}, key=int)
    series = {}
    for name in names:
        of_block = [(line["step"], line["blocks"][name].get(metric)) for line in lines if name in line["blocks"]]
        series["model" if num_blocks is None else f"block {name}"] = tuple(zip(*of_block, strict=True))
    colors = charts.block_colors(num_blocks or 1)
    return charts.over_steps(series, [colors[int(name)] for name in names], ylabel)


def held_out_picture(lines: list[dict[str, Any]], metric: str, ylabel: str) -> dict[str, str]:
    """{"held_out": a figure over the steps, a line for each split}; nothing where none is on record."""
    curves = held_out_curves(lines, metric)
    colors = [charts.ACCENT, charts.INK][: len(curves)]
    return {"held_out": charts.over_steps(curves, colors, ylabel)} if curves else {}


def held_out_curves(lines: list[dict[str, Any]], metric: str) -> dict[str, tuple[list[int], list[float]]]:
    """Split -> (steps, a figure there), of the splits that are on record."""
    curves = {}
    for split in ("val", "test"):
        scored = [line for line in lines if line.get("split") == split and isinstance(line.get(metric), int | float)]
        if scored:
            curves[f"{split} split"] = ([line["step"] for line in scored], [line[metric] for line in scored])
    return curves

"""The pictures of the pages, as SVG text. Colours go with the blocks, from the noisiest (dark) to the cleanest."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Int
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

from dblocks_jax.diffusion.noise import NoiseDistribution
from dblocks_jax.run.naming import shown

MIB = 2**20
INK, FAINT, ACCENT, WRONG = "#24292f", "#8c959f", "#3b6fb6", "#c4432b"
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "dblocks_jax",
    "text.parse_math": False,  # a class may be called $x$
}
MOST_NAMED_CLASSES = 20
FEW = 30  # points of a curve that are marked; one alone makes no line


def block_colors(num_blocks: int) -> list[Any]:
    """One colour a block, dark for the noisiest."""
    return list(mpl.colormaps["viridis"](np.linspace(0.05, 0.8, num_blocks))) if num_blocks > 1 else [ACCENT]


def tints(num_blocks: int) -> list[str]:
    """The blocks' colours, so light that text is read on them."""
    colors = [to_rgb(each) for each in block_colors(num_blocks)]
    return [
        to_hex((1 - 0.35 * (1 - red), 1 - 0.35 * (1 - green), 1 - 0.35 * (1 - blue))) for red, green, blue in colors
    ]


def _new(width: float = 4.8, height: float = 3.0) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _plain(value: float, _: object) -> str:
    """A tick of a logarithmic axis, which matplotlib would write in its mathematical type."""
    return f"{value:g}"


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    return text.getvalue()[text.getvalue().index("<svg") :]


def noise(distribution: NoiseDistribution, edges: np.ndarray, sigmas: Sequence[float]) -> str:
    """The density of ln sigma in training, the range of each block, and the levels that the sampler visits."""
    with mpl.rc_context(STYLE):
        figure, axes = _new()
        grid = np.linspace(np.log(edges[-1]), np.log(edges[0]), 400)
        density = np.exp(-0.5 * ((grid - distribution.p_mean) / distribution.p_std) ** 2)
        density /= density.sum() * (grid[1] - grid[0])
        colors = block_colors(len(edges) - 1)
        for block, color in enumerate(colors):
            high, low = np.log(edges[block]), np.log(edges[block + 1])
            inside = (grid >= low) & (grid <= high)
            axes.fill_between(np.exp(grid[inside]), density[inside], color=color, alpha=0.75, linewidth=0)
            axes.annotate(
                f"block {block}", (np.exp((low + high) / 2), 0), (0, 4), textcoords="offset points",
                ha="center", rotation=90, va="bottom", fontsize=9, color="white" if len(colors) < 8 else INK,
            )  # fmt: skip
        axes.plot(np.exp(grid), density, color=INK, linewidth=1)
        axes.plot(sigmas, np.zeros(len(sigmas)), "v", color=INK, markersize=6, clip_on=False, zorder=3)
        axes.set(xscale="log", xlabel="sigma (triangles: where the sampler looks)", ylabel="density of ln sigma")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(_plain)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.invert_xaxis()  # the sampler goes from left to right
        return _svg(figure)


def shares(ranges: Sequence[tuple[float, float]], levels: Sequence[float]) -> str:
    """How much is hidden when each block is trained, (low, high) of each, and the levels that the sampler visits."""
    with mpl.rc_context(STYLE):
        figure, axes = _new()
        colors = block_colors(len(ranges))
        density = [1 / len(ranges) / (high - low) for low, high in ranges]
        for block, ((low, high), height, color) in enumerate(zip(ranges, density, colors, strict=True)):
            axes.bar(low, height, high - low, align="edge", color=color, alpha=0.6, linewidth=0)
            axes.annotate(
                f"block {block}", ((low + high) / 2, 0), (0, 4), textcoords="offset points",
                ha="center", rotation=90, va="bottom", fontsize=9, color="white" if len(colors) < 8 else INK,
            )  # fmt: skip
        axes.plot(levels, np.zeros(len(levels)), "v", color=INK, markersize=4, clip_on=False, zorder=3)
        axes.set(xlabel="share that is hidden (triangles: where the sampler looks)", ylabel="how often in training")
        axes.set(xlim=(1, 0), ylim=(0, 1.15 * max(density)))  # the sampler goes from left to right
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        return _svg(figure)


def over_steps(
    series: Mapping[str, tuple[Sequence[int], Sequence[float | None]]], colors: Sequence[Any], ylabel: str
) -> str:
    """Lines over training steps. The y axis is logarithmic where all values are positive and far apart."""
    with mpl.rc_context(STYLE):
        figure, axes = _new()
        values = np.array([value for _, ys in series.values() for value in ys if value is not None], float)
        for (name, (steps, ys)), color in zip(series.items(), colors, strict=True):
            y = np.array([np.nan if value is None else value for value in ys], float)
            axes.plot(steps, y, color=color, linewidth=0.8, alpha=0.35, marker="." if len(steps) <= FEW else "")
            axes.plot(steps, _smooth(y), color=color, linewidth=1.6, label=name)
        if values.size and values.min() > 0 and values.max() / values.min() > 30:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(_plain)
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="training step", ylabel=ylabel)
        if len(series) > 1:
            axes.legend(fontsize=9)
        return _svg(figure)


def _smooth(y: np.ndarray) -> np.ndarray:
    """A running mean over a twentieth of the points."""
    if not len(y):  # a run that was imported or merged has no log
        return y
    width = max(1, len(y) // 20)
    kernel = np.ones(width)
    good = np.isfinite(y)
    total = np.convolve(np.where(good, y, 0), kernel, "same")
    count = np.convolve(good, kernel, "same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def by_denoising_step(accuracies: Sequence[float], blocks: Sequence[int], num_blocks: int) -> str:
    """Bars: the accuracy after each denoising step, in the colour of the block that made it."""
    with mpl.rc_context(STYLE):
        figure, axes = _new()
        colors = block_colors(num_blocks)
        labels = [f"{i}\nblock {block}" for i, block in enumerate(blocks, 1)]
        bars = axes.bar(labels, accuracies, color=[colors[block] for block in blocks], width=0.65)
        axes.bar_label(bars, [f"{accuracy:.1%}" for accuracy in accuracies], fontsize=9, padding=2)
        axes.set(xlabel="denoising step", ylabel="accuracy", ylim=(0, 1.08))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(axis="x", visible=False)
        return _svg(figure)


def by_num_steps(series: Mapping[str, Mapping[int, float]], colors: Sequence[Any]) -> str:
    """The accuracy against the number of denoising steps of the sampler."""
    with mpl.rc_context(STYLE):
        figure, axes = _new()
        for (name, accuracies), color in zip(series.items(), colors, strict=True):
            if accuracies:
                axes.plot(list(accuracies), list(accuracies.values()), "o-", color=color, label=name, markersize=4)
        counts = sorted({count for accuracies in series.values() for count in accuracies})
        axes.set(xlabel="denoising steps of the sampler", ylabel="accuracy", xscale="log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
        if len(series) > 1:
            axes.legend(fontsize=9)
        return _svg(figure)


def confusion(matrix: Int[np.ndarray, "classes classes"], class_names: Sequence[str]) -> str:
    """Rows: the true class; columns: the answer. Shades are shares of a row; the diagonal is blue, mistakes are red."""
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        count = len(class_names)
        figure, axes = _new(5.4, 5.0)
        share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        is_right = np.eye(count, dtype=bool)
        axes.imshow(np.ma.masked_where(~is_right, share), cmap="Blues", vmin=0, vmax=1)
        mistakes = np.ma.masked_where(is_right | (matrix == 0), share)
        axes.imshow(mistakes, cmap="Reds", vmin=-0.3 * share[~is_right].max(), vmax=max(0.05, share[~is_right].max()))
        if count <= MOST_NAMED_CLASSES:
            safe = map(shown, class_names)
            names = [name if len(name) <= 14 else f"{name[:13]}…" for name in safe]
            axes.set_xticks(range(count), names, rotation=90)
            axes.set_yticks(range(count), names)
            for row, column in zip(*np.nonzero(matrix), strict=True):
                dark = share[row, column] > 0.5 and row == column
                axes.text(
                    column, row, str(matrix[row, column]), ha="center", va="center", fontsize=8,
                    color="white" if dark else INK,
                )  # fmt: skip
        axes.set(xlabel="answer", ylabel="true class")
        return _svg(figure)


def memory(rows: Mapping[str, Mapping[str, int]]) -> str:
    """Stacked bars, in MiB: what a training step holds, by what it is."""
    with mpl.rc_context(STYLE):
        figure, axes = _new(4.8, 0.9 + 0.55 * len(rows))
        names = list(rows)[::-1]
        left = np.zeros(len(names))
        kinds = list(next(iter(rows.values())))
        for kind, color in zip(kinds, mpl.colormaps["cividis"](np.linspace(0.1, 0.9, len(kinds))), strict=True):
            width = np.array([rows[name][kind] / MIB for name in names])
            bars = axes.barh(names, width, left=left, color=color, height=0.6, label=kind)
            left += width
        axes.bar_label(bars, [f"{total:.1f}" for total in left], padding=3, fontsize=9)
        axes.set_xlim(0, left.max() * 1.15)
        axes.set(xlabel="MiB on a device")
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)
        return _svg(figure)


def by_group(groups: Mapping[str, Sequence[float]], xlabel: str, *, percent: bool) -> str:
    """A row for each group of runs: a dot for each run, a bar for their mean."""
    with mpl.rc_context(STYLE):
        figure, axes = _new(6.4, 0.9 + 0.42 * len(groups))
        names = list(groups)[::-1]
        for row, name in enumerate(names):
            values = np.array(groups[name])
            axes.plot([values.mean()] * 2, [row - 0.28, row + 0.28], color=ACCENT, linewidth=3)
            axes.plot(values, np.full(len(values), row), "o", color=INK, markersize=4, alpha=0.7)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(-0.6, len(names) - 0.4)
        if percent:
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=1))
        axes.set(xlabel=f"{xlabel} (dots: runs, bars: means)")
        return _svg(figure)

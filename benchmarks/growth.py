"""How memory and time of a training step grow with the number of blocks, depth, width and batch.

  python benchmarks/growth.py [--plot=docs/growth.png] [--repeats=N]

A base model, of which one size at a time is varied; the plain model beside DiffusionBlocks. Memory is XLA's account of
the compiled step, with idle blocks on the host; time is the median of its runs.
Prints a table and, last, one JSON object. The plot needs `uv sync --extra benchmark`.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BASE = {"num_layers": 12, "num_blocks": 3, "hidden_size": 128, "batch_size": 64}
GROWTH = {
    "num_blocks": (1, 2, 3, 4, 6, 12),
    "num_layers": (6, 12, 24),
    "hidden_size": (64, 128, 256),
    "batch_size": (16, 32, 64, 128),
}
TITLES = {
    "num_blocks": "blocks B (12 layers)",
    "num_layers": "layers (B = 3)",
    "hidden_size": "width (B = 3)",
    "batch_size": "batch (B = 3)",
}
MODELS = {"plain": "vit", "DiffusionBlocks": "dblock"}
MIB = 2**20


def measure(sizes: dict[str, int], model_type: str, repeats: int) -> dict[str, float]:
    """{"mib", "ms"} of one step."""
    import jax

    from benchmarks import ours
    from dblocks_jax.modes.program import total_bytes, wanted_step
    from dblocks_jax.tasks.classify.task import CLASSIFY

    sizes = sizes | {"intermediate_size": 4 * sizes["hidden_size"], "num_heads": sizes["hidden_size"] // 32}
    config = ours.get_config("dblock", sizes | {"model_type": model_type})
    wanted = wanted_step(CLASSIFY, config, ours.CIFAR100)
    compiled = wanted.compile()
    parts, data, steps = wanted.zeros()
    times = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        parts, log = compiled(parts, data, steps)
        jax.block_until_ready((parts, log))
        times.append(time.perf_counter() - began)
    mib = total_bytes(compiled.memory_analysis()) / MIB
    return {"mib": round(mib, 1), "ms": round(1e3 * statistics.median(times[1:]), 1)}


def measure_all(repeats: int) -> list[dict[str, Any]]:
    """A row for each size of each kind; the base model, which is in all of them, is measured once."""
    known: dict[tuple[Any, ...], dict[str, float]] = {}
    rows = []
    for field, values in GROWTH.items():
        for value in values:
            sizes = BASE | {field: value}
            row: dict[str, Any] = {"varied": field, "value": value}
            for name, model_type in MODELS.items():
                seen = sizes if model_type == "dblock" else sizes | {"num_blocks": 1}
                key = (model_type, *seen.values())
                if key not in known:
                    known[key] = measure(sizes, model_type, repeats)
                row[name] = known[key]
            rows.append(row)
            print(format_row(row), flush=True)
    return rows


def format_row(row: dict[str, Any]) -> str:
    plain, blocks = row["plain"], row["DiffusionBlocks"]
    return (
        f"| {row['varied']} = {row['value']} | {plain['mib']} | {blocks['mib']} | {blocks['mib'] / plain['mib']:.3f} "
        f"| {plain['ms']} | {blocks['ms']} | {blocks['ms'] / plain['ms']:.3f} |"
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Two rows of panels: memory and time, against each size."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(GROWTH), figsize=(13, 5.5), sharey="row", layout="constrained")
    for column, field in enumerate(GROWTH):
        points = [row for row in rows if row["varied"] == field]
        for row, (unit, label) in enumerate((("mib", "MiB on the device"), ("ms", "ms a step"))):
            axis = axes[row, column]
            for name, color in zip(MODELS, ("0.45", "tab:blue"), strict=True):
                values = [point["value"] for point in points]
                axis.plot(values, [point[name][unit] for point in points], "o-", color=color, label=name)
            axis.set(xscale="log", yscale="log", xlabel=TITLES[field])
            axis.set_xticks(values, labels=map(str, values))
            axis.minorticks_off()
            axis.grid(color="0.9")
            if column == 0:
                axis.set_ylabel(label)
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path, help="where to save the picture")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    import jax

    machine = {"device": jax.devices()[0].device_kind, "cores": len(os.sched_getaffinity(0)), "jax": jax.__version__}
    print("| | plain MiB | DiffusionBlocks MiB | ratio | plain ms | DiffusionBlocks ms | ratio |")
    print("|---|---|---|---|---|---|---|")
    rows = measure_all(args.repeats)
    if args.plot:
        plot(rows, args.plot)
    print(json.dumps({"machine": machine, "base": BASE, "rows": rows}))


if __name__ == "__main__":
    main()

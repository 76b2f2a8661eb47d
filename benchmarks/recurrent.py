"""What a training step of recurrent depth costs both ways: Huginn through its last steps, the denoiser in one pass.

  python benchmarks/recurrent.py [--steps=64]

The small model of `configs/recurrent_text.py`. Memory is XLA's account of the compiled step; time is the mean of
`steps` of them, in turns, since Huginn's number of core steps is drawn for each (mean 33, standard deviation 18).
Prints a line for each, and last one JSON object.
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

MODELS = ("huginn", "dblock")
MIB = 2**20


def make(model_type: str) -> tuple[float, Any]:
    """(MiB of a step, one step at a position, to its end)."""
    import jax
    import numpy as np

    from configs import recurrent_text
    from dblocks_jax.modes.program import total_bytes, wanted_step
    from dblocks_jax.tasks.recurrent.task import RECURRENT
    from dblocks_jax.training.config import check_config

    config = recurrent_text.get_config()
    config.model_type = model_type
    check_config(RECURRENT, config)
    card = RECURRENT.card_without_data(config)
    wanted = wanted_step(RECURRENT, config, card)
    compiled = wanted.compile()
    parts, batch, steps = wanted.zeros()

    def run(position: int) -> None:
        nonlocal parts
        parts, log = compiled(parts, batch, steps._replace(position=np.int32(position)))
        jax.block_until_ready((parts, log))

    return total_bytes(compiled.memory_analysis()) / MIB, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=64)
    args = parser.parse_args()
    import jax

    models = {name: make(name) for name in MODELS}
    times: dict[str, list[float]] = {name: [] for name in MODELS}
    for position in range(args.steps + 1):
        for name, (_, run) in models.items():
            began = time.perf_counter()
            run(position)
            times[name].append(time.perf_counter() - began)
    rows = {
        name: {"mib": round(mib, 1), "ms": round(1e3 * statistics.mean(times[name][1:]), 1)}
        for name, (mib, _) in models.items()
    }
    ratio = {field: round(rows["dblock"][field] / rows["huginn"][field], 3) for field in ("mib", "ms")}
    for name, row in (*rows.items(), ("dblock / huginn", ratio)):
        print(f"{name:16s} {row['mib']:>9} MiB {row['ms']:>9} ms")
    machine = {"device": jax.devices()[0].device_kind, "cores": len(os.sched_getaffinity(0)), "jax": jax.__version__}
    print(json.dumps({"machine": machine, "steps": args.steps, "rows": rows, "ratio": ratio}))


if __name__ == "__main__":
    main()

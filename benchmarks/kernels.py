"""Where a training step's time goes on a GPU: its kernels by name, from JAX's profiler.

    python benchmarks/kernels.py [--kind=dblock|vit] [--dtype=float32|bfloat16] [--parts=N] [--by_jax] [--keep=FOLDER]

Runs 20 steps of the CIFAR configuration, as the trainer makes them, twice: once timed from start to end and once
profiled. Prints the kernels that take longest, the time of a step, the part of it in which a kernel runs, and the most
memory in use. For comparison: MLPs go backward in at most so many --parts; with --by_jax nothing goes backward our way,
but as JAX and XLA choose. --keep leaves the profile.
"""

import argparse
import collections
import contextlib
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax

from benchmarks import ours
from benchmarks.against_torch import milliseconds
from dblocks_jax.models import chunks, primitives

STEPS, MOST = 20, 30


@contextlib.contextmanager
def by_jax() -> Any:
    """JAX differentiates all, XLA says what is kept for it and what is computed first."""
    written = primitives.once.__code__
    with (
        mock.patch.object(jax.custom_vjp, "__call__", lambda self, *args, **kwargs: self.fun(*args, **kwargs)),
        mock.patch.object(jax, "checkpoint", lambda function, **_: function),
        mock.patch.object(jax.lax, "optimization_barrier", lambda x: x),
    ):
        primitives.once.__code__ = (lambda there, x: (there, x)).__code__
        try:
            yield
        finally:
            primitives.once.__code__ = written


def kernels_of(folder: Path) -> tuple[dict[str, list[float]], float]:
    """({name: [ms of all its runs, runs]}, ms in which any ran) of a profile; names end before their numbers."""
    path = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    found: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0])
    busy: list[tuple[float, float]] = []
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                name = re.sub(r"(_\d+|\.\d+)+$", "", event.name)
                found[name][0] += event.duration_ns / 1e6
                found[name][1] += 1
                busy.append((event.start_ns / 1e6, (event.start_ns + event.duration_ns) / 1e6))
    return found, _union(busy)


def _union(spans: list[tuple[float, float]]) -> float:
    """The length of what spans cover together."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered


def measure(kind: str, overrides: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Time and profile the steps of one model."""
    steps = ours.OurSteps(ours.get_config(kind, overrides))

    def work() -> None:
        steps.enqueue(0, STEPS)
        steps.wait()

    for _ in range(2):
        work()
    each = milliseconds(work) / STEPS
    with jax.profiler.trace(folder):
        work()
    found, busy = kernels_of(folder)
    for name, (ms, runs) in sorted(found.items(), key=lambda item: -item[1][0])[:MOST]:
        print(f"{ms / STEPS:9.3f} ms {runs / STEPS:7.1f} runs  {name[:110]}")
    stats = jax.local_devices()[0].memory_stats() or {}
    return {"kind": kind} | overrides | {
        "ms_of_a_step": round(each, 3),
        "ms_with_a_kernel": round(busy / STEPS, 3),
        "kernels": round(sum(runs for _, runs in found.values()) / STEPS, 1),
        "peak_mib": round(stats.get("peak_bytes_in_use", 0) / 2**20, 1),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="dblock", choices=("dblock", "vit"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--parts", type=int, default=chunks.MOST_PARTS, help="of an MLP, at most")
    parser.add_argument("--by_jax", action="store_true")
    parser.add_argument("--keep", type=Path, help="where to leave the profile")
    args = parser.parse_args()
    chunks.MOST_PARTS = args.parts
    with by_jax() if args.by_jax else contextlib.nullcontext(), tempfile.TemporaryDirectory() as folder:
        found = measure(args.kind, {"dtype": args.dtype}, args.keep or Path(folder))
    print(json.dumps({"parts": "by_jax" if args.by_jax else args.parts} | found), flush=True)


if __name__ == "__main__":
    main()

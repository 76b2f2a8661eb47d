"""Time our training step against plain PyTorch's, alternately in one run.

  python benchmarks/against_torch.py [--repeats=N] [--rows=block,plain,three_blocks] [--dtype=float32|bfloat16]
                                     [--compile[=MODE]]

Runs on a GPU if both JAX and PyTorch see one, else on the CPU with all its cores. Prints a table and, last, one JSON
object. Install PyTorch with `uv sync --extra benchmark`.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

# Ours and the peer share a GPU; this must be known before jax starts.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROWS = {  # name -> (what is timed, what our time may be at most, as a multiple of the other)
    "block": ("one block's step against PyTorch's", 0.80),
    "plain": ("the plain step against PyTorch's", 0.75),
    "three_blocks": ("a step of each of three blocks against our plain step", 1.00),  # the paper's Table 12: 1.07
}
ENQUEUED = 50  # steps that are started before waiting, where throughput is measured


class Steps(Protocol):
    """Training steps of one model."""

    def enqueue(self, block: int = 0, count: int = 1) -> None: ...
    def wait(self) -> None: ...


def milliseconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


def run_blocks(steps: Steps, blocks: list[int]) -> None:
    """One step of each of `blocks`, to the end."""
    for block in blocks:
        steps.enqueue(block)
    steps.wait()


def alternate(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each piece of work, which take turns so that a slow minute of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(milliseconds(work))
    return times


def quartiles(times: list[float]) -> list[float]:
    """[first, third]."""
    first, _, third = statistics.quantiles(times, n=4, method="inclusive")
    return [round(first, 3), round(third, 3)]


def summarize(name: str, peer: str, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """One row of the result."""
    ours_ms, peer_ms = statistics.median(ours), statistics.median(theirs)
    return {
        "name": name,
        "peer": peer,
        "ours_ms": round(ours_ms, 3),
        "ours_iqr_ms": quartiles(ours),
        "peer_ms": round(peer_ms, 3),
        "peer_iqr_ms": quartiles(theirs),
        "ratio": round(ours_ms / peer_ms, 4),
        "goal": round(ROWS[name][1], 4),
    }


def host_times(steps: Steps, repeats: int) -> list[float]:
    """Milliseconds until the call that starts one step returns, with the device idle."""
    times = []
    for _ in range(repeats):
        times.append(milliseconds(steps.enqueue))
        steps.wait()
    return times


def throughput(steps: Steps, repeats: int, *, one_call: bool = False) -> float:
    """Milliseconds a step when many are started before waiting: by one call each, or all by one call."""

    def work() -> None:
        for _ in range(1 if one_call else ENQUEUED):
            steps.enqueue(0, ENQUEUED if one_call else 1)
        steps.wait()

    return round(statistics.median(milliseconds(work) for _ in range(repeats)) / ENQUEUED, 3)


def time_against_peers(
    name: str, ours: Steps, peers: dict[str, Callable[[], Steps]], repeats: int, on_gpu: bool
) -> list[dict[str, Any]]:
    """A row for each peer. One that fails to run, as `torch.compile` may, has its reason for a row."""
    contestants: dict[str, Steps] = {"ours": ours}
    rows, broken = [], []
    for peer, make in peers.items():
        try:
            steps = make()
            warm_up(steps, [0])
            contestants[peer] = steps
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            broken.append({"name": name, "peer": peer, "error": f"{type(error).__name__}: {reason}"})
    works = {who: lambda steps=steps: run_blocks(steps, [0]) for who, steps in contestants.items()}
    times = alternate(works, repeats)
    host_ms = statistics.median(host_times(ours, repeats))
    for peer, steps in contestants.items():
        if peer == "ours":
            continue
        row = summarize(name, peer, times["ours"], times[peer])
        row |= {"host_ms": round(host_ms, 3), "host_share": round(host_ms / row["ours_ms"], 4)}
        if on_gpu:
            few = max(3, repeats // 10)
            row[f"{name}_throughput_ms"] = {
                "ours": throughput(ours, few),
                "ours_in_one_call": throughput(ours, few, one_call=True),
                "peer": throughput(steps, few),
            }
        rows.append(row)
    return rows + broken


def warm_up(steps: Steps, blocks: list[int]) -> None:
    """Compile, and let allocators and clocks settle."""
    for _ in range(3):
        run_blocks(steps, blocks)


def make_peers(config: Any, device: Any, compile_mode: str | None) -> dict[str, Callable[[], Steps]]:
    """The PyTorch programs to compare with; each is built when it is called."""
    from benchmarks import peer

    all_tokens = peer.Settings.of(config)
    first_token = peer.Settings.of(config, read_first_only=True)
    peers: dict[str, Callable[[], Steps]] = {
        "eager": lambda: peer.Steps(all_tokens, device=device),
        "eager, last layer for the first token only": lambda: peer.Steps(first_token, device=device),
    }
    if compile_mode is not None:
        peers |= {
            "compiled": lambda: peer.Steps(all_tokens, device=device, compile_mode=compile_mode),
            "compiled, last layer for the first token only": lambda: peer.Steps(
                first_token, device=device, compile_mode=compile_mode
            ),
        }
    return peers


def describe_machine(config: Any, device: Any) -> dict[str, Any]:
    """What the numbers depend on besides the programs."""
    import jax
    import torch

    return {
        "device": jax.devices()[0].device_kind if device.type == "cuda" else "cpu",
        "platform": jax.devices()[0].client.platform_version,
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": importlib.metadata.version("flax"),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "dtype": config.dtype,
        "matmul_precision": {"jax": config.matmul_precision, "torch": torch.get_float32_matmul_precision()},
        "batch_size": config.batch_size,
    }


def cpu_model() -> str:
    """The processor's name where Linux tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def choose_device() -> Any:
    """PyTorch's device, to match JAX's, with the same precision of products and all cores."""
    import jax
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if jax.default_backend() != "gpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        sys.exit("JAX has a GPU but this PyTorch sees none; JAX_PLATFORMS=cpu compares on the CPU")
    torch.set_float32_matmul_precision("high")  # TF32, as JAX does by default
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda")


def measure(names: list[str], *, repeats: int | None, dtype: str, compile_mode: str | None) -> dict[str, Any]:
    """Time the rows: {"machine": ..., "rows": [...]}."""
    from benchmarks import ours

    configs = {name: ours.get_config(name, {"dtype": dtype}) for name in ("dblock", "vit")}
    device = choose_device()
    on_gpu = device.type == "cuda"
    repeats = repeats or (100 if on_gpu else 10)
    machine = describe_machine(configs["vit"], device)
    blocks = list(range(configs["dblock"].num_blocks))
    models = {}
    if {"block", "three_blocks"} & set(names):
        models["dblock"] = ours.OurSteps(configs["dblock"])
        warm_up(models["dblock"], blocks)
    if {"plain", "three_blocks"} & set(names):
        models["vit"] = ours.OurSteps(configs["vit"])
        warm_up(models["vit"], [0])

    rows = []
    for name, kind in {"block": "dblock", "plain": "vit"}.items():
        if name in names:
            peers = make_peers(configs[kind], device, compile_mode)
            rows += time_against_peers(name, models[kind], peers, repeats, on_gpu)
    if "three_blocks" in names:
        works = {
            "three": lambda: run_blocks(models["dblock"], blocks),
            "plain": lambda: run_blocks(models["vit"], [0]),
        }
        times = alternate(works, repeats)
        rows.append(summarize("three_blocks", "our plain step", times["three"], times["plain"]))
    return {"machine": machine, "repeats": repeats, "rows": rows}


def print_table(result: dict[str, Any]) -> None:
    """The rows for people."""
    for name in dict.fromkeys(row["name"] for row in result["rows"]):
        print(f"\n{name}: {ROWS[name][0]}")
        print(f"  {'against':<46} {'ours ms':>9} {'(IQR)':>16} {'other ms':>9} {'(IQR)':>16} {'ratio':>6} {'goal':>5}")
        for row in result["rows"]:
            if row["name"] != name:
                continue
            if "error" in row:
                print(f"  {row['peer']:<46} {row['error']}")
                continue
            spans = ["{:.1f}..{:.1f}".format(*row[f"{who}_iqr_ms"]) for who in ("ours", "peer")]
            print(
                f"  {row['peer']:<46} {row['ours_ms']:9.1f} {spans[0]:>16} {row['peer_ms']:9.1f} {spans[1]:>16}"
                f" {row['ratio']:6.3f} {row['goal']:5.2f}"
            )
            for key in ("host_ms", "host_share", f"{name}_throughput_ms"):
                if key in row:
                    print(f"    {key}: {row[key]}")
    print()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, help="timed rounds [10 on a CPU, 100 on a GPU]")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"which of {', '.join(ROWS)} [all]")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    modes = ("default", "reduce-overhead", "max-autotune")
    parser.add_argument("--compile", nargs="?", const="default", choices=modes, help="time torch.compile too")
    args = parser.parse_args()
    args.rows = args.rows.split(",")
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"unknown rows {', '.join(sorted(unknown))}: choose from {', '.join(ROWS)}")
    if args.repeats is not None and args.repeats < 2:
        parser.error("--repeats must be at least 2, for quartiles")
    return args


def main() -> None:
    args = parse_args()
    if importlib.util.find_spec("torch") is None:
        sys.exit("against_torch.py: PyTorch is not installed: uv sync --extra benchmark")
    result = measure(args.rows, repeats=args.repeats, dtype=args.dtype, compile_mode=args.compile)
    print_table(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Train a model on a machine whose memory its plain training does not fit into: ViT-L/16 with blocks that wait on disk.

    python benchmarks/capped.py [--gib=2] [--num_blocks=24] [--batch_size=8] [--steps=2] [--folder=DIR]

A machine with GIB of memory is a control group of Linux (one must be root to make it): all that a process has counts
there, the pages of files that it reads and writes too, and there is no swap; the system takes back what is of files,
and kills the process when that is not enough. In turns, each by launch.py in a process of its own, on random images of
224 pixels: plain training and block training (`idle_blocks=disk`) within GIB, the latter's command again for as many
more steps, and plain training in all the memory that there is. Prints a line for each: how it ended; what it had at
its peak of its own (anonymous), mapped of files, and both at once; seconds of a step; and last one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
GROUPS = Path("/sys/fs/cgroup")
SIZE, IMAGES = 224, {"train": 8, "test": 4}  # pixels of a side; images of each of two classes
VIT_L = {
    "image_size": SIZE, "patch_size": 16, "num_layers": 24, "hidden_size": 1024, "intermediate_size": 4096,
    "num_heads": 16, "dataset": "folder", "crop_padding": 16, "save_every_n_epochs": 1000, "log_every_n_steps": 1,
}  # fmt: skip
FIELDS = {"RssAnon": "anonymous", "RssFile": "of_files", "VmHWM": "together"}  # of /proc/PID/status, in KiB


def make_images(folder: Path) -> None:
    """Random pixels, the same at every call."""
    rng = np.random.default_rng(0)
    for split, count in IMAGES.items():
        for name in ("one", "other"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(
                    folder / split / name / f"{i}.png"
                )


@contextmanager
def machine(gib: float) -> Iterator[Path]:
    """A control group with so much memory and no swap: the file that takes a process in."""
    first = (GROUPS / "memory").is_dir()  # version 1 of control groups
    group = (GROUPS / "memory" if first else GROUPS) / f"capped_{os.getpid()}"
    try:
        group.mkdir()
        limits = (
            ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes") if first else ("memory.max", "memory.swap.max")
        )
        (group / limits[0]).write_text(str(int(gib * 2**30)))
        if (group / limits[1]).exists():
            (group / limits[1]).write_text(str(int(gib * 2**30) if first else 0))
    except OSError as error:
        sys.exit(f"no control group can be made ({error}): be root, on Linux")
    try:
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


def watch(command: list[str], procs: Path | None) -> tuple[int, str, dict[str, float]]:
    """Run a command to its end: (exit code, what it said last, MiB at the peak)."""
    enter = None if procs is None else lambda: procs.write_text(str(os.getpid()))
    peak = dict.fromkeys(FIELDS.values(), 0.0)
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, preexec_fn=enter)  # noqa: PLW1509
        while process.poll() is None:
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in FIELDS:
                    peak[FIELDS[name]] = max(peak[FIELDS[name]], int(value.split()[0]) / 1024)
            time.sleep(0.02)
        said.seek(0)
        return process.returncode, (said.read().splitlines() or [""])[-1], peak


def rates(workdir: Path) -> list[float]:
    """Images a second of the steps that are logged, but for the first of a start."""
    log = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [line["images_per_second"] for line in lines if line.get("images_per_second")]


def run(config: str, workdir: Path, procs: Path | None, **fields: Any) -> dict[str, Any]:
    """One row of the table."""
    settings = [f"--config.{name}={value}" for name, value in (VIT_L | fields).items()]
    before, began = len(rates(workdir)), time.perf_counter()
    code, said, peak = watch(
        [sys.executable, "launch.py", f"--config={config}", f"--workdir={workdir}", *settings], procs
    )
    ended = {0: "finished", -9: "killed: no memory was left"}.get(code, f"ended with {code}: {said}")
    row: dict[str, Any] = {"ended": ended, **{name: round(mib) for name, mib in peak.items()}}
    row["seconds_a_step"] = [round(fields["batch_size"] / rate, 1) for rate in rates(workdir)[before:]]
    return row | {"seconds": round(time.perf_counter() - began)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--num_blocks", type=int, default=24)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where runs and images are made, about 20 GB; none is left")
    args = parser.parse_args()
    plain, blocks = "configs/vit_cifar100.py", "configs/dblock_cifar100.py"
    rows = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as made:
        folder = Path(made)
        make_images(folder / "images")
        common = {"data_dir": folder / "images", "batch_size": args.batch_size, "eval_batch_size": args.batch_size}
        disk = common | {"num_blocks": args.num_blocks, "idle_blocks": "disk"}
        with machine(args.gib) as procs:
            for name, config, workdir, fields in (
                ("plain", plain, "plain", common | {"max_steps": args.steps}),
                ("blocks on disk", blocks, "blocks", disk | {"max_steps": args.steps}),
                ("the same, resumed", blocks, "blocks", disk | {"max_steps": 2 * args.steps}),
            ):
                rows[f"{name}, {args.gib:g} GiB"] = run(config, folder / workdir, procs, **fields)
                print(name, rows[f"{name}, {args.gib:g} GiB"], flush=True)
        rows["plain, no cap"] = run(plain, folder / "free", None, **common, max_steps=args.steps)
    print(
        f"{'MiB at the peak':28s}{'anonymous':>11s}{'of files':>11s}{'together':>11s}  seconds a step, and how it ended"
    )
    for name, row in rows.items():
        sizes = "".join(f"{row[field]:11d}" for field in FIELDS.values())
        print(f"{name:28s}{sizes}  {row['seconds_a_step']} {row['ended']}")
    print(json.dumps({"cores": len(os.sched_getaffinity(0)), **vars(args), "folder": None, "rows": rows}))


if __name__ == "__main__":
    main()

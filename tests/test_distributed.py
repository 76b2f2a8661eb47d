"""Two processes train as one: the same numbers, one writer, checkpoints that any number reads, and a common end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from runs import saved_steps, wait_until

from configs import dblock_digits
from dblocks_jax.modes.train import train

ROOT = Path(__file__).parents[1]

TINY = {
    "num_layers": 2, "num_blocks": 2, "hidden_size": 12, "num_heads": 2, "intermediate_size": 16, "batch_size": 1408,
    "num_warmup_steps": 0, "scheduler_type": "constant_with_warmup", "log_every_n_steps": 1,
    "save_every_n_epochs": 1,
}  # fmt: skip
FLAGS = ["--config=configs/dblock_digits.py", *(f"--config.{field}={value}" for field, value in TINY.items())]


def train_alone(workdir: Path, num_epochs: int) -> dict:
    config = dblock_digits.get_config()
    config.update(TINY, num_epochs=num_epochs)
    return train(config, workdir, command=[], overrides={})


@contextmanager
def two_started(*args: str, second: tuple[str, ...] = (), **environment: str) -> Iterator[list[subprocess.Popen]]:
    """launch.py in two processes that know of each other; the flags `second` go to the second alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    running = []
    for index in range(2):
        command = [sys.executable, "launch.py", "--distributed", *args, *(second if index else ())]
        job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | job | environment, text=True, **pipes))
    try:
        yield running
    finally:
        for process in running:
            process.kill()


def launch_two(*args: str, second: tuple[str, ...] = ()) -> tuple[subprocess.CompletedProcess, ...]:
    """Both to their end."""
    with two_started(*args, second=second) as running:
        outputs = [process.communicate(timeout=120) for process in running]
    return tuple(
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(running, outputs, strict=True)
    )


def test_two_processes_train_as_one_and_take_turns_with_one(tmp_path):
    """A run by one process, and one of which the middle epoch is by two: each reads the other's checkpoint."""
    expected = train_alone(tmp_path / "whole", 3)
    train_alone(tmp_path / "turns", 1)
    first, second = launch_two(*FLAGS, "--config.num_epochs=2", f"--workdir={tmp_path / 'turns'}")
    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, second.stderr
    assert not second.stderr and "{" not in second.stdout  # Gloo prints a line to standard output
    by_two = json.loads(first.stdout.splitlines()[-1])
    assert by_two["steps_run"] == 2
    result = train_alone(tmp_path / "turns", 3)
    assert result["steps_run"] == 2

    one, turns = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "turns")
    )
    steps_of_one, steps_of_turns = ([line["blocks"] for line in lines if "blocks" in line] for lines in (one, turns))
    assert len(steps_of_one) == len(steps_of_turns) == 6  # each once: a single process writes
    for block_means, others in zip(steps_of_one, steps_of_turns, strict=True):
        for block, means in block_means.items():
            assert others[block] == pytest.approx(means, rel=1e-5)
    evaluated = {line["step"]: line for line in one if "split" in line}
    for score in ("num_images", "top1", "top5", "macro_f1", "cross_entropy", "accuracy_by_step"):
        assert by_two[score] == pytest.approx(evaluated[4][score], rel=1e-5), score
        assert result[score] == pytest.approx(expected[score], rel=1e-5), score
    starts = [json.loads(line) for line in (tmp_path / "turns" / "starts.jsonl").read_text().splitlines()]
    assert [len(start["devices"]) for start in starts] == [1, 2, 1]


@pytest.mark.long
def test_a_mistake_in_one_ends_both_with_one_line(tmp_path):
    both = launch_two(*FLAGS, f"--workdir={tmp_path / 'new'}", second=("--config.patch_size=3",))
    assert [done.returncode for done in both] == [1, 1]
    lines = [line for done in both for line in done.stderr.splitlines()]
    assert len(lines) == 1 and "patch_size=3 must divide image_size=8" in lines[0]
    assert not (tmp_path / "new").exists()


@pytest.mark.long
def test_two_processes_stop_at_the_same_step(tmp_path):
    """A signal to one of them is a signal to both, and what they save is a point on the undisturbed run's way."""
    workdir, fields = tmp_path / "run", ["--config.num_epochs=200", "--config.save_every_n_epochs=200"]
    with two_started(*FLAGS, *fields, f"--workdir={workdir}") as both:
        metrics = workdir / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3)
        asked = time.monotonic()
        both[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [75, 75], outputs
    assert time.monotonic() - asked < 10
    assert "stopped at step" in outputs[0][1] + outputs[1][1]
    [step] = saved_steps(workdir)
    assert 3 < step < 400
    train_alone(tmp_path / "alone", -(-step // 2))  # the epoch in which they stopped, to its end
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (workdir, tmp_path / "alone")
    ]
    of_both, of_one = ([line["blocks"] for line in lines if "blocks" in line] for lines in lines)
    assert len(of_both) == step
    for means, others in zip(of_both, of_one, strict=False):
        assert means.keys() == others.keys()
        for block, values in means.items():
            assert values == pytest.approx(others[block], rel=1e-3)


@pytest.mark.long
def test_a_signal_before_the_first_step_ends_both(tmp_path):
    with two_started(*FLAGS, f"--workdir={tmp_path / 'run'}", JAX_COMPILATION_CACHE_DIR="") as both:
        wait_until((tmp_path / "run" / "starts.jsonl").exists)
        asked = time.monotonic()
        both[0].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [75, 75], outputs
    assert time.monotonic() - asked < 10

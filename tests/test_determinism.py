"""The same seed on the same machine gives the same bits, whatever is logged, saved, scored or done in one call."""

from pathlib import Path

import numpy as np
import pytest
from runs import command, saved_steps, started, wait_until
from saved import state_of

from configs import dblock_digits
from dblocks_jax.train import train

TINY = {
    "num_layers": 2, "hidden_size": 12, "num_heads": 2, "intermediate_size": 16, "num_blocks": 2, "batch_size": 600,
    "num_epochs": 3, "num_warmup_steps": 0, "log_every_n_steps": 1, "save_every_n_epochs": 1, "steps_per_call": 1,
}  # fmt: skip


def final_state(workdir: Path, **changes: object) -> dict[str, np.ndarray]:
    config = dblock_digits.get_config()
    config.update(TINY | changes)
    return state_of(workdir, train(config, workdir, command=[], overrides={})["step"])


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, np.ndarray]:
    return final_state(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"log_every_n_steps": 1000, "save_every_n_epochs": 1000, "steps_per_call": 50},  # next to no logs or scores
        {"eval_batch_size": 7, "max_bad_steps": 1, "postfix": "x", "idle_blocks": "host"},
    ],
)
def test_every_bit_is_the_same(expected, tmp_path, changes):
    found = final_state(tmp_path, **changes)
    assert found.keys() == expected.keys() and len(found) > 50
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def measure(process_id: int) -> dict[str, int]:
    """Resident memory in KiB, open files and threads of a process."""
    folder = Path("/proc") / str(process_id)
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line)
    files = len(list((folder / "fd").iterdir()))
    return {"memory": int(status["VmRSS"].split()[0]), "files": files, "threads": int(status["Threads"])}


@pytest.mark.long
def test_memory_files_and_threads_stay_constant_over_2000_steps(tmp_path, capsys):
    """Saved and scored at every fourth step. Compared are the third and the last quarter of the steps."""
    fields = {"num_epochs": 500, "save_every_n_epochs": 2, "log_every_n_steps": 4, "max_steps": 2000}
    quarters: dict[int, list[dict[str, int]]] = {3: [], 4: []}
    with started(*command(tmp_path, **fields), quiet=True) as process:
        wait_until(lambda: max(saved_steps(tmp_path), default=0) >= 1000, 600)
        while process.poll() is None:
            step = max(saved_steps(tmp_path), default=0)
            if step >= 2000:
                break
            quarters[3 if step < 1500 else 4].append(measure(process.pid))
            wait_until(lambda step=step: max(saved_steps(tmp_path), default=0) != step or process.poll() is not None)
    assert all(len(measured) > 50 for measured in quarters.values())

    def mean(quarter: int, what: str) -> float:
        return float(np.mean([measured[what] for measured in quarters[quarter]]))

    def most(quarter: int, what: str) -> int:
        return max(measured[what] for measured in quarters[quarter])

    growth = mean(4, "memory") / mean(3, "memory") - 1
    with capsys.disabled():
        print(
            f"\n2000 steps, 500 saves and scores: memory {mean(3, 'memory') / 1024:.0f} MiB, grown by {growth:.2%}; "
            f"open files at most {most(3, 'files')} and {most(4, 'files')}, threads {most(3, 'threads')} and "
            f"{most(4, 'threads')}"
        )
    assert growth < 0.01
    assert most(4, "files") <= most(3, "files") + 2 and most(4, "threads") <= most(3, "threads") + 2

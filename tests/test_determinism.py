"""The same seed on the same machine gives the same bits, whatever is logged, saved, scored or done in one call."""

from pathlib import Path

import numpy as np
import pytest
from runs import command, logged, started, wait_until
from saved import state_of

from configs import dblock_digits
from dblocks_jax.modes.train import train

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
        pytest.param(
            {"eval_batch_size": 7, "max_bad_steps": 1, "postfix": "x", "idle_blocks": "host"}, marks=pytest.mark.long
        ),
    ],
)
def test_every_bit_is_the_same(expected, tmp_path, changes):
    found = final_state(tmp_path, **changes)
    assert found.keys() == expected.keys() and len(found) > 50
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def measure(process_id: int) -> dict[str, int]:
    """Memory of its own in KiB, open files and threads of a process.

    Not all that is resident: the system lets go of what it can read from files again whenever it likes.
    """
    folder = Path("/proc") / str(process_id)
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line)
    files = len(list((folder / "fd").iterdir()))
    memory = sum(int(status[name].split()[0]) for name in ("RssAnon", "VmSwap"))
    return {"memory": memory, "files": files, "threads": int(status["Threads"])}


@pytest.mark.long
@pytest.mark.parametrize("every", [4, 2000])
def test_memory_files_and_threads_stay_constant_over_2000_steps(tmp_path, capsys, every):
    """Saved and scored so often; measured over the last half."""
    fields = {"num_epochs": 500, "save_every_n_epochs": every // 2, "log_every_n_steps": 4, "max_steps": 2000}

    def steps_done() -> int:
        return logged(tmp_path)[-1]["step"] if logged(tmp_path) else 0

    measured = []
    with started(*command(tmp_path, **fields), quiet=True) as process:
        wait_until(lambda: steps_done() >= 1000, 600)
        while (step := steps_done()) < 1990 and process.poll() is None:
            measured.append(measure(process.pid))
            wait_until(lambda step=step: steps_done() > step or process.poll() is not None)
    assert len(measured) > 20
    memory, files, threads = (np.array([point[what] for point in measured]) for what in ("memory", "files", "threads"))
    slope = np.polyfit(np.linspace(0, 1, len(memory)), memory, 1)[0]
    growth, of_a_save = slope / memory.mean(), slope / (1000 / every)
    with capsys.disabled():
        print(
            f"\n2000 steps, saved and scored at every {every}th: memory {memory.mean() / 1024:.0f} MiB, grown by "
            f"{growth:.2%} in the last half, or {of_a_save:.0f} KiB a save; open files {np.median(files):.0f} "
            f"({files.min()} to {files.max()}), threads {np.median(threads):.0f} ({threads.min()} to {threads.max()})"
        )
    # TensorStore 0.1.86 loses some memory for each array that is saved (`KvStore.Spec.to_json`), and here are 180.
    assert growth < 0.01 or (every == 4 and of_a_save < 150)
    # A save opens files and starts threads for a moment: a leak would raise what is left between two saves.
    half = len(files) // 2
    for counts in (files, threads):
        assert counts[half:].min() - counts[:half].min() < 0.1 * (500 / every) + 1

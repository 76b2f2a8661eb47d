"""Blocks that wait on disk: the same bits, one part in memory at a time, and a disk that is full."""

import copy
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import files_of_at_most
from saved import state_of

import dblocks_jax
from configs import dblock_digits, dit_digits
from dblocks_jax.data.datasets import Card
from dblocks_jax.fields import common
from dblocks_jax.run import spilled
from dblocks_jax.run.checkpoint import Checkpoints
from dblocks_jax.run.errors import UserError
from dblocks_jax.run.spilled import InFile, spill
from dblocks_jax.tasks.classify.task import CLASSIFY
from dblocks_jax.tasks.generate.task import GENERATE
from dblocks_jax.training import loop as trainer
from dblocks_jax.training import setting
from dblocks_jax.training.optimizer import Part, new_part
from dblocks_jax.training.setting import fresh_one_by_one, fresh_parts
from examples.own_task import SPIRALS

STEPS = 8  # saved at step 6; with one block for two of them
TINY = {
    "task": "spirals", "num_blocks": 2, "num_layers": 8, "batch_size": 2048, "num_epochs": 60, "max_steps": STEPS,
    "save_every_n_epochs": 3, "log_every_n_steps": 1, "block_schedule": "chunked", "chunk_steps": 1, "ema_decay": 0.9,
    "grow_at": (0.25,),
}  # fmt: skip


def run(workdir: Path, where: str) -> dict[str, Any]:
    config = common.get_config()
    config.update(TINY | {"idle_blocks": where})
    return dblocks_jax.train(config, workdir, own=SPIRALS)


def assert_same_state(one: Path, other: Path) -> None:
    expected, found = state_of(one, STEPS), state_of(other, STEPS)
    assert expected.keys() == found.keys() and len(expected) > 50
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


@pytest.fixture(scope="module")
def on_device(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    workdir = tmp_path_factory.mktemp("on_device")
    return workdir, run(workdir, "device")


@pytest.fixture(scope="module", autouse=True)
def compiled_once() -> Iterator[None]:
    """Neither a training step nor a score depends on where blocks wait."""
    make_step, steps = trainer.make_step, {}
    scorer_of, scorers = setting.scorer_of, {}

    def step_of(config, *args):
        return steps.setdefault(config.num_blocks, make_step(config, *args))

    def score_of(task, *args):
        return scorers.setdefault(task.config.num_blocks, scorer_of(task, *args))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_step", step_of)
        patch.setattr(setting, "scorer_of", score_of)
        yield


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


def before_step(patch: pytest.MonkeyPatch, step: int, act: Callable[[set[str]], None]) -> None:
    """Before a run takes its step number `step`, from 0, call `act` with the names of the parts that wait in a file."""
    real = trainer.Trainer.take_steps

    def take_steps(self):
        if self.step == step:
            parts = self.residence.parts().items()
            act({name for name, part in parts if all(isinstance(leaf, InFile) for leaf in jax.tree.leaves(part))})
        real(self)

    patch.setattr(trainer.Trainer, "take_steps", take_steps)


def test_a_run_on_disk_ends_in_the_bits_of_one_on_the_device(on_device, tmp_path, monkeypatch):
    """Killed before its block is divided, ended by a full disk after that, and finished with blocks on the host."""
    waiting: list[set[str]] = []

    def kill(names: set[str]) -> None:
        waiting.append(names)
        raise Killed

    def fill(names: set[str]) -> None:
        waiting.append(names)
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        patch.setattr(spilled.tempfile, "TemporaryFile", Mock(side_effect=full))

    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_step(patch, 1, kill)
        run(tmp_path, "disk")
    with monkeypatch.context() as patch:
        before_step(patch, 5, fill)
        with pytest.raises(UserError, match=r"No space left on device. Make room.* Stopped at step 5 of 8: the same"):
            run(tmp_path, "disk")
    assert waiting == [set(), {"block_1"}]  # at work: the only block; block 0, which step 4 trained, and what is shared
    result = run(tmp_path, "host")
    assert result["loss_by_block"] == on_device[1]["loss_by_block"] and result["steps_run"] == 3
    assert_same_state(on_device[0], tmp_path)


@pytest.mark.long
def test_a_run_that_is_never_disturbed_scores_and_loads_from_disk(on_device, tmp_path):
    assert run(tmp_path, "disk")["loss_by_block"] == on_device[1]["loss_by_block"]
    assert_same_state(on_device[0], tmp_path)
    found, expected = (dblocks_jax.load_trained(path, own=SPIRALS).params for path in (tmp_path, on_device[0]))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert all(isinstance(leaf, InFile) for leaf in jax.tree.leaves(found))


def test_arrays_in_a_file_are_what_was_written(tmp_path):
    tree = {"a": np.arange(12.0, dtype=np.float32).reshape(3, 4), "b": (jnp.int32(7), np.ones(5, np.float16).T)}
    first = spill(tree, tmp_path / "not" / "yet")
    second = spill(jax.tree.map(lambda leaf: leaf + 1, tree), tmp_path)
    for found, expected in ((first, tree), (second, jax.tree.map(lambda leaf: leaf + 1, tree))):
        for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(leaf, wanted)
            assert leaf.dtype == wanted.dtype and leaf.shape == wanted.shape
            assert leaf.ctypes.data % spilled.ALIGNED == 0 and not leaf.flags.writeable
    assert spill(first, tmp_path) is first
    assert not list(tmp_path.iterdir())  # no name, so nothing that a killed process could leave


def test_only_what_can_be_written_is_copied(tmp_path):
    """Orbax copies what it writes in the background."""
    in_file = spill(np.zeros(3), tmp_path)
    assert copy.deepcopy(in_file) is in_file
    result = in_file + 1  # in memory, whatever its class
    copied = copy.deepcopy(result)
    result[:] = 5
    np.testing.assert_array_equal(copied, [1, 1, 1])


def test_what_the_disk_does_not_take_is_refused_in_one_line(tmp_path):
    with files_of_at_most(10_000), pytest.raises(UserError, match=r"idle_blocks=disk: .*File too large. Make room"):
        spill(np.zeros(100_000), tmp_path)
    assert not list(tmp_path.iterdir())


def parts_of(step: int) -> dict[str, Part]:
    rng = np.random.default_rng(step)
    names = ("block_0", "block_1", "shared")
    return {name: new_part({"w": jnp.asarray(rng.normal(size=(64, 32)))}, averaged=True) for name in names}


def test_a_checkpoint_is_read_one_part_at_a_time_and_a_damaged_one_left(tmp_path):
    seen: list[list[str]] = []

    def settle(trees: Any) -> Any:
        seen.append(sorted({name for tree in trees.values() for name in tree}))
        return spill(trees, tmp_path)

    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, spill(parts_of(step), tmp_path), {"config": {}, "data": {}})
    largest = max((tmp_path / "state" / "2" / "average").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with Checkpoints(tmp_path) as checkpoints:
        shapes = jax.eval_shape(lambda: parts_of(0))
        step, found, _ = checkpoints.resume(lambda step: shapes, {}, settle)
    assert step == 1 and seen[-3:] == [["block_0"], ["block_1"], ["shared"]]
    for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(parts_of(1)), strict=True):
        np.testing.assert_array_equal(leaf, wanted)
        assert isinstance(leaf, InFile)


@pytest.mark.long
@pytest.mark.parametrize(("entry", "base"), [(CLASSIFY, dblock_digits), (GENERATE, dit_digits)])
def test_a_fresh_model_is_the_same_made_part_by_part(entry, base):
    config = base.get_config()
    config.update(num_layers=2, num_blocks=2, hidden_size=12, num_heads=2, intermediate_size=16, grow_at=())
    task = entry.make(config, Card(("a", "b"), (8, 8, 1), (0.5,), (0.25,)))
    found = dict(fresh_one_by_one(entry, config, task))
    expected = fresh_parts(entry, config, task)
    assert found.keys() == expected.keys()
    jax.tree.map(np.testing.assert_array_equal, found, expected)

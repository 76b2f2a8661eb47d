"""Growing: one block first, then copies of it, each on its share; by stages of one run, or from another run."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from saved import state_of

from configs import dblock_digits, dit_digits
from dblocks_jax.modes.evaluate import evaluate_run
from dblocks_jax.modes.load import load_trained
from dblocks_jax.modes.merge import merge
from dblocks_jax.modes.train import train
from dblocks_jax.run.checkpoint import Checkpoints
from dblocks_jax.run.errors import UserError
from dblocks_jax.tasks.generate.task import GENERATE, Generate
from dblocks_jax.training import loop as trainer
from dblocks_jax.training.begin import begin
from dblocks_jax.training.config import check_config, check_resumable, curriculum, schedule
from dblocks_jax.training.optimizer import Part
from dblocks_jax.training.setting import Setting, prepare
from dblocks_jax.training.stages import Stage, block_counts, divide, make_stages
from dblocks_jax.training.step import Steps

# Two steps to an epoch and to a checkpoint; four blocks make eight steps.
TINY = {
    "num_layers": 4, "num_blocks": 4, "hidden_size": 12, "num_heads": 2, "intermediate_size": 16, "patch_size": 4,
    "batch_size": 700, "num_epochs": 1, "save_every_n_epochs": 1, "log_every_n_steps": 1, "num_warmup_steps": 2,
    "scheduler_type": "linear", "score_samples": 0, "ema_decay": 0.9, "chunk_steps": 1,
    "grow_at": (),
}  # fmt: skip
GROWING = TINY | {"grow_at": (0.375, 0.5)}  # divided after step 3, between checkpoints, and after step 4, at one
ONE_BLOCK = TINY | {"num_layers": 1, "num_blocks": 1}


def tiny(**changes):
    config = dit_digits.get_config()
    config.update(changes)
    return config


def run(config, workdir: Path) -> dict[str, Any]:
    return train(config, workdir, command=["launch.py"], overrides={})


def stages_of(total_steps: int, **changes) -> list[Stage]:
    config = tiny(**GROWING | changes)
    return make_stages(GENERATE, config, lambda config, steps: curriculum(GENERATE, config, steps), total_steps)


def leaves(tree: Any) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same(found: Any, expected: Any) -> None:
    """Every array, bit for bit."""
    found, expected = leaves(found), leaves(expected)
    assert found.keys() == expected.keys() and found
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


@pytest.fixture(scope="module", autouse=True)
def steps() -> Iterator[list[Steps]]:
    """What each call of a training step is asked for. Runs that differ in what step they take share one compilation."""
    seen: list[Steps] = []
    build, built = trainer.make_step, {}

    def make_step(config, task, blueprint, mesh):
        if config.sharing not in built:  # nothing else that a step depends on differs between the runs here
            built[config.sharing] = build(config, task, blueprint, mesh)

        def train_step(parts, data, steps):
            seen.append(steps)
            return built[config.sharing](parts, data, steps)

        return train_step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_step", make_step)
        yield seen


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


def kill_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Make step number `step` (from 0) fail, as if the process died when it began; blocks are divided before that."""
    real = trainer.Trainer.take_steps

    def take_steps(self):
        if self.step == step:
            raise Killed
        real(self)

    patch.setattr(trainer.Trainer, "take_steps", take_steps)


def killed(config, workdir: Path, step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            run(config, workdir)


@dataclass
class Grown:
    """A whole run that grows, and what was seen of it."""

    config: Any
    workdir: Path
    steps: list[Steps] = field(default_factory=list)  # each call of the training step makes one
    divided: list[tuple[dict[str, Part], dict[str, Part]]] = field(default_factory=list)  # (before, after)


@pytest.fixture(
    scope="module",
    params=[("random", "shared"), pytest.param(("chunked", "isolated"), marks=pytest.mark.long)],
    ids="-".join,
)
def grown(request, tmp_path_factory, steps) -> Grown:
    block_schedule, sharing = request.param
    config = tiny(**GROWING, block_schedule=block_schedule, sharing=sharing)
    seen = Grown(config, tmp_path_factory.mktemp("grown"))
    grow = Setting.grow
    steps.clear()

    def watched_grow(self, parts, names, **of):
        before = jax.tree.map(np.array, parts)
        after = grow(self, parts, names, **of)
        seen.divided.append((before, jax.tree.map(np.array, after)))
        return after

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Setting, "grow", watched_grow)
        assert run(config, seen.workdir)["step"] == 8
    seen.steps += steps
    return seen


# Which stages there are.


def test_blocks_grow_by_one_factor():
    counts = {(0.5,): 4, (0.25, 0.5): 4, (0.1, 0.2, 0.3): 27, (): 5}
    found = [block_counts(tiny(grow_at=shares), blocks) for shares, blocks in counts.items()]
    assert found == [[1, 4], [1, 2, 4], [1, 3, 9, 27], [5]]
    stages = stages_of(8)
    assert [(stage.start, stage.end) for stage in stages] == [(0, 3), (3, 4), (4, 8)]
    assert [(stage.config.num_blocks, stage.config.num_layers) for stage in stages] == [(1, 1), (2, 2), (4, 4)]


@given(before=st.integers(1, 6), factor=st.integers(1, 6), partition=st.sampled_from(["mass", "log"]))
def test_a_new_block_works_within_the_noise_of_what_it_copies(before, factor, partition):
    """And each of the old blocks becomes as many new ones."""
    after = before * factor
    shares = [
        GENERATE.make(
            tiny(**TINY | {"num_blocks": count, "num_layers": count, "partition": partition, "gamma": 0.05}),
            GENERATE.card({"class_names": ["a"], "image_shape": [8, 8, 1], "mean": [0.5], "std": [0.5]}),
        ).corruption.shares
        for count in (before, after)
    ]
    names = [f"block_{block}" for block in range(after)]
    origin = divide([f"block_{block}" for block in range(before)], names, before=before, after=after)
    assert [list(origin.values()).count(f"block_{block}") for block in range(before)] == [factor] * before
    ulp = 1 + 2 * np.finfo(np.float32).eps
    for block, name in enumerate(names):
        of = shares[0][int(origin[name].removeprefix("block_"))]
        assert of.low <= shares[1][block].low * ulp and shares[1][block].high <= of.high * ulp


def test_what_is_shared_stays_and_what_is_a_blocks_own_is_copied():
    shared = divide(["shared", "block_0", "block_1"], ["shared", "block_2", "block_3"], before=2, after=4)
    assert shared == {"shared": "shared", "block_2": "block_1", "block_3": "block_1"}
    isolated = divide(["shared_0", "block_0"], ["shared_2", "block_2"], before=1, after=3)
    assert isolated == {"shared_2": "shared_0", "block_2": "block_0"}
    # One block's own embeddings may become common ones, or the other way round; those of several blocks cannot.
    assert divide(["shared_0", "block_0"], ["shared"], before=1, after=3) == {"shared": "shared_0"}
    assert divide(["shared", "block_0"], ["shared_1"], before=1, after=3) == {"shared_1": "shared"}
    with pytest.raises(UserError, match="nothing that shared could begin as"):
        divide(["shared_0", "shared_1", "block_0", "block_1"], ["shared"], before=2, after=4)
    with pytest.raises(UserError, match="2 blocks cannot be divided into 3"):
        divide(["block_0", "block_1"], ["block_0"], before=2, after=3)


@pytest.mark.parametrize("block_schedule", ["random", "chunked", "sequential"])
@pytest.mark.parametrize("total", [997, 1000])
def test_data_noise_and_learning_rate_go_on_over_a_division(block_schedule, total):
    """A block and what it was copied from never see a position twice, and the rate's schedule only goes forward."""
    stages = stages_of(total, block_schedule=block_schedule, chunk_steps=7, grow_at=(0.2, 0.5))
    for last in range(4):
        positions, rates = [], []
        for stage in stages:
            mine = last * stage.config.num_blocks // 4
            turns = [stage.at(step) for step in range(stage.start, stage.end)]
            own = [turn.position for turn in turns if turn.block == mine]
            assert len(own) > 0.8 * len(turns) / stage.config.num_blocks
            positions += own
            of_stage = [stage.rate_step(position) for position in own]
            assert stage.start <= of_stage[0] and of_stage[-1] < stage.end
            rates += of_stage
        assert all(earlier < later for earlier, later in pairwise(positions))
        assert all(earlier < later for earlier, later in pairwise(rates))
    if block_schedule == "random":
        turns = [stage.at(step) for stage in stages for step in range(stage.start, stage.end)]
        assert [turn.position for turn in turns] == list(range(total))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grow_at": (0.5, 0.25)}, "ascending shares of the steps between 0 and 1"),
        ({"grow_at": (0.5, 0.5)}, "ascending shares"),
        ({"grow_at": (0.0, 0.5)}, "ascending shares"),
        ({"grow_at": (0.5, 1.0)}, "ascending shares"),
        ({"grow_at": (float("nan"),)}, "ascending shares"),
        ({"grow_at": ("half",)}, "ascending shares"),
        ({"num_blocks": 3, "num_layers": 3}, r"divides 2 times.*num_blocks=3 cannot be reached"),
        ({"num_blocks": 1, "num_layers": 1}, "num_blocks=1 cannot be reached"),
        ({"sharing": "isolated", "train_blocks": (1,)}, "grow_at excludes train_blocks.*begin_from"),
        ({"block_parallel": True}, "grow_at excludes block_parallel.*begin_from"),
    ],
)
def test_mistakes_are_named_before_any_data_are_read(changes, message):
    with pytest.raises(UserError, match=message) as error:
        check_config(GENERATE, tiny(**GROWING | changes))
    assert "\n" not in str(error.value)


def test_too_few_steps_are_named_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"8 steps are too few for so many stages"):
        run(tiny(**GROWING | {"grow_at": (0.45, 0.5)}), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_run_that_grows_can_be_neither_lengthened_nor_divided_otherwise():
    """Where blocks are divided depends on the length, even where the learning rate does not."""
    constant = GROWING | {"scheduler_type": "constant_with_warmup"}
    saved = tiny(**constant).to_dict()
    check_resumable(saved, tiny(**constant), "runs")
    for field_, change in (("grow_at", (0.25, 0.5)), ("num_epochs", 2), ("max_steps", 7)):
        with pytest.raises(UserError, match=f"{field_} was .*, is "):
            check_resumable(saved, tiny(**constant | {field_: change}), "runs")
    of_one_stage = tiny(**constant | {"grow_at": ()})
    check_resumable(of_one_stage.to_dict(), tiny(**constant | {"grow_at": (), "num_epochs": 2}), "runs")


# Runs that grow.


def test_all_blocks_begin_as_the_one_they_are_divided_from(grown):
    """Parameters, both moments, the count of steps, and the average."""
    (one, two), (two_later, four) = grown.divided
    isolated = grown.config.sharing == "isolated"
    assert one.keys() == ({"shared_0", "block_0"} if isolated else {"shared", "block_0"})
    for before, after, count in ((one, two, 2), (two_later, four, 4)):
        for block in range(count):
            of = block * (count // 2) // count
            assert_same(after[f"block_{block}"], before[f"block_{of}"])
            if isolated:
                assert_same(after[f"shared_{block}"], before[f"shared_{of}"])
            else:
                assert_same(after["shared"], before["shared"])
    assert one["block_0"].adam.count == 3
    # At the second division the two are already different, and one of them has taken the step between.
    counts = sorted(int(two_later[f"block_{block}"].adam.count) for block in range(2))
    assert counts == [3, 4]


def test_steps_of_a_run_that_grows_follow_its_stages(grown):
    """Block, position and learning rate of every step: one position and rate after the other, over all divisions."""
    lr_at = schedule(grown.config, 8)
    found = [(int(steps.block), int(steps.position), float(steps.lr[0])) for steps in grown.steps]
    if grown.config.block_schedule == "random":
        assert [(position, lr) for _, position, lr in found] == [(at, np.float32(lr_at(at))) for at in range(8)]
        assert [block for block, *_ in found[:3]] == [0, 0, 0] and found[3][0] < 2
    else:  # four blocks take one step each, which is their first after the division
        assert [(block, position) for block, position, _ in found[:4]] == [(0, 0), (0, 1), (0, 2), (found[3][0], 3)]
        assert sorted(block for block, *_ in found[4:]) == [0, 1, 2, 3]
        assert [(position, lr) for _, position, lr in found[4:]] == [(4, np.float32(lr_at(4)))] * 4
    ranges = [(float(steps.share.low), float(steps.share.high)) for steps in grown.steps]
    assert ranges[:3] == [(np.float32(0.002), 80.0)] * 3  # the whole noise
    assert all(high / low < 40_000 / 2 for low, high in ranges[3:])


def test_a_run_killed_around_a_division_ends_in_the_same_bits(grown, tmp_path):
    """It goes on from before a division, from just at one, and from after all of them."""
    for step, saved, blocks in ((3, 2, 1), (4, 4, 2), (7, 6, 4)):
        killed(grown.config, tmp_path, step)
        with Checkpoints(tmp_path, read_only=True) as checkpoints:
            assert checkpoints.find("last") == saved
            assert checkpoints.run(saved)["config"]["num_blocks"] == blocks
    assert run(grown.config, tmp_path)["steps_run"] == 2
    assert_same(state_of(tmp_path, 8), state_of(grown.workdir, 8))
    assert any("average" in path for path in state_of(tmp_path, 8))


def test_a_checkpoint_of_an_early_stage_is_the_smaller_model(tmp_path):
    """It can be loaded, scored, and chosen by validation, when the larger model has got worse."""

    def scorer(self, blueprint, mesh):
        return lambda params, data, split, at_each_batch: {
            "loss": float(len(params)), "loss_by_block": [0.0] * blueprint.num_blocks, "num_images": 1
        }  # fmt: skip

    config = tiny(**TINY | {"num_blocks": 2, "num_layers": 2, "grow_at": (0.5,), "val_fraction": 0.02})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generate, "scorer", scorer)
        result = run(config, tmp_path)
    assert result["checkpoint"] == 2 and result["loss"] == 2.0 and len(result["loss_by_block"]) == 1
    small, large = (load_trained(tmp_path, step) for step in ("2", "4"))
    assert (small.config.num_blocks, small.config.num_layers, small.blueprint.num_blocks) == (1, 1, 1)
    assert (large.config.num_blocks, large.config.num_layers, large.blueprint.num_blocks) == (2, 2, 2)
    assert small.params.keys() == {"shared", "block_0"} and small.task.corruption.num_blocks == 1
    command = {"num_blocks": 2, "num_layers": 2, "grow_at": (0.5,)}  # which trained it
    scored = evaluate_run(config, tmp_path, overrides=command, checkpoint="2")
    assert scored["checkpoint"] == 2 and scored["loss_by_block"] == [scored["loss"]]
    with pytest.raises(UserError, match="num_blocks=3 contradicts the checkpoint, which was trained with 1"):
        evaluate_run(config, tmp_path, overrides={"num_blocks": 3}, checkpoint="2")


# Blocks that begin as another run's.


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A run of one block's depth, which was killed half way: its last checkpoint is of step 2."""
    workdir = tmp_path_factory.mktemp("source")
    killed(tiny(**ONE_BLOCK | {"num_epochs": 2}), workdir, 3)
    return workdir


def begun(workdir: Path, **changes) -> dict[str, Part]:
    config = tiny(**TINY | {"num_blocks": 3, "num_layers": 3} | changes)
    check_config(GENERATE, config)
    return begin(prepare(GENERATE, config, workdir))


@pytest.mark.parametrize(
    ("changes", "shared", "blocks"),
    [
        ({}, ["shared"], [0, 1, 2]),
        ({"sharing": "isolated"}, ["shared_0", "shared_1", "shared_2"], [0, 1, 2]),
        ({"sharing": "isolated", "train_blocks": (2,)}, ["shared_2"], [2]),
        ({"num_blocks": 1, "num_layers": 1}, ["shared"], [0]),
        ({"grow_at": (0.5,)}, ["shared"], [0]),  # the first of the stages is one block
        ({"idle_blocks": "host"}, ["shared"], [0, 1, 2]),
    ],
)
def test_every_block_begins_as_the_runs_last_checkpoint(source, tmp_path, changes, shared, blocks):
    expected = {re.sub(r"'(\d+)'", r"\1", path): value for path, value in state_of(source, 2).items()}  # Orbax quotes
    parts = begun(tmp_path, begin_from=str(source), **changes)
    assert parts.keys() == {*shared, *(f"block_{block}" for block in blocks)}
    for name, part in parts.items():
        origin = "block_0" if name.startswith("block") else "shared"
        found = leaves({"params": part.params, "adam": part.adam._asdict(), "average": part.average})
        wanted = {path.replace(f"['{origin}']", ""): v for path, v in expected.items() if f"['{origin}']" in path}
        assert found.keys() == wanted.keys()
        for path, value in wanted.items():
            np.testing.assert_array_equal(found[path], value, err_msg=path)
        assert part.adam.count == 2


def test_an_average_begins_where_there_was_none(source, tmp_path):
    """At the parameters; and is left behind where none is wanted."""
    assert all(part.average == () for part in begun(tmp_path / "a", begin_from=str(source), ema_decay=0.0).values())
    workdir = tmp_path / "without"
    with Checkpoints(workdir) as checkpoints, Checkpoints(source, read_only=True) as old:
        about = old.run(2)
        parts = begun(tmp_path / "b", begin_from=str(source), ema_decay=0.0, num_blocks=1, num_layers=1)
        checkpoints.save(1, parts, about | {"config": about["config"] | {"ema_decay": 0.0}})
    for part in begun(tmp_path / "c", begin_from=str(workdir)).values():
        assert_same(part.average, part.params)


def test_the_runs_folder_is_found_as_a_shell_would(source, tmp_path, monkeypatch):
    expected = begun(tmp_path / "new", begin_from=str(source))
    monkeypatch.chdir(source.parent)
    assert_same(begun(tmp_path / "new", begin_from=source.name), expected)
    monkeypatch.setenv("HOME", str(source.parent))
    assert_same(begun(tmp_path / "new", begin_from=f"~/{source.name}"), expected)
    with pytest.raises(UserError, match="begin_from: ~nobody_of_this_name holds no run"):
        begun(tmp_path / "new", begin_from="~nobody_of_this_name")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 6}, r"other shapes than one of this run's blocks .*its depth must be num_layers / num_blocks"),
        ({"hidden_size": 16}, r"other shapes than one of this run's blocks"),
        ({"patch_size": 2}, r"other shapes than one of this run's blocks"),
        ({"begin_from": "nowhere"}, "nowhere holds no run that was saved"),
        ({"begin_from": __file__}, "holds no run that was saved"),
    ],
)
def test_a_run_that_does_not_fit_is_one_line(source, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        begun(tmp_path / "new", **{"begin_from": str(source)} | changes)
    assert "\n" not in str(error.value) and str(error.value).startswith("begin_from: ")
    assert not (tmp_path / "new").exists()


def test_a_run_of_another_task_or_number_of_blocks_is_one_line(source, tmp_path):
    def copy_as(name: str, config: dict[str, Any]) -> str:
        with Checkpoints(tmp_path / name) as checkpoints, Checkpoints(source, read_only=True) as old:
            parts = begun(tmp_path / "new", begin_from=str(source), num_blocks=2, num_layers=2)
            checkpoints.save(1, parts, old.run(2) | {"config": config})
        return str(tmp_path / name)

    classifies = copy_as("classifies", dblock_digits.get_config().to_dict())
    with pytest.raises(UserError, match=f"begin_from: {classifies} is of the task classify, not of generate"):
        begun(tmp_path / "new", begin_from=classifies)
    two = copy_as("two", tiny(**TINY | {"num_blocks": 2, "num_layers": 2}).to_dict())
    with pytest.raises(UserError, match=f"begin_from: {two}: 2 blocks cannot be divided into 3"):
        begun(tmp_path / "new", begin_from=two)
    assert begun(tmp_path / "new", begin_from=two, num_blocks=4, num_layers=4).keys() >= {"block_3"}


@pytest.mark.long
def test_blocks_that_begin_as_one_run_and_train_apart_are_those_trained_together(source, tmp_path):
    """On machines that never meet; and a run that is cut goes on though the one it began as is gone."""
    origin = tmp_path / "origin"
    shutil.copytree(source, origin)
    base = TINY | {"num_blocks": 3, "num_layers": 3, "sharing": "isolated", "begin_from": str(origin)}
    sequential = tiny(**base, block_schedule="sequential")
    killed(sequential, tmp_path / "cut", 3)
    apart = [tmp_path / str(block) for block in range(3)]
    for block, workdir in enumerate(apart):
        run(tiny(**base, block_schedule="sequential", train_blocks=(block,)), workdir)
    together = run(sequential, tmp_path / "together")
    shutil.rmtree(origin)
    assert run(sequential, tmp_path / "cut")["steps_run"] == 4
    merge(apart, tmp_path / "merged", command=[])
    expected = state_of(tmp_path / "together", 6)
    assert int(expected["['adam']['block_2']['count']"]) == 2 + 2  # the other run's steps, and its own
    assert_same(state_of(tmp_path / "merged", 6), expected)
    assert_same(state_of(tmp_path / "cut", 6), expected)
    scored = evaluate_run(sequential, tmp_path / "merged", overrides={}, checkpoint="last")
    assert scored["loss"] == pytest.approx(together["loss"], rel=1e-6)

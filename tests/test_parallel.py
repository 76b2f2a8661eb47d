"""Blocks side by side, apart, and joined. What needs several devices runs in a process that simulates six."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from saved import state_of

from configs import dblock_digits, dit_digits, mask_text
from dblocks_jax.data.datasets import Card
from dblocks_jax.data.feed import Streamed
from dblocks_jax.data.vocabulary import letters
from dblocks_jax.models.blueprint import Blueprint
from dblocks_jax.models.vit import Architecture
from dblocks_jax.modes.evaluate import evaluate_run
from dblocks_jax.modes.merge import merge
from dblocks_jax.modes.program import bytes_on_device, wanted_step
from dblocks_jax.modes.train import train
from dblocks_jax.run.checkpoint import Checkpoints
from dblocks_jax.run.devices import BLOCK, make_mesh, replicate, replicated, shard, spread, stack_over_blocks, unstack
from dblocks_jax.run.errors import UserError
from dblocks_jax.tasks.classify.task import CLASSIFY, Classify
from dblocks_jax.tasks.generate.task import Generate
from dblocks_jax.tasks.mask.task import Mask
from dblocks_jax.tasks.task import Losses, Task
from dblocks_jax.tasks.text import TextCard
from dblocks_jax.training.config import arithmetic, trained_blocks
from dblocks_jax.training.optimizer import adamw, new_part
from dblocks_jax.training.setting import new_model
from dblocks_jax.training.step import Parallel, Steps, make_train_step, stack_shares

DEVICES, BLOCKS = 6, 3
several = pytest.mark.skipif(jax.device_count() != DEVICES, reason="runs in the process that simulates six devices")
TINY = {
    "num_layers": 3, "hidden_size": 12, "num_heads": 2, "intermediate_size": 16, "num_blocks": BLOCKS,
    "batch_size": 600, "num_epochs": 1, "save_every_n_epochs": 1, "log_every_n_steps": 1, "num_warmup_steps": 2,
    "scheduler_type": "cosine", "sharing": "isolated",
}  # fmt: skip
SMALL = {
    "num_layers": BLOCKS, "num_blocks": BLOCKS, "hidden_size": 12, "num_heads": 2, "intermediate_size": 16,
    "sharing": "isolated", "grow_at": (),
}  # fmt: skip
ARCH = Architecture(8, 1, 4, 4, BLOCKS, 12, 2, 16, 0.1, "mean")
CARD = Card(("a", "b", "c", "d"), (8, 8, 1), (0.5,), (0.25,))


def tiny(**changes):
    config = dblock_digits.get_config()
    config.update(TINY | changes)
    return config


def run(config, workdir: Path) -> dict:
    return train(config, workdir, command=["launch.py"], overrides={})


@pytest.mark.parametrize("which", ["not long", pytest.param("long", marks=pytest.mark.long)])
def test_several_devices(which):
    """Run the tests below that need them."""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=6"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-k", "on_several", "-m", which, "-n0"],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"XLA_FLAGS": flags}, check=False, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout and "passed" in done.stdout


@pytest.fixture(scope="module")
def apart(tmp_path_factory) -> list[Path]:
    """Each block trained by a run of its own."""
    root = tmp_path_factory.mktemp("apart")
    for block in range(BLOCKS):
        result = run(tiny(train_blocks=(block,)), root / str(block))
        assert result["blocks"] == [block] and "top1" not in result
    return [root / str(block) for block in range(BLOCKS)]


def test_blocks_trained_apart_and_merged_are_those_trained_together(apart, tmp_path):
    """Bit for bit, in every parameter and moment; and the merged run evaluates."""
    together = run(tiny(block_schedule="sequential"), tmp_path / "together")
    assert together["step"] == BLOCKS * 2
    merged = merge(apart, tmp_path / "merged", command=[])
    assert merged["checkpoint"] == together["step"]
    expected, found = (state_of(tmp_path / name, together["step"]) for name in ("together", "merged"))
    assert expected.keys() == found.keys() and len(found) > 100
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    scored = evaluate_run(dblock_digits.get_config(), tmp_path / "merged", overrides={}, checkpoint="best")
    assert scored["cross_entropy"] == pytest.approx(together["cross_entropy"], rel=1e-6)
    assert scored["accuracy_by_step"] == together["accuracy_by_step"]


def test_a_part_alone_is_not_scored(apart):
    with pytest.raises(UserError, match=r"trained only blocks \[1\] of 3: join by --mode=merge"):
        evaluate_run(tiny(), apart[1], overrides={"train_blocks": (1,)}, checkpoint="best")


@pytest.mark.long
def test_one_block_beside_nobody_is_that_block(tmp_path):
    one = {"num_blocks": 1, "num_layers": 1, "sharing": "shared"}
    alone, parallel = (run(tiny(**one, block_parallel=p), tmp_path / str(p)) for p in (False, True))
    assert parallel["cross_entropy"] == pytest.approx(alone["cross_entropy"], rel=1e-5)


@pytest.mark.long
def test_blocks_resting_on_the_host_end_in_the_same_bits(tmp_path):
    for where in ("device", "host"):
        run(tiny(sharing="shared", block_schedule="chunked", chunk_steps=1, idle_blocks=where), tmp_path / where)
    expected, found = (state_of(tmp_path / where, 6) for where in ("device", "host"))
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


@pytest.mark.long
def test_parts_that_do_not_make_a_model_are_refused_by_name(apart, tmp_path):
    def refused(parts, match):
        with pytest.raises(UserError, match=match):
            merge(parts, tmp_path / "merged", command=[])
        assert not (tmp_path / "merged").exists()

    refused(apart[:2], "nobody trained block 2 of 3")
    again = tmp_path / "again"
    run(tiny(train_blocks=(1,)), again)
    refused([*apart, again], f"block 1 is double: both {apart[1]} and {again}")
    foreign = tmp_path / "foreign"
    run(tiny(train_blocks=(2,), lr=0.5), foreign)
    refused([*apart[:2], foreign], f"{foreign} is of another model than {apart[0]}: lr is 0.5, not 0.003")
    refused([*apart[:2], tmp_path / "nothing"], "nothing holds no run")
    short = tmp_path / "short"
    run(tiny(train_blocks=(2,)), short)
    os.rename(short / "state" / "2", short / "state" / "1")
    refused([*apart[:2], short], f"{short} is not finished: it stands at step 1 of 2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_blocks": (3,)}, "below num_blocks=3"),
        ({"model_type": "vit", "train_blocks": (1,)}, "the plain model has no blocks"),
        ({"train_blocks": (1, 1)}, "ascending"),
        ({"train_blocks": (0, "x")}, "ascending"),
        ({"train_blocks": (1,), "sharing": "shared"}, "train_blocks needs sharing=isolated"),
        ({"train_blocks": (1,), "block_parallel": True}, "exclude each other"),
        ({"block_parallel": True, "block_schedule": "chunked"}, "block_schedule=chunked has no meaning"),
        ({"block_parallel": True, "num_blocks": 1 + DEVICES, "num_layers": 1 + DEVICES}, "multiple of num_blocks=7"),
    ],
)
def test_mistakes_are_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run(tiny(**changes), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_estimate_is_carried_over_to_the_next_blocks_embeddings(key):
    """With the same embeddings nothing changes; with others z moves by the difference of the estimates."""
    from dblocks_jax.models.dblock_vit import make_isolated_dblock_vit
    from dblocks_jax.tasks.classify.denoiser import denoise_step

    model = make_isolated_dblock_vit(ARCH, BLOCKS, rngs=nnx.Rngs(0))
    first, following = model.shared[:2]
    assert not np.array_equal(first.labels[...], following.labels[...])

    def step(labels_next):
        return denoise_step(
            first, model.blocks[0], jnp.ones((2, 8, 8, 1)), jax.random.normal(key, (2, 12)),
            np.float32(8), np.float32(2), sigma_data=0.5, cfg_scale=0.0, table="raw", labels_next=labels_next,
        )  # fmt: skip

    logits, z = step(None)
    np.testing.assert_allclose(step(first.labels[...])[1], z, atol=1e-6)
    moved = step(following.labels[...])[1] - z
    probs = jax.nn.softmax(logits)
    np.testing.assert_allclose(moved, probs @ (following.labels[...] - first.labels[...]), atol=1e-6)


def build(sharing: str, parallel: bool, mesh):
    """(step, parts on the host, noise ranges, blueprint) of the tiny architecture."""
    task = Classify(tiny(sharing=sharing, dropout=0.1), CARD)
    blueprint, params = new_model(task, 42)
    step = make_train_step(
        task, blueprint, seed=0, weight_decay=0.01, clip_norm=1.0, accumulate=1,
        parallel=Parallel(mesh, sharing == "isolated") if parallel else None,
    )  # fmt: skip
    parts = jax.device_get({name: new_part(part) for name, part in params.items()})
    return step, parts, task.corruption.shares, blueprint


def stacked(parts, blueprint, sharing: str, mesh):
    pairs = [blueprint.names(block) for block in range(BLOCKS)]
    blocks = stack_over_blocks([parts[name] for _, name in pairs], mesh)
    if sharing == "isolated":
        return stack_over_blocks([parts[name] for name, _ in pairs], mesh), blocks
    return replicate(parts["shared"], mesh), blocks


def batch_on(mesh) -> Streamed:
    """Images with labels, and tokens: a task takes what it knows."""
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (8, 8, 8, 1), np.uint8), "label": rng.integers(0, 4, 8, np.int32)}
    batch["tokens"] = rng.integers(0, 27, (8, 9), np.uint8)
    return shard(Streamed(batch), mesh)


def steps_of(block, share, position: int = 0, lr: float = 1e-2) -> Steps:
    return Steps(np.int32(1), block, np.int32(position), np.full(1, lr, np.float32), share)


ALL = np.arange(BLOCKS, dtype=np.int32)


@several
def test_isolated_blocks_side_by_side_are_those_in_turn_on_several():
    """One block to a device, without a word between them: to rounding what each block does alone."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:BLOCKS]).reshape(1, BLOCKS), ("data", BLOCK))
    alone = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", BLOCK))
    together, parts, ranges, blueprint = build("isolated", True, mesh)
    active = stacked(parts, blueprint, "isolated", mesh)
    program = together.lower(active, batch_on(mesh), steps_of(ALL, stack_shares(ranges))).compile()
    text = program.as_text()
    assert text is not None and collectives(text) == set()
    for position in range(2):
        active, log = program(active, batch_on(mesh), steps_of(ALL, stack_shares(ranges), position))
    assert log["loss"].shape == (BLOCKS, 1)

    one_by_one, *_ = build("isolated", False, alone)
    for block in range(BLOCKS):
        own = replicate(tuple(parts[name] for name in blueprint.names(block)), alone)
        for position in range(2):
            own, own_log = one_by_one(own, batch_on(alone), steps_of(np.int32(block), ranges[block], position))
        np.testing.assert_allclose(log["loss"][block], own_log["loss"], rtol=1e-5)
        ours = tuple(unstack(part, mesh)[block] for part in active)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(own), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.long
@several
def test_blocks_that_share_say_only_that_on_several():
    """The shared part moves by the mean of the blocks' clipped gradients; the blocks as they would alone."""
    mesh = make_mesh(BLOCKS)  # two devices to a block
    assert dict(mesh.shape) == {"data": 2, "block": 3}
    together, parts, ranges, blueprint = build("shared", True, mesh)
    active = stacked(parts, blueprint, "shared", mesh)
    program = together.lower(active, batch_on(mesh), steps_of(ALL, stack_shares(ranges))).compile()
    text = program.as_text()
    assert text is not None and "all-reduce" in collectives(text)
    (shared, blocks), log = program(active, batch_on(mesh), steps_of(ALL, stack_shares(ranges)))

    # By hand: an AdamW moment after its first update is a tenth of the gradient that went into it.
    alone = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", BLOCK))
    one_by_one, *_ = build("shared", False, alone)
    gradients = []
    for block in range(BLOCKS):
        own = replicate((parts["shared"], parts[f"block_{block}"]), alone)
        (own_shared, own_block), own_log = one_by_one(own, batch_on(alone), steps_of(np.int32(block), ranges[block]))
        np.testing.assert_allclose(log["loss"][block], own_log["loss"], rtol=1e-5)
        for a, b in zip(jax.tree.leaves(unstack(blocks, mesh)[block]), jax.tree.leaves(own_block), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        gradients.append(jax.tree.map(lambda mu: np.asarray(mu) * 10, own_shared.adam.mu))
    mean = jax.tree.map(lambda *g: sum(g) / BLOCKS, *gradients)
    (expected,), _ = adamw(
        (jax.tree.map(np.asarray, parts["shared"]),), (mean,), lr=jnp.float32(1e-2), weight_decay=0.01, clip_norm=1e9
    )
    for a, b in zip(jax.tree.leaves(shared.adam.mu), jax.tree.leaves(expected.adam.mu), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7)


@pytest.mark.long
@several
def test_a_run_side_by_side_is_the_run_in_turn_on_several(tmp_path):
    """Whole runs of isolated blocks, with data on the device and a checkpoint: in turn, and all at once."""
    in_turn = run(tiny(block_schedule="sequential", batch_size=360, dropout=0.1), tmp_path / "turn")
    at_once = run(tiny(block_parallel=True, batch_size=360, dropout=0.1), tmp_path / "once")
    assert (in_turn["step"], at_once["step"]) == (9, 3)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines() if "blocks" in line]
        for name in ("turn", "once")
    ]
    for step, line in enumerate(logs[1]):
        for block in range(BLOCKS):
            expected = logs[0][block * 3 + step]["blocks"][str(block)]
            assert line["blocks"][str(block)] == pytest.approx(expected, rel=1e-4), (step, block)
    assert at_once["cross_entropy"] == pytest.approx(in_turn["cross_entropy"], rel=1e-4)
    with Checkpoints(tmp_path / "once", read_only=True) as checkpoints:
        assert checkpoints.steps()[-1] == 3
    again = run(tiny(block_parallel=True, batch_size=360, dropout=0.1), tmp_path / "once")
    assert again["steps_run"] == 0 and again["top1"] == at_once["top1"]


def generating() -> Task:
    config = dit_digits.get_config()
    config.update(SMALL | {"patch_size": 4})
    return Generate(config, CARD)


def masking() -> Task:
    config = mask_text.get_config()
    config.update(SMALL)
    return Mask(config, TextCard(letters(), 5))


@several
# Where a gradient is nearly zero AdamW makes of its rounding a step of the size of the learning rate: masks give many.
@pytest.mark.long
@pytest.mark.parametrize(("make", "lr"), [(generating, 1e-2), (masking, 1e-3)])
def test_blocks_that_generate_are_side_by_side_what_they_are_in_turn_on_several(make, lr):
    """Isolated blocks, with averages, each on two devices that share its batch: as each alone on one."""
    task = make()
    blueprint, params = new_model(task, 42)
    parts = jax.device_get({name: new_part(part, averaged=True) for name, part in params.items()})
    fixed = {"seed": 0, "weight_decay": 0.01, "clip_norm": 1.0, "accumulate": 1, "ema_decay": 0.9}
    mesh = make_mesh(BLOCKS)
    assert dict(mesh.shape) == {"data": 2, "block": 3}
    together = make_train_step(task, blueprint, **fixed, parallel=Parallel(mesh, isolated=True))
    active, shares = stacked(parts, blueprint, "isolated", mesh), stack_shares(task.corruption.shares)
    losses = []
    for position in range(3):
        active, log = together(active, batch_on(mesh), steps_of(ALL, shares, position, lr))
        losses.append(log["loss"][:, 0])

    alone = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", BLOCK))
    one_by_one = make_train_step(task, blueprint, **fixed)
    for block, share in enumerate(task.corruption.shares):
        own = replicate(tuple(parts[name] for name in blueprint.names(block)), alone)
        for position in range(3):
            own, log = one_by_one(own, batch_on(alone), steps_of(np.int32(block), share, position, lr))
            np.testing.assert_allclose(losses[position][block], log["loss"][0], rtol=1e-5)
        ours = tuple(unstack(part, mesh)[block] for part in active)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(own), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def collectives(program: str) -> set[str]:
    """The kinds of communication between devices in a compiled program."""
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast|send|recv"
    return set(re.findall(rf" ({kinds})(?:-start)?\(", program))


def test_what_a_run_trains():
    assert trained_blocks(CLASSIFY, tiny()) == (0, 1, 2) and trained_blocks(CLASSIFY, tiny(train_blocks=(1,))) == (1,)


@several
@pytest.mark.parametrize("sharing", ["shared", "isolated"])
def test_the_memory_tables_program_is_that_of_training_on_several(sharing):
    """Lowered for shapes and places that are only said, and for the arrays that training has."""
    config = tiny(block_parallel=True, sharing=sharing, batch_size=8)
    wanted = wanted_step(CLASSIFY, config, CARD)
    _, parts, shares, blueprint = build(sharing, False, None)
    active = stacked(parts, blueprint, sharing, wanted.mesh)
    data = batch_on(wanted.mesh)
    del data.batch["tokens"]
    with arithmetic(config):
        program = wanted.step.lower(active, data, steps_of(ALL, stack_shares(shares)))
    assert wanted.lower().as_text() == program.as_text()


class Number(nnx.Module):
    """A number for each example of a batch of eight: its gradient is where its example is."""

    def __init__(self):
        self.w = nnx.Param(jnp.arange(8.0))


class OneNumberEach(Task):
    """The loss of an example is of its own numbers, so a compiler is free to leave them where the example is."""

    corruption = None

    def losses(self, modules, example, level, draws):
        del level, draws
        return Losses(sum((module.w[...] - example["label"]) ** 2 for module in modules), None, {})


@several
@pytest.mark.parametrize(("groups", "sharing"), [(1, None), (3, "shared"), (3, "isolated"), (6, "isolated")])
def test_what_a_step_trains_comes_out_where_it_came_in_on_several(groups, sharing):
    """Even what XLA would rather spread over the data's devices, as it does here unless it is told."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[: 6 if groups > 1 else 4]).reshape(-1, groups), ("data", BLOCK))
    blueprint, params = Blueprint.of({"shared": Number(), "block_0": Number()})
    parallel = None if sharing is None else Parallel(mesh, sharing == "isolated")
    step = make_train_step(
        OneNumberEach(), blueprint, seed=0, weight_decay=0.01, clip_norm=1.0, accumulate=1, mesh=mesh, parallel=parallel
    )
    parts = tuple(jax.device_get(new_part(params[name])) for name in ("shared", "block_0"))
    if parallel is None:
        active = replicate(parts, mesh)
    else:
        of_blocks = [stack_over_blocks([part] * groups, mesh) for part in parts]
        active = (of_blocks[0] if parallel.isolated else replicate(parts[0], mesh), of_blocks[1])
    steps = steps_of(np.int32(0) if parallel is None else np.arange(groups, dtype=np.int32), None)
    compiled = step.lower(active, batch_on(mesh), steps).compile()
    came_in, came_out = compiled.input_shardings[0][0], compiled.output_shardings[0]
    for leaf, before, after in zip(*map(jax.tree.leaves, (active, came_in, came_out)), strict=True):
        assert after.is_equivalent_to(before, leaf.ndim) and after.is_equivalent_to(leaf.sharding, leaf.ndim)


@several
def test_arrays_are_shared_out_along_their_largest_even_axis_on_several():
    """Over six devices; what cannot be cut evenly is on each."""
    shapes = {"a": jnp.zeros((6, 12, 5)), "b": jnp.zeros((18, 12)), "c": jnp.zeros((5, 7)), "d": jnp.zeros(())}
    found = {name: sharding.spec for name, sharding in spread(shapes, make_mesh()).items()}
    expected = {"a": (None, "data"), "b": ("data",), "c": (), "d": ()}
    assert found == {name: PartitionSpec(*spec) for name, spec in expected.items()}


@pytest.mark.long
@several
def test_a_run_with_parameters_shared_out_is_that_without_on_several(tmp_path):
    """To rounding; each device holds a part of what is trained; and either goes on from the other's checkpoint."""
    sizes = {"sharing": "shared", "batch_size": 600, "hidden_size": 12, "intermediate_size": 24}
    for name, first, then in (("plain", False, True), ("spread", True, False)):
        config = tiny(**sizes, num_epochs=2, scheduler_type="constant_with_warmup", shard_parameters=first)
        config.update(max_steps=3)
        assert run(config, tmp_path / name)["step"] == 3
        config.update(max_steps=6, shard_parameters=then)
        assert run(config, tmp_path / name)["steps_run"] == 3
    expected, found = (state_of(tmp_path / name, 6) for name in ("plain", "spread"))
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, rtol=1e-4, atol=1e-5, err_msg=path)
    wanted = wanted_step(CLASSIFY, tiny(**sizes, shard_parameters=True), CARD)
    compiled = wanted.compile()
    assert compiled.memory_analysis().argument_size_in_bytes < bytes_on_device(replicated(wanted.parts, wanted.mesh)), (
        "a part of the parameters is elsewhere"
    )
    for leaf, after in zip(jax.tree.leaves(wanted.parts), jax.tree.leaves(compiled.output_shardings[0]), strict=True):
        assert after.is_equivalent_to(leaf.sharding, leaf.ndim)

"""Averages of the parameters: their equation, when they rest, and that models answer with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saved import state_of

from configs import dit_digits
from dblocks_jax.modes.evaluate import evaluate_run
from dblocks_jax.modes.load import load_trained
from dblocks_jax.modes.train import train
from dblocks_jax.run.checkpoint import Checkpoints
from dblocks_jax.run.devices import make_mesh
from dblocks_jax.tasks.generate.task import GENERATE
from dblocks_jax.training.optimizer import Part, adamw, new_part, used_params
from dblocks_jax.training.setting import fresh_parts


def update(part: Part, gradient: list[float], ema_decay: float, **changes) -> Part:
    arguments = {"lr": jnp.float32(0.1), "weight_decay": 0.1, "clip_norm": 10.0, "ema_decay": ema_decay}
    (moved,), _ = adamw((part,), ({"w": jnp.array(gradient)},), **arguments | changes)
    return moved


def test_an_average_follows_its_equation():
    """a = d a + (1 - d) p, with d = (1 + t) / (10 + t) in update t, at most ema_decay: by hand in float64."""
    part = new_part({"w": jnp.array([1.0, -2.0])}, averaged=True)
    expected = np.array([1.0, -2.0])
    for decay in (2 / 11, 3 / 12, 0.3, 0.3):
        part = update(part, [0.5, -0.25], 0.3)
        expected = decay * expected + (1 - decay) * np.asarray(part.params["w"], np.float64)
        np.testing.assert_allclose(part.average["w"], expected, rtol=1e-6)
    assert abs(part.average["w"][0] - part.params["w"][0]) > 0.01  # there is something to average


def test_an_average_changes_nothing_of_the_training():
    plain, averaged = (new_part({"w": jnp.array([1.0, -2.0])}, averaged=averaged) for averaged in (False, True))
    for _ in range(3):
        plain, averaged = update(plain, [0.5, -0.25], 0.0), update(averaged, [0.5, -0.25], 0.9)
    np.testing.assert_array_equal(plain.params["w"], averaged.params["w"])
    assert plain.average == () and len(jax.tree.leaves(plain)) == 4  # parameters, two moments, count


@pytest.mark.parametrize(
    ("gradient", "is_sound"), [([jnp.nan, 1.0], True), ([jnp.inf, 1.0], True), ([1.0, 1.0], False)]
)
def test_a_step_that_is_skipped_leaves_the_average(gradient, is_sound):
    part = update(new_part({"w": jnp.array([1.0, -2.0])}, averaged=True), [0.5, -0.25], 0.5)
    same = update(part, gradient, 0.5, is_sound=jnp.bool(is_sound))
    jax.tree.map(np.testing.assert_array_equal, same, part)


def test_models_answer_with_the_average_where_there_is_one():
    averaged, plain = (new_part({"w": jnp.array([1.0])}, averaged=averaged) for averaged in (True, False))
    averaged = averaged._replace(average={"w": jnp.array([5.0])})
    used = used_params({"a": averaged, "b": plain})
    assert used["a"]["w"] == 5.0 and used["b"]["w"] == 1.0


def tiny(**changes):
    config = dit_digits.get_config()
    config.update(
        num_layers=2, num_blocks=2, hidden_size=12, num_heads=2, intermediate_size=16, patch_size=4, grow_at=(),
        batch_size=700, num_epochs=1, save_every_n_epochs=1, log_every_n_steps=1, num_warmup_steps=0,
        score_samples=0, ema_decay=0.9, sharing="isolated", block_schedule="sequential",
    )  # fmt: skip
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, result) of two steps of block 0, saved, then two of block 1, saved."""
    workdir = tmp_path_factory.mktemp("averages")
    return workdir, train(tiny(), workdir)


def of_part(state: dict[str, np.ndarray], item: str, part: str) -> dict[str, np.ndarray]:
    begin = f"['{item}']['{part}']"
    return {path.removeprefix(begin): value for path, value in state.items() if path.startswith(begin)}


def test_the_average_of_an_idle_block_rests(run):
    """While block 0 trains, block 1's is what it was; while block 1 trains, block 0's stays."""
    at_2, at_4 = state_of(run[0], 2), state_of(run[0], 4)
    for kind in ("shared", "block"):
        begun, rests, moved = (of_part(at_2, item, f"{kind}_1") for item in ("params", "average", "params"))
        assert rests.keys() == moved.keys() and rests
        for path, value in rests.items():
            np.testing.assert_array_equal(value, begun[path])
        for path, value in of_part(at_2, "average", f"{kind}_0").items():
            np.testing.assert_array_equal(value, of_part(at_4, "average", f"{kind}_0")[path])
    assert any(
        np.any(value != of_part(at_4, "params", "block_1")[path])
        for path, value in of_part(at_4, "average", "block_1").items()
    )


def test_evaluation_answers_with_the_saved_average(run):
    workdir, result = run
    state = state_of(workdir, 4)
    trained = load_trained(workdir, "4")
    differs = 0
    for name, params in trained.params.items():
        average, last = of_part(state, "average", name), of_part(state, "params", name)
        found = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
        assert len(found) == len(average)
        for leaf, path in zip(found.values(), average, strict=True):
            np.testing.assert_array_equal(leaf, average[path])
            differs += np.any(average[path] != last[path])
    assert differs > 10
    assert evaluate_run(tiny(), workdir, overrides={}, checkpoint="4")["loss"] == pytest.approx(
        result["loss"], rel=1e-6
    )
    # And it is the average that was scored at the end of training: the parameters score otherwise.
    data = GENERATE.find_data(trained.config)
    score = trained.task.scorer(trained.blueprint, make_mesh())
    last = {
        name: jax.tree.unflatten(jax.tree.structure(params), map(jnp.asarray, of_part(state, "params", name).values()))
        for name, params in trained.params.items()
    }
    assert abs(score(last, data, "test", lambda: None)["loss"] - result["loss"]) > 1e-4


def test_without_averages_nothing_is_kept(tmp_path):
    """Neither in memory nor on disk."""
    config = tiny(ema_decay=0.0)
    parts = fresh_parts(GENERATE, config, GENERATE.make(config, GENERATE.card_without_data(config)))
    assert all(part.average == () for part in parts.values())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, parts, {})
        checkpoints.wait()
        assert checkpoints.restore(1, parts)["block_0"].average == ()
    assert {path.split("]")[0] for path in state_of(tmp_path, 1)} == {"['params'", "['adam'"}

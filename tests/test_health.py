"""Numbers that are not finite: the step changes nothing, is counted and named, and many in a row end the run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from runs import command, finish, logged, saved_steps

from configs import dblock_digits
from dblocks_jax.data.feed import Resident, Streamed
from dblocks_jax.models.blueprint import Blueprint
from dblocks_jax.modes.compare import compare
from dblocks_jax.modes.evaluate import evaluate_run
from dblocks_jax.modes.export import export_run
from dblocks_jax.modes.predict import predict
from dblocks_jax.modes.report import report
from dblocks_jax.modes.train import train
from dblocks_jax.run import workdir as run_folder
from dblocks_jax.run.devices import BLOCK, make_mesh
from dblocks_jax.run.errors import Diverged, UserError
from dblocks_jax.tasks.classify.scores import metrics
from dblocks_jax.tasks.task import Losses
from dblocks_jax.training.health import Health
from dblocks_jax.training.optimizer import new_part
from dblocks_jax.training.step import SKIPPED, WORST_LEVEL, Parallel, Steps, make_train_step

GOOD, BAD_LOSS, BAD_GRADIENT, HUGE_GRADIENT = 0, 255, 254, 253  # the first pixel of a batch decides


class Vector(nnx.Module):
    """A model of three numbers."""

    def __init__(self):
        self.w = nnx.Param(jnp.array([1.0, -2.0, 3.0]))


class Fragile:
    """A task whose loss is not finite, or whose gradient is not, where the first pixel of an image says so."""

    weighting = "none"
    corruption = None

    def modules(self, key):
        return {"model": Vector()}

    def batch_shapes(self, count):
        return None

    def scorer(self, blueprint, mesh):
        return lambda *_: {}

    def tell(self, scores):
        return ""

    def prepare(self, key, batch):
        return batch

    def losses(self, modules, example, level, draws):
        del level, draws
        w, first, labels = modules[0].w[...], example["image"][:, 0, 0, 0], example["label"]
        each = jnp.sum((w[None] - labels[:, None]) ** 2, axis=1)
        each = jnp.where(first == BAD_LOSS, jnp.nan, each)
        # A root at 0 has no derivative; a large factor overflows in the square of the norm.
        zero = jnp.sum(w - jax.lax.stop_gradient(w))
        is_bad = jnp.any(first == BAD_GRADIENT).astype(jnp.float32)
        each = each + jnp.sqrt(is_bad * zero + 1 - is_bad)
        each = each + jnp.where(jnp.any(first == HUGE_GRADIENT), 1e30, 0.0) * zero
        return Losses(each, None, {WORST_LEVEL: labels.astype(jnp.float32)})


BLUEPRINT = Blueprint.of({"model": Vector()})[0]


def make(accumulate: int = 1):
    return make_train_step(Fragile(), BLUEPRINT, seed=0, weight_decay=0.1, clip_norm=1.0, accumulate=accumulate)


def fresh():
    return (jax.tree.map(jnp.array, new_part({"w": jnp.array([1.0, -2.0, 3.0])})),)


def images_of(*kinds: int) -> np.ndarray:
    return np.array(kinds, np.uint8)[:, None, None, None]


def batch_of(labels: np.ndarray, *kinds: int) -> Streamed:
    return Streamed({"image": images_of(*kinds), "label": labels})


def steps_of(count: int, position: int = 0, room: int = 1) -> Steps:
    lr = np.full(room, 0.1, np.float32)
    return Steps(count=np.int32(count), block=np.int32(0), position=np.int32(position), lr=lr, share=None)


def assert_same(one, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("kind", [BAD_LOSS, BAD_GRADIENT, HUGE_GRADIENT])
def test_a_bad_step_changes_nothing(kind):
    """Neither parameters nor moments nor the step count; the step after it is as if it had not been."""
    step, labels = make(), np.array([0, 1], np.int32)
    before, _ = step(fresh(), batch_of(labels, GOOD, GOOD), steps_of(1))
    expected = jax.device_get(before)
    after, metrics = step(before, batch_of(labels, GOOD, kind), steps_of(1, position=1))
    assert_same(jax.device_get(after), expected)
    assert metrics[SKIPPED] == 1.0 and int(after[0].adam.count) == 1
    again, metrics = step(after, batch_of(labels, GOOD, GOOD), steps_of(1, position=2))
    without, _ = step(expected, batch_of(labels, GOOD, GOOD), steps_of(1, position=2))
    assert_same(jax.device_get(again), jax.device_get(without))
    assert metrics[SKIPPED] == 0.0


def test_many_steps_in_one_call_skip_the_bad_ones():
    images, labels = images_of(GOOD, BAD_LOSS, GOOD), np.array([0, 1, 2], np.int32)
    data = Resident({"image": images, "label": labels}, np.array([[0], [1], [2]], np.int32))
    parts, metrics = make()(fresh(), data, steps_of(3, room=3))
    assert list(metrics[SKIPPED]) == [0.0, 1.0, 0.0]
    one_by_one = fresh()
    for i in (0, 2):
        one_by_one, _ = make()(
            one_by_one, Streamed({"image": images[[i]], "label": labels[[i]]}), steps_of(1, position=i)
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), parts, one_by_one)


def test_one_bad_micro_batch_spoils_the_update_and_is_the_one_that_is_named():
    labels = np.array([5, 6, 7, 8], np.int32)  # the noise level in this test; micro-batch i takes i and i + 2
    data = batch_of(labels, GOOD, BAD_LOSS, GOOD, GOOD)
    parts, metrics = make(accumulate=2)(fresh(), data, steps_of(1))
    assert_same(jax.device_get(parts), jax.device_get(fresh()))
    assert metrics[SKIPPED] == 1.0 and metrics[WORST_LEVEL] == np.mean([6, 8])
    data = batch_of(labels, GOOD, GOOD, GOOD, GOOD)
    _, metrics = make(accumulate=2)(fresh(), data, steps_of(1))
    assert metrics[SKIPPED] == 0.0 and metrics[WORST_LEVEL] == np.mean([6, 8])  # labels are far from w: the larger loss


def test_common_parts_wait_for_all_blocks_that_train_side_by_side():
    grads = ({"w": jnp.array([1.0, 3.0])}, {"w": jnp.array([5.0, 7.0])})
    sound = jnp.array([True, False])

    def combine(isolated: bool):
        parallel = Parallel(make_mesh(), isolated=isolated)
        return jax.vmap(parallel.combine, axis_name=BLOCK)(grads, sound)

    (common, own), (is_common_sound, is_own_sound) = combine(isolated=False)
    np.testing.assert_array_equal(common["w"], [2.0, 2.0])
    np.testing.assert_array_equal(own["w"], [5.0, 7.0])
    assert list(is_common_sound) == [False, False] and list(is_own_sound) == [True, False]
    _, flags = combine(isolated=True)
    assert [list(flag) for flag in flags] == [[True, False], [True, False]]


def metrics_of(*skipped: int) -> dict[str, np.ndarray]:
    return {SKIPPED: np.array(skipped, np.float32), WORST_LEVEL: np.arange(len(skipped), dtype=np.float32)}


def test_bad_steps_are_counted_in_a_row_by_block_and_over_restarts():
    health = Health(3, {})
    assert health.take(1, 0, metrics_of(1, 1, 0, 1)) == [
        {"step": 1, "block": 0, "level": 0.0}, {"step": 2, "block": 0, "level": 1.0},
        {"step": 4, "block": 0, "level": 3.0},
    ]  # fmt: skip
    health.take(5, 1, metrics_of(1, 1))
    health.check()
    assert health.record == {"total": {"0": 3, "1": 2}, "in_a_row": {"0": 1, "1": 2}}
    restarted = Health(3, json.loads(json.dumps(health.record)))
    restarted.take(7, 0, metrics_of(1))
    restarted.check()
    restarted.take(8, 1, metrics_of(1))
    with pytest.raises(Diverged, match=r"step 8, block 1: .* worst sample: 0\), the last of 3 such steps in a row"):
        restarted.check()


def test_a_smaller_limit_after_a_restart_counts_what_was_before():
    health = Health(20, {})
    health.take(1, 0, metrics_of(*[1] * 12))
    restarted = Health(5, health.record)
    restarted.take(13, 0, metrics_of(1, 1))
    with pytest.raises(Diverged, match=r"step 13, .* the last of 13 such steps in a row"):
        restarted.check()


def test_a_run_that_diverges_says_where_and_keeps_the_checkpoints_before(tmp_path):
    """A rate so large that the first update of a block is its last."""
    fields = {"num_epochs": 40, "lr": 1e30, "max_bad_steps": 7, "save_every_n_epochs": 2}
    done = finish(*command(tmp_path, **fields))
    assert done.returncode == 4 and not done.stdout
    assert "the last of 7 such steps in a row" in done.stderr.splitlines()[-1]
    skipped = [entry for line in logged(tmp_path) for entry in line.get("skipped", [])]
    for block in (0, 1):
        named = [entry for entry in skipped if entry["block"] == block]
        assert all(0.002 <= entry["level"] <= 80 for entry in named)
    assert saved_steps(tmp_path)  # steps that changed nothing are no reason to lose them
    left = json.loads((tmp_path / "train.json").read_text())
    assert left["diverged"] is True and left["checkpoint"] == saved_steps(tmp_path)[-1] <= left["step"]
    [group] = compare([tmp_path], tmp_path)["groups"]  # lists it
    assert group["diverged"] == [str(tmp_path)] and group["accuracy"] == "diverged"


# A model whose answers are not finite, although no step was bad, or too few in a row.


@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    """(config, folder, result) of a run whose rate is absurd."""
    config = dblock_digits.get_config()
    config.update(num_layers=2, num_blocks=2, hidden_size=12, num_heads=2, intermediate_size=16, batch_size=700)
    config.update(lr=1e25, max_steps=8, num_warmup_steps=0, eval_batch_size=360)
    workdir = tmp_path_factory.mktemp("diverged")
    return config, workdir, train(config, workdir, command=[], overrides={})


def test_a_run_whose_answers_are_not_finite_says_so_at_its_end(diverged, capsys):
    config, workdir, result = diverged
    assert result["diverged"] is True and result["top1"] == 0.0 and np.isnan(result["cross_entropy"])
    with pytest.raises(Diverged, match=f"{workdir}: the model's answers are not finite numbers: its training diverged"):
        run_folder.finish(workdir, result)
    assert Diverged.exit_code == 4
    for text in (capsys.readouterr().out, (workdir / "train.json").read_text()):
        assert json.loads(text)["diverged"] is True and json.loads(text)["cross_entropy"] is None
    scored = evaluate_run(config, workdir, overrides={}, checkpoint="last")
    with pytest.raises(Diverged):
        run_folder.finish(workdir, scored)
    assert json.loads((workdir / "eval.json").read_text())["diverged"] is True


def test_the_other_modes_refuse_such_a_model_and_leave_nothing(diverged, tmp_path):
    config, workdir, _ = diverged
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    for mode in (report, export_run, lambda *args, **more: predict(*args, [str(tmp_path / "a.png")], **more)):
        with pytest.raises(Diverged, match=r"^\S*: the model's answers are not finite numbers.*--checkpoint"):
            mode(config, workdir, overrides={}, checkpoint="last")
    assert not {path.name for path in workdir.iterdir()} & {"report.html", "export", ".export", "predictions.json"}


def test_comparison_lists_it_and_ranks_the_others(diverged, tmp_path):
    _, workdir, result = diverged
    run_folder.write_json(workdir / "train.json", result)
    (tmp_path / "sound").mkdir()
    for name in ("config.json", "data.json"):
        (tmp_path / "sound" / name).write_bytes((workdir / name).read_bytes())
    sound = {key: value for key, value in result.items() if key != "diverged"} | {"top1": 0.5, "cross_entropy": 1.0}
    run_folder.write_json(tmp_path / "sound" / "train.json", sound)
    [group] = compare([workdir, tmp_path / "sound"], tmp_path)["groups"]
    assert group["runs"] == [str(tmp_path / "sound")] and group["diverged"] == [str(workdir)]
    assert group["top1_mean"] == 0.5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_answer_that_is_not_finite_is_a_wrong_one(bad):
    """Although its label, the first of equal ones, may be the right one by accident."""
    logits = np.array([[2.0, 0.0], [0.0, 3.0], [bad, 0.0], [0.0, 1.0]], np.float32)
    found = metrics(np.array([[0, 1, 0, 0], [0, 1, 0, 1]]), logits, np.array([0, 1, 0, 1]))
    assert found["diverged"] is True and found["top1"] == found["top5"] == 0.75
    assert found["accuracy_by_step"] == [0.75, 0.75] and np.isnan(found["cross_entropy"])
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)
    sound = metrics(np.array([[0, 1]]), logits[:2], np.array([0, 1]))
    assert "diverged" not in sound and sound["cross_entropy"] > 0


def test_a_checkpoint_without_answers_is_never_the_best(tmp_path):
    """All wrong, whatever class its numbers fall on: any other checkpoint scores as much at least."""
    logits = np.full((4, 2), np.nan, np.float32)
    found = metrics(np.zeros((1, 4), int), logits, np.zeros(4, int))
    line = {"step": 4, "split": "val", **found, "cross_entropy": None}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert run_folder.scores(tmp_path, "val", "top1") == {4: 0.0}


@pytest.mark.parametrize("record", [[1], None, {"total": {"0": "x"}}, {"total": 1}, {"in_a_row": {"0": None}}])
def test_a_forged_record_of_skipped_steps_is_refused(record):
    with pytest.raises(UserError, match="what the checkpoint tells of skipped steps cannot be used"):
        Health(3, record)

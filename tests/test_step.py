"""The training step: one compilation, untouched parameters, accumulation, and its random streams."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dblocks_jax.data.datasets import Card
from dblocks_jax.data.feed import Resident, Streamed
from dblocks_jax.fields import classify
from dblocks_jax.models.blueprint import Blueprint
from dblocks_jax.models.dblock_vit import make_dblock_vit
from dblocks_jax.models.vit import Architecture
from dblocks_jax.run.streams import stream
from dblocks_jax.tasks.classify import task as task_module
from dblocks_jax.tasks.classify.denoiser import denoise_step
from dblocks_jax.tasks.classify.parts import from_modules, to_modules
from dblocks_jax.tasks.classify.task import Classify
from dblocks_jax.tasks.task import Draws
from dblocks_jax.training.optimizer import new_part
from dblocks_jax.training.setting import new_model
from dblocks_jax.training.step import Steps, make_train_step

ARCH = Architecture(8, 1, 4, 4, 2, 12, 2, 16, 0.0, "mean")
CARD = Card(("a", "b", "c", "d"), (8, 8, 1), (0.5,), (0.25,))
AUGMENTED = {"crop_padding": 1, "flip": True}


def task_of(model_type: str = "dblock", **changes) -> Classify:
    config = classify.get_config()
    config.update(
        model_type=model_type, num_blocks=2, num_layers=2, hidden_size=12, num_heads=2, intermediate_size=16,
        image_size=8, dropout=0.0, pool="mean", weighting="none", crop_padding=0, flip=False,
    )  # fmt: skip
    config.update(changes)
    return Classify(config, CARD)


def setup(model_type: str = "dblock", *, accumulate: int = 1, **changes):
    task = task_of(model_type, **changes)
    blueprint, params = new_model(task, 42)
    step = make_train_step(task, blueprint, seed=3, weight_decay=0.01, clip_norm=1.0, accumulate=accumulate)
    shares = [None] if task.corruption is None else task.corruption.shares
    return step, {name: new_part(part) for name, part in params.items()}, shares


def batch(count: int):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 8, 8, 1), np.uint8), rng.integers(0, 4, count, np.int32)


def run(step, parts, names, number: int, share, images, labels):
    active = tuple(parts.pop(name) for name in names)
    active, metrics = step(active, Streamed({"image": images, "label": labels}), one_step(number, share))
    parts.update(zip(names, active, strict=True))
    return {name: value[0] for name, value in metrics.items()}


def one_step(number: int, share, block: int = 0) -> Steps:
    return Steps(np.int32(1), np.int32(block), np.int32(number), np.full(1, 1e-2, np.float32), share)


def test_one_compilation_for_all_blocks_and_nothing_else_moves():
    step, parts, ranges = setup()
    before = jax.device_get(parts)
    images, labels = batch(4)
    for number, block in enumerate([0, 1, 0]):
        metrics = run(step, parts, ("shared", f"block_{block}"), number, ranges[block], images, labels)
        assert all(np.isfinite(value) for value in metrics.values())
    assert step._cache_size() == 1
    counts = {name: int(part.adam.count) for name, part in parts.items()}
    assert counts == {"shared": 3, "block_0": 2, "block_1": 1}
    for name, part in before.items():
        pairs = zip(jax.tree.leaves(part.params), jax.tree.leaves(parts[name].params), strict=True)
        assert any(not np.array_equal(*pair) for pair in pairs), name

    step, parts, ranges = setup()
    run(step, parts, ("shared", "block_1"), 0, ranges[1], images, labels)
    for a, b in zip(jax.tree.leaves(before["block_0"]), jax.tree.leaves(parts["block_0"]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_step_may_reuse_the_memory_of_what_it_replaces():
    step, parts, _ = setup("vit")
    part = parts["model"]
    images, labels = batch(4)
    step((part,), Streamed({"image": images, "label": labels}), one_step(0, None))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(part.params))


def test_accumulating_micro_batches_equals_one_large_batch():
    """Without dropout and augmentation the plain loss is a mean over images, so the cut makes no difference."""
    images, labels = batch(8)
    results = []
    for accumulate in (1, 4):
        step, parts, _ = setup("vit", accumulate=accumulate)
        metrics = run(step, parts, ("model",), 0, None, images, labels)
        results.append((jax.device_get(metrics), jax.device_get(parts["model"].adam.mu)))
    (whole, whole_moments), (cut, cut_moments) = results
    for name in whole:
        np.testing.assert_allclose(cut[name], whole[name], rtol=1e-5, err_msg=name)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole_moments))
    for a, b in zip(jax.tree.leaves(cut_moments), jax.tree.leaves(whole_moments), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * largest)


def test_the_same_step_draws_the_same_noise_and_another_step_other_noise():
    images, labels = batch(4)
    losses = []
    for number in (5, 5, 6):
        step, parts, ranges = setup(**AUGMENTED)
        losses.append(float(run(step, parts, ("shared", "block_0"), number, ranges[0], images, labels)["grad_norm"]))
    assert losses[0] == losses[1] != losses[2]


def test_streams_differ_by_seed_name_and_step():
    draws = {
        (seed, name, step): float(jax.random.normal(stream(seed, name, step)))
        for seed in (0, 1) for name in ("train", "init") for step in (0, 1)
    }  # fmt: skip
    assert len(set(draws.values())) == 8


@pytest.mark.parametrize("model_type", [pytest.param("vit", marks=pytest.mark.long), "dblock"])
def test_many_steps_in_one_call_are_the_same_steps(model_type):
    """Five steps by calls of five, of one and of three and two: the same metrics and the same bits."""
    images, labels = batch(6)
    indices = np.random.default_rng(1).integers(0, 6, (5, 4), np.int32)
    lr = np.linspace(1e-2, 1e-3, 5, dtype=np.float32)
    results = []
    for calls in ([5], [1] * 5, [3, 2]):
        step, parts, ranges = setup(model_type, **AUGMENTED)
        names = ("model",) if model_type == "vit" else ("shared", "block_1")
        active, log, done = tuple(parts[name] for name in names), [], 0
        for count in calls:
            here = slice(done, done + count)
            padded = np.zeros((5, 4), np.int32), np.zeros(5, np.float32)
            padded[0][:count], padded[1][:count] = indices[here], lr[here]
            steps = Steps(np.int32(count), np.int32(0), np.int32(7 + done), padded[1], ranges[-1])
            active, metrics = step(active, Resident({"image": images, "label": labels}, padded[0]), steps)
            log.append(jax.tree.map(lambda m, count=count: np.asarray(m)[:count], metrics))
            done += count
        assert step._cache_size() == 1
        results.append((jax.device_get(active), jax.tree.map(lambda *ms: np.concatenate(ms), *log)))
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], other)


@pytest.mark.long
def test_images_on_the_device_or_brought_there_make_the_same_step():
    images, labels = batch(6)
    chosen = np.array([[4, 1, 3, 0]], np.int32)
    results = []
    examples = {"image": images, "label": labels}
    for data in (Resident(examples, chosen), Streamed({name: array[chosen[0]] for name, array in examples.items()})):
        step, parts, ranges = setup(**AUGMENTED)
        results.append(jax.device_get(step((parts["shared"], parts["block_0"]), data, one_step(3, ranges[0]))))
    for a, b in zip(*(jax.tree.leaves(result) for result in results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("model_type", ["vit", "dblock"])
def test_a_model_can_be_taken_apart_and_put_together(model_type):
    blueprint, params = new_model(task_of(model_type), 42)
    again, params_again = Blueprint.of(to_modules(from_modules(blueprint.modules(params))))
    assert again == blueprint
    jax.tree.map(partial(np.testing.assert_array_equal), params, params_again)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) > 0
    assert jnp.isfinite(jax.tree.leaves(params)[0]).all()


@pytest.mark.long
def test_guidance_trains_on_blank_images_at_the_rate_asked_for(monkeypatch):
    """Only with cfg_scale > 0, as in the released code; the rest of the images stay as they are."""
    seen = []
    real = task_module.denoising_losses

    def spy(shared, block, images, *args, **kwargs):
        seen.append(np.asarray(images))
        return real(shared, block, images, *args, **kwargs)

    monkeypatch.setattr(task_module, "denoising_losses", spy)
    example = {"image": jnp.ones((400, 8, 8, 1)), "label": jnp.zeros(400, jnp.int32)}
    draws = Draws(*jax.random.split(jax.random.key(0), 4))
    for cfg_scale, expected in [(1.5, 0.3), (0.0, 0.0)]:
        task = task_of(cfg_scale=cfg_scale, class_dropout_prob=0.3)
        blueprint, params = new_model(task, 42)
        task.losses(blueprint.together((params["shared"], params["block_0"])), example, jnp.ones(400), draws)
        blank = (seen[-1] == 0).all(axis=(1, 2, 3))
        assert np.all(blank | (seen[-1] == 1).all(axis=(1, 2, 3)))
        assert abs(blank.mean() - expected) <= 0.08  # 400 draws at 0.3: standard deviation 0.023


@pytest.mark.parametrize("table", ["raw", "normalized"])
def test_a_sampler_step_moves_toward_the_mean_embedding_of_its_table(table):
    """By hand: a fresh head knows nothing, so every label has probability 1/4, and Euler moves z toward their mean."""
    model = make_dblock_vit(ARCH, 2, rngs=nnx.Rngs(0))
    z, images = jax.random.normal(jax.random.key(0), (2, 12)), jnp.ones((2, 8, 8, 1))
    logits, moved = denoise_step(
        model.shared, model.blocks[0], images, z, np.float32(8.0), np.float32(2.0),
        sigma_data=0.5, cfg_scale=0.0, table=table,
    )  # fmt: skip
    assert not logits.any()
    labels = np.asarray(model.shared.labels[...], np.float64)
    if table == "normalized":
        labels = labels / np.linalg.norm(labels, axis=1, keepdims=True)
    start = np.asarray(z)
    np.testing.assert_allclose(moved, start + (2 - 8) * (start - labels.mean(axis=0)) / 8, rtol=1e-4, atol=1e-6)

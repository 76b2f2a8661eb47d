"""The held-out loss of generation: what mathematics says of it, for networks whose answer is known."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from configs import dit_digits
from dblocks_jax.models.blueprint import Blueprint
from dblocks_jax.run.devices import make_mesh
from dblocks_jax.run.streams import stream
from dblocks_jax.tasks.generate import heldout
from dblocks_jax.tasks.generate.task import GENERATE
from dblocks_jax.training.setting import new_model

LEVELS = 24
MEAN, STD, LOW, HIGH, SIGMA_DATA = -1.2, 1.2, 0.002, 80.0, 0.5


def tiny(**changes):
    config = dit_digits.get_config()
    config.update(
        num_layers=3, num_blocks=3, hidden_size=12, num_heads=2, intermediate_size=16, patch_size=4, grow_at=(),
        sharing="isolated",
    )  # fmt: skip
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def data():
    return GENERATE.find_data(tiny())


def build(config, data) -> tuple[Blueprint, dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]:
    """(structure, fresh parameters by part, function of parameters to scores on the test images)."""
    task = GENERATE.make(config, GENERATE.card(data.to_dict()))
    blueprint, params = new_model(task, seed=1)
    score = task.scorer(blueprint, make_mesh())
    return blueprint, params, lambda params: score(params, data, "test", lambda: None)


def levels() -> np.ndarray:
    """The middle of each of LEVELS parts of equal mass of the cut log-normal, the noisiest first."""
    low, high = norm.cdf([(math.log(sigma) - MEAN) / STD for sigma in (LOW, HIGH)])
    middles = low + (np.arange(LEVELS)[::-1] + 0.5) / LEVELS * (high - low)
    return np.exp(MEAN + STD * norm.ppf(middles))


def signal_of(data) -> np.ndarray:
    """The test images in [-1, 1], float64 [n, pixels]."""
    images = data.split("test").images(np.arange(len(data.split("test")))).astype(np.float64)
    return images.reshape(len(images), -1) / 127.5 - 1


def noise_of(count: int, pixels: int) -> np.ndarray:
    """That of each level and image, [levels, n, pixels]: a function of both numbers alone."""

    def of_one(level, place):
        return jax.random.normal(jax.random.fold_in(stream(0, "held out", place), level), (8, 8, 1))

    of_levels = jax.vmap(jax.vmap(of_one, (None, 0)), (0, None))
    numbers = (np.arange(LEVELS, dtype=np.int32), np.arange(count, dtype=np.int32))
    return np.asarray(of_levels(*numbers), np.float64).reshape(LEVELS, count, pixels)


def by_hand(data, outputs: np.ndarray) -> np.ndarray:
    """w |D - y|^2 of each level, averaged over images, where the network's output at level i is outputs[i]."""
    y, sigma = signal_of(data), levels()[:, None, None]
    z = y + sigma * noise_of(*y.shape)
    total = sigma**2 + SIGMA_DATA**2
    denoised = SIGMA_DATA**2 / total * z + sigma * SIGMA_DATA / np.sqrt(total) * outputs[:, None, None]
    weight = total / (sigma * SIGMA_DATA) ** 2
    return np.mean(weight * (denoised - y) ** 2, axis=(1, 2))


def test_a_fresh_network_says_nothing_and_costs_what_the_skip_connection_costs(data):
    """With output 0, w |D - y|^2 is in the mean (s^2 |y|^2 / d^2 + d^2) / (s^2 + d^2), for noise s and sigma_data d."""
    _, params, score = build(tiny(), data)
    found = score(params)
    y, sigma = signal_of(data), levels()
    expected = (sigma**2 * np.mean(y**2) / SIGMA_DATA**2 + SIGMA_DATA**2) / (sigma**2 + SIGMA_DATA**2)
    # The mean of n squared normal numbers has the spread sqrt(2 / n).
    assert found["loss"] == pytest.approx(expected.mean(), rel=5 * math.sqrt(2 / (y.size * LEVELS)))
    assert found["loss_by_block"] == pytest.approx(
        expected.reshape(3, 8).mean(axis=1), rel=5 * math.sqrt(2 / y.size / 8)
    )
    exact = by_hand(data, np.zeros(LEVELS))
    assert found["loss"] == pytest.approx(exact.mean(), rel=1e-5) and found["num_images"] == len(y)


def test_each_level_is_asked_of_the_block_that_owns_it(data):
    """Networks that say one number each, whatever they see: three blocks of 24 levels of equal mass own 8 each."""
    blueprint, params, score = build(tiny(), data)
    answers = [0.25, -0.5, 1.0]
    for block, answer in enumerate(answers):
        shared, _ = blueprint.names(block)
        params[shared]["head"]["bias"] = jnp.full_like(params[shared]["head"]["bias"], answer)
    found = score(params)
    exact = by_hand(data, np.repeat(answers, 8))
    assert found["loss_by_block"] == pytest.approx(exact.reshape(3, 8).mean(axis=1), rel=1e-5)
    assert found["loss"] == pytest.approx(exact.mean(), rel=1e-5)


@pytest.mark.parametrize("eval_batch_size", [7, 180, 360, 1000])
def test_the_batch_size_changes_nothing(data, eval_batch_size, monkeypatch):
    monkeypatch.setattr(heldout, "MOST_IMAGES", 20)  # spread over the split, from first to last
    config = tiny(num_layers=1, num_blocks=1)
    _, params, score = build(config, data)
    reference = score(params)
    config.eval_batch_size = eval_batch_size
    assert reference["num_images"] == 20
    assert score(params)["loss"] == pytest.approx(reference["loss"], rel=1e-6)


def test_a_block_that_owns_none_of_the_levels_has_no_number(data, monkeypatch):
    """Equal widths in ln sigma leave the noisiest block less than a part in a thousand of the noise."""
    monkeypatch.setattr(heldout, "MOST_IMAGES", 2)
    _, params, score = build(tiny(num_layers=6, num_blocks=6, partition="log"), data)
    found = score(params)
    assert math.isnan(found["loss_by_block"][0]) and math.isfinite(found["loss"])
    own = [value for value in found["loss_by_block"] if not math.isnan(value)]
    assert 2 <= len(own) < 6 and min(own) <= found["loss"] <= max(own)

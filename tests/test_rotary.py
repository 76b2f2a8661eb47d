"""Rotary positions, by hand and by what they are for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dblocks_jax.models.rotary import rotate


@pytest.mark.parametrize("base", [10_000.0, 500.0])
def test_pairs_turn_as_complex_numbers(base, key):
    """Half-split: features i and i + w / 2 are one number, multiplied by exp(j position base^(-2 i / w))."""
    x = jax.random.normal(key, (2, 5, 3, 6))
    positions = np.array([7, 0, 1, 2, 300])
    numbers = np.asarray(x)[..., :3].astype(np.complex128) + 1j * np.asarray(x)[..., 3:]
    turned = numbers * np.exp(1j * positions[:, None] * base ** (-2 * np.arange(3) / 6))[None, :, None]
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rotate(x, jnp.asarray(positions), base), expected, atol=1e-4)


def test_scores_depend_on_distance_alone(key):
    q, k = jax.random.normal(key, (2, 1, 1, 1, 8))
    score = lambda i, j: float(jnp.sum(rotate(q, jnp.array([i])) * rotate(k, jnp.array([j]))))  # noqa: E731
    assert score(12, 9) == pytest.approx(score(3, 0), rel=1e-5)
    assert score(12, 9) != pytest.approx(score(9, 12), rel=1e-2)


def test_positions_count_from_zero_and_their_angles_keep_their_digits(key):
    x = jax.random.normal(key, (1, 4, 2, 6))
    np.testing.assert_array_equal(rotate(x), rotate(x, jnp.arange(4)))
    np.testing.assert_array_equal(rotate(x)[:, 0], x[:, 0])
    half = jnp.ones((1, 1, 1, 2), "bfloat16")
    far = rotate(half, jnp.array([1001]))
    assert far.dtype == jnp.bfloat16
    expected = [np.cos(1001) - np.sin(1001), np.cos(1001) + np.sin(1001)]
    np.testing.assert_allclose(np.asarray(far, np.float32)[0, 0, 0], expected, atol=0.01)

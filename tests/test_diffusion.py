"""Preconditioning, loss and sampler: identities that the mathematics forces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dblocks_jax.diffusion.loss import cross_entropy, weighted_loss
from dblocks_jax.diffusion.precondition import loss_weight, precondition
from dblocks_jax.diffusion.sampler import euler_step, guide, initial_z, sample

SIGMA = jnp.array([0.002, 0.1, 0.5, 3.0, 80.0])


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_preconditioning_gives_the_network_unit_variance(sigma_data):
    """EDM, appendix B.6: input variance 1, target variance 1, and w * c_out^2 = 1."""
    c = precondition(SIGMA, sigma_data)
    np.testing.assert_allclose(c.c_in**2 * (sigma_data**2 + SIGMA**2), 1, rtol=1e-5)
    target_variance = ((1 - c.c_skip) ** 2 * sigma_data**2 + c.c_skip**2 * SIGMA**2) / c.c_out**2
    np.testing.assert_allclose(target_variance, 1, rtol=1e-4)
    np.testing.assert_allclose(loss_weight(SIGMA, sigma_data) * c.c_out**2, 1, rtol=1e-5)
    np.testing.assert_allclose(jnp.exp(4 * c.c_noise), SIGMA, rtol=1e-4)


def test_cross_entropy_is_the_log_probability_of_the_label(key):
    logits = jax.random.normal(key, (4, 7))
    labels = jnp.array([0, 6, 3, 3])
    expected = [
        -np.log(np.exp(row[label]) / np.exp(row).sum()) for row, label in zip(np.float64(logits), labels, strict=True)
    ]
    np.testing.assert_allclose(cross_entropy(logits, labels), expected, rtol=1e-5)
    np.testing.assert_allclose(cross_entropy(jnp.zeros((1, 10)), jnp.array([4])), np.log(10), rtol=1e-6)


def test_the_three_weightings():
    ce, weight = jnp.array([1.0, 2.0, 6.0]), jnp.array([1.0, 4.0, 1.0])
    assert weighted_loss(ce, weight, "per_sample") == (1 + 8 + 6) / 3
    assert weighted_loss(ce, weight, "batch_mean") == (6 / 3) * (9 / 3)
    assert weighted_loss(ce, weight, "none") == 9 / 3


def test_euler_is_exact_for_a_constant_estimate(key):
    """dz/dsigma = (z - y) / sigma has the solution z - y proportional to sigma, which Euler's steps follow exactly."""
    z, y = jax.random.normal(key, (2, 3, 5))

    def step(block, z, sigma, sigma_next):
        return jnp.full((3, 2), float(block)), euler_step(z, y, sigma, sigma_next)

    sigmas = np.array([8.0, 2.0, 0.5])
    logits, trajectory = sample(step, z, sigmas, [0, 1, 3])
    for sigma, at in zip(sigmas, trajectory, strict=True):
        np.testing.assert_allclose(at - y, (z - y) * sigma / 8.0, atol=1e-5)
    assert [float(step_logits[0, 0]) for step_logits in logits] == [0, 1, 3]


def test_one_step_looks_once_and_never_moves(key):
    calls = []

    def step(block, z, sigma, sigma_next):
        calls.append((block, float(sigma), float(sigma_next)))
        return z, z

    logits, _ = sample(step, jax.random.normal(key, (2, 4)), np.array([80.0]), [0])
    assert calls == [(0, 80.0, 80.0)] and logits.shape == (1, 2, 4)


def test_the_start_has_the_variance_of_a_noisy_target():
    unit = jnp.ones((1, 2))
    np.testing.assert_allclose(initial_z(unit, 3.0) ** 2, 10.0, rtol=1e-6)
    assert not initial_z(unit, 80.0, 0.0).any()


def test_guidance_interpolates_and_extrapolates(key):
    conditional, unconditional = jax.random.normal(key, (2, 3, 4))
    np.testing.assert_allclose(guide(conditional, unconditional, 1.0), conditional, atol=1e-6)
    np.testing.assert_allclose(guide(conditional, unconditional, 0.0), unconditional, atol=1e-6)
    np.testing.assert_allclose(
        guide(conditional, unconditional, 3.0) - conditional, 2 * (conditional - unconditional), atol=1e-5
    )

"""The samplers of images on a problem that has an answer: Gaussian data, whose best estimate is known."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dblocks_jax.diffusion.noise import NoiseDistribution, block_edges, blocks_of_sigmas, inference_sigmas
from dblocks_jax.diffusion.sampler import guide, solve

MEAN, DEVIATION = 0.3, 0.5
NOISE = NoiseDistribution()


def best_estimate(owner, z, sigma):
    """E[y | z] where y ~ N(MEAN, DEVIATION^2) and z = y + sigma * eps."""
    del owner
    return MEAN + (z - MEAN) * (DEVIATION**2 / (DEVIATION**2 + float(sigma) ** 2))


def exact_flow(z, sigma, sigma_next):
    """Where dz/dsigma = (z - D) / sigma leads: z keeps its place in a Gaussian of variance DEVIATION^2 + sigma^2."""
    return MEAN + (z - MEAN) * np.sqrt((DEVIATION**2 + sigma_next**2) / (DEVIATION**2 + sigma**2))


def final(denoise, z, sigmas, solver, owners=None):
    *_, (_, z) = solve(denoise, z, sigmas, owners or [0] * len(sigmas), solver)
    return z


@pytest.fixture
def z(key):
    """Images of pure noise, in float64: errors of second order fall below what float32 resolves."""
    with jax.enable_x64():
        yield 80.0 * jax.random.normal(key, (2, 4, 4, 1))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_errors_fall_with_their_order(solver, order, z):
    """Over doublings of Karras' levels, each grid within the next; measured at the last level before 0."""
    errors = []
    for count in (33, 65, 129):
        sigmas = inference_sigmas(NOISE, count, rho=7.0)
        *_, (_, reached), (_, _answer) = solve(best_estimate, z, sigmas, [0] * count, solver)
        errors.append(np.max(np.abs(reached - exact_flow(z, sigmas[0], sigmas[-1]))))
    falls = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(falls, order, atol=0.15)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_one_level_answers_with_the_estimate_of_pure_noise(solver, z):
    (step,) = solve(best_estimate, z, inference_sigmas(NOISE, 1), [0], solver)
    for array in step:
        np.testing.assert_array_equal(array, best_estimate(0, z, np.float32(80.0)))


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("rho", [None, 7.0])
def test_fifty_levels(rho, solver, z):
    """Here z - MEAN grows by h * rate(sigma) in a step h, so each solver's answer is a product of numbers.

    Euler's factor is 1 + h rate, Heun's 1 + h (rate + rate' (1 + h rate)) / 2; the last step to 0 shrinks z to D.
    """
    sigmas = inference_sigmas(NOISE, 50, rho=rho)
    rates, steps = sigmas / (DEVIATION**2 + sigmas**2), np.diff(sigmas)
    moved = 1 + steps * rates[:-1]
    factors = moved if solver == "euler" else 1 + steps * (rates[:-1] + rates[1:] * moved) / 2
    shrunk = DEVIATION**2 / (DEVIATION**2 + sigmas[-1] ** 2)
    expected = MEAN + (z - MEAN) * np.prod(factors) * shrunk
    # Steps are differences of float32 levels, and z starts at 200: so many digits, on the scale of the largest entry.
    golden.assert_close(final(best_estimate, z, sigmas, solver), np.asarray(expected), 1e-5, solver)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_last_step_becomes_the_estimate(solver, z):
    steps = list(solve(best_estimate, z, inference_sigmas(NOISE, 5), [0] * 5, solver))
    assert len(steps) == 5
    np.testing.assert_array_equal(steps[-1][1], steps[-1][0])
    np.testing.assert_array_equal(steps[-1][0], best_estimate(0, steps[-2][1], np.float32(0.002)))


def test_each_level_is_answered_by_the_block_that_owns_it(z):
    """Euler asks once a level; Heun once more at each level but the first, and never at 0."""
    sigmas = inference_sigmas(NOISE, 7)
    edges = block_edges(NOISE, 3)
    owners = blocks_of_sigmas(edges, sigmas)
    levels = [float(np.float32(sigma)) for sigma in sigmas]
    asked = []

    def denoise(owner, z, sigma):
        assert sigma > 0 and sigma.dtype == np.float32
        asked.append((owner, float(sigma)))
        return best_estimate(owner, z, sigma)

    final(denoise, z, sigmas, "euler", owners)
    assert asked == list(zip(owners, levels, strict=True))
    asked.clear()
    final(denoise, z, sigmas, "heun", owners)
    assert sorted(asked, reverse=True, key=lambda call: call[1]) == asked
    assert asked == [(owners[0], levels[0])] + [call for call in zip(owners[1:], levels[1:], strict=True) for _ in "12"]


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_guidance_one_is_none(solver, z):
    def guided(scale):
        def denoise(owner, z, sigma):
            return guide(best_estimate(owner, z, sigma), jnp.zeros_like(z), scale)

        return final(denoise, z, inference_sigmas(NOISE, 6), solver)

    expected = final(best_estimate, z, inference_sigmas(NOISE, 6), solver)
    np.testing.assert_allclose(guided(1.0), expected, rtol=1e-10)
    assert not np.allclose(guided(2.0), expected, atol=1e-2)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_under_a_jit_the_same_loop_unrolls(solver, key):
    z, sigmas = 80.0 * jax.random.normal(key, (2, 3)), inference_sigmas(NOISE, 4)
    jitted = jax.jit(lambda z: final(best_estimate, z, sigmas, solver))
    np.testing.assert_allclose(jitted(z), final(best_estimate, z, sigmas, solver), rtol=1e-5)


def test_more_blocks_than_levels_or_fewer_are_not_taken(z):
    with pytest.raises(ValueError, match="zip"):
        list(solve(best_estimate, z, inference_sigmas(NOISE, 3), [0, 0], "euler"))

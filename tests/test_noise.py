"""Noise levels against scipy's distributions and the definitions."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dblocks_jax.diffusion.noise import (
    NoiseDistribution,
    block_edges,
    blocks_of_sigmas,
    inference_sigmas,
    sample_sigma,
    training_ranges,
)

NOISE = NoiseDistribution()
p_noise = stats.lognorm(s=NOISE.p_std, scale=np.exp(NOISE.p_mean))


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 12])
def test_blocks_have_equal_probability_and_cover_the_range(num_blocks):
    edges = block_edges(NOISE, num_blocks)
    masses = -np.diff(p_noise.cdf(edges))
    np.testing.assert_allclose(masses, masses.sum() / num_blocks, rtol=1e-9)
    np.testing.assert_allclose([edges[0], edges[-1]], [80.0, 0.002], rtol=1e-9)
    assert np.all(np.diff(edges) < 0)  # block 0 is the noisiest


def test_overlap_widens_in_log_sigma_and_stays_in_range():
    edges = block_edges(NOISE, 3)
    high, low = edges[1], edges[2]
    widened = training_ranges(NOISE, edges, 0.05)
    np.testing.assert_allclose(np.log(widened[1].high / high), 0.05 * np.log(high / low), rtol=1e-5)
    np.testing.assert_allclose(np.log(low / widened[1].low), 0.05 * np.log(high / low), rtol=1e-5)
    assert widened[0].high == np.float32(80.0)
    assert widened[2].low == np.float32(0.002)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_training_noise_follows_the_truncated_distribution(block):
    within = training_ranges(NOISE, block_edges(NOISE, 3), 0.05)[block]
    sigma = np.asarray(sample_sigma(jax.random.key(1), 20_000, within, p_mean=NOISE.p_mean, p_std=NOISE.p_std))
    assert within.low <= sigma.min() and sigma.max() <= within.high
    low, high = p_noise.cdf([within.low, within.high])
    assert stats.kstest(sigma, lambda s: (p_noise.cdf(s) - low) / (high - low)).pvalue > 0.01


def test_the_noisy_tail_keeps_its_resolution():
    """Large sigmas come from probabilities within 1e-4 of 1, where float32 itself has only 1700 values."""
    noise = NoiseDistribution(sigma_min=25.0)
    within = training_ranges(noise, block_edges(noise, 1), 0.0)[0]
    sigma = np.asarray(sample_sigma(jax.random.key(2), 20_000, within, p_mean=noise.p_mean, p_std=noise.p_std))
    assert len(np.unique(sigma)) > 10_000


def test_a_block_far_out_in_a_tail_has_its_share_of_it():
    """Masses down to 1e-27, which a difference from 1 would lose; equal widths put blocks there."""
    for p_mean in (-6.0, 6.0):
        noise = NoiseDistribution(p_mean=p_mean, p_std=1.0, sigma_min=0.05, sigma_max=20.0)
        z = (np.log(np.geomspace(20.0, 0.05, 7)) - p_mean) / 1.0
        for within, high, low in zip(training_ranges(noise, np.exp(z + p_mean), 0.0), z[:-1], z[1:], strict=True):
            tail = stats.norm.cdf if p_mean > 0 else stats.norm.sf
            expected = abs(tail(high) - tail(low))
            np.testing.assert_allclose(within.mass, expected, rtol=1e-6)
            sigma = np.asarray(sample_sigma(jax.random.key(0), 2000, within, p_mean=p_mean, p_std=1.0))
            assert len(np.unique(sigma)) > 1900


@given(st.floats(0.002, 79.9), st.integers(1, 12))
def test_a_sigma_belongs_to_the_block_whose_interval_holds_it(sigma, num_blocks):
    edges = block_edges(NOISE, num_blocks)
    (block,) = blocks_of_sigmas(edges, [sigma])
    assert edges[block + 1] <= sigma or block == num_blocks - 1
    assert sigma < edges[block] or block == 0


def test_sigmas_beyond_the_ends_go_to_the_outer_blocks():
    assert blocks_of_sigmas(block_edges(NOISE, 3), [1000.0, 80.0, 0.002, 1e-5]) == [0, 0, 2, 2]


def test_on_an_edge_the_released_program_decides_by_float32_rounding():
    """Four steps through three blocks hit both inner edges; PyTorch's bucketize, run on these values, says so."""
    assert blocks_of_sigmas(block_edges(NOISE, 3), inference_sigmas(NOISE, 4)) == [0, 0, 2, 2]


@pytest.mark.parametrize("rho", [None, 7.0])
def test_sampler_levels_descend_from_end_to_end(rho):
    assert inference_sigmas(NOISE, 1, rho=rho) == [80.0]
    sigmas = inference_sigmas(NOISE, 5, rho=rho)
    assert len(sigmas) == 5 and np.all(np.diff(sigmas) < 0)
    np.testing.assert_allclose([sigmas[0], sigmas[-1]], [80.0, 0.002], rtol=1e-6)

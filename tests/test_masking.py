"""The masking corruption: who owns which level, what a block draws, and what is hidden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dblocks_jax.diffusion.masking import Masking, hide_each


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 6])
def test_every_level_has_one_owner(num_blocks):
    masking = Masking(num_blocks, gamma=0.05)
    levels = np.arange(1, 721) / 720
    owners = masking.owners(levels)
    assert owners == [min(num_blocks - 1, int(num_blocks - np.ceil(round(t * num_blocks, 9)))) for t in levels]
    assert [owners.count(block) for block in range(num_blocks)] == [720 // num_blocks] * num_blocks  # equal decrements
    assert owners[-1] == 0 and owners[0] == num_blocks - 1  # block 0 has the most hidden


def test_an_edge_belongs_to_the_block_with_less_hidden():
    """Block b owns (edges[b + 1], edges[b]]: with exactly a third hidden the last of three answers."""
    assert Masking(3, 0.0).owners(np.array([1.0, 2 / 3, 64 / 192, np.nextafter(1 / 3, 1), 1e-9])) == [0, 1, 2, 1, 2]


@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_a_block_draws_from_its_share_alone_evenly(gamma):
    masking = Masking(3, gamma)
    for block, share in enumerate(masking.shares):
        low, high = max(0.0, (2 - block - gamma) / 3), min(1.0, (3 - block + gamma) / 3)
        levels = np.sort(np.asarray(masking.draw(jax.random.key(block), 64, share), np.float64))
        assert low < levels[0] and levels[-1] <= high + 1e-6
        np.testing.assert_allclose(np.diff(levels), (high - low) / 64, rtol=1e-3)


def test_no_level_is_zero():
    """Where the weight 1 / t would be infinite."""
    share = Masking(1, 0.0).shares[0]
    drawn = np.array([Masking(1, 0.0).draw(jax.random.key(seed), 3, share) for seed in range(50)])
    assert drawn.min() > 0 and drawn.max() <= 1


def test_one_block_owns_everything_whatever_gamma():
    assert Masking(1, 0.3).shares == Masking(1, 0.0).shares


def test_tokens_are_hidden_one_by_one():
    """Each with probability t, independently: the number of them is binomial."""
    counts = np.asarray(hide_each(jax.random.key(0), jnp.repeat(jnp.array([0.1, 0.7]), 4000), 5)).sum(axis=1)
    for t, of_level in ((0.1, counts[:4000]), (0.7, counts[4000:])):
        frequencies = np.bincount(of_level, minlength=6) / 4000
        np.testing.assert_allclose(frequencies, stats.binom(5, t).pmf(np.arange(6)), atol=0.025)


def test_the_samplers_levels_go_down_evenly_to_nothing():
    levels = Masking(3, 0.05).levels(6, start=0.5)
    np.testing.assert_allclose(levels, [3 / 6, 5 / 12, 4 / 12, 3 / 12, 2 / 12, 1 / 12])


@pytest.mark.parametrize(("num_blocks", "count"), [(3, 3), (3, 6), (3, 48), (3, 129), (6, 6), (6, 36), (7, 49)])
def test_blocks_share_the_samplers_steps_evenly(num_blocks, count):
    """Where the blocks divide the steps, levels lie on edges: none may fall to the block above."""
    masking = Masking(num_blocks, 0.05)
    owners = masking.owners(masking.levels(count))
    assert owners == sorted(owners) and np.bincount(owners).tolist() == [count // num_blocks] * num_blocks

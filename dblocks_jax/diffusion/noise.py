"""Noise levels: their distribution, its partition among the blocks, and the levels a sampler visits.

Everything about the distribution is computed on the host in float64 with numpy and scipy; only `sample_sigma`
runs on the device. Block 0 is the noisiest, so edges descend.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from scipy.special import ndtr, ndtri


@dataclass(frozen=True)
class NoiseDistribution:
    """Log-normal p_noise: ln sigma ~ N(p_mean, p_std^2), cut to [sigma_min, sigma_max] (EDM, Table 1)."""

    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def standardize(self, sigma: float) -> float:
        """(ln sigma - p_mean) / p_std: how many standard deviations sigma lies above the median."""
        return (math.log(sigma) - self.p_mean) / self.p_std

    def quantiles_descending(self, count: int) -> np.ndarray:
        """`count` sigmas evenly spaced in probability, from sigma_max down to sigma_min: float64 [count]."""
        q_min, q_max = ndtr(self.standardize(self.sigma_min)), ndtr(self.standardize(self.sigma_max))
        return np.exp(self.p_mean + self.p_std * ndtri(np.linspace(q_max, q_min, count)))


def block_edges(noise: NoiseDistribution, num_blocks: int) -> np.ndarray:
    """Equi-probability partition (paper, section 3): float64 [num_blocks + 1], descending.

    Block b owns [edges[b + 1], edges[b]).
    """
    return noise.quantiles_descending(num_blocks + 1)


def blocks_of_sigmas(edges: np.ndarray, sigmas: Sequence[float] | np.ndarray) -> list[int]:
    """For each sigma the block whose interval [low, high) holds it; the outer blocks take what lies beyond the ends.

    An inference sigma often coincides with an edge. As rounded to float32 by `inference_sigmas` it falls to one side,
    and the block is the one that the released code chooses (see docs/decisions.md).
    """
    last = len(edges) - 2
    from_the_quiet_end = np.searchsorted(edges[::-1], np.asarray(sigmas, np.float64), side="right") - 1
    return [int(block) for block in np.clip(last - from_the_quiet_end, 0, last)]


def inference_sigmas(noise: NoiseDistribution, num_steps: int, *, rho: float | None = None) -> np.ndarray:
    """The levels of a sampler with `num_steps` network calls: descending float64 [num_steps], rounded to float32.

    Evenly spaced in probability, or with Karras' rho (EDM, Eq. 5) where it is given. One step means one look at
    pure noise: [sigma_max].
    """
    if num_steps == 1:
        sigmas = np.array([noise.sigma_max])
    elif rho is None:
        sigmas = noise.quantiles_descending(num_steps)
    else:
        # Rounded to float32 where the reference rounds: its power turns that rounding into 1e-6 of the result.
        high, low = (float(np.float32(sigma ** (1 / rho))) for sigma in (noise.sigma_max, noise.sigma_min))
        ramp = np.linspace(0, 1, num_steps, dtype=np.float32).astype(np.float64)
        sigmas = (high + ramp * (low - high)).astype(np.float32).astype(np.float64) ** rho
    return sigmas.astype(np.float32).astype(np.float64)


Scalar = np.float32 | Float[np.ndarray, "*blocks"] | Float[Array, "*blocks"]


class SigmaRange(NamedTuple):
    """A training interval, ready for the device: every field a float32 scalar, or [blocks] for several blocks."""

    low: Scalar
    high: Scalar
    mass_below: Scalar  # probability under p_noise of less noise than `low`
    mass_above: Scalar  # of more noise than `high`
    mass: Scalar  # of the interval


def training_ranges(noise: NoiseDistribution, edges: np.ndarray, gamma: float) -> list[SigmaRange]:
    """The interval each block trains on: its own, widened by gamma of its width in ln sigma at both ends, clamped."""
    return [_widened_range(noise, low, high, gamma) for high, low in pairwise(edges)]


def _widened_range(noise: NoiseDistribution, low: float, high: float, gamma: float) -> SigmaRange:
    margin = gamma * math.log(high / low)
    low = max(low * math.exp(-margin), noise.sigma_min)
    high = min(high * math.exp(margin), noise.sigma_max)
    z_low, z_high = noise.standardize(low), noise.standardize(high)
    # From the tail that is nearer: beside 1 a tiny mass has no digits left.
    mass = ndtr(z_high) - ndtr(z_low) if z_high < 0 else ndtr(-z_low) - ndtr(-z_high)
    return SigmaRange(*(np.float32(value) for value in (low, high, ndtr(z_low), ndtr(-z_high), mass)))


def sample_sigma(
    key: Key[Array, ""], count: int, within: SigmaRange, *, p_mean: float, p_std: float
) -> Float[Array, " {count}"]:
    """Draw sigmas from p_noise cut to one block's interval, by inverse CDF: float32 [count].

    Each draw is inverted from the tail it is nearer to: near 1 a float32 probability has no digits left, and the
    noisiest block would see only a handful of different large sigmas.
    """
    u = jax.random.uniform(key, (count,))
    below = within.mass_below + u * within.mass
    above = within.mass_above + (1 - u) * within.mass
    ndtri_ = jax.scipy.special.ndtri
    normal = jnp.where(below < above, ndtri_(jnp.minimum(below, 0.5)), -ndtri_(jnp.minimum(above, 0.5)))
    return jnp.clip(jnp.exp(p_mean + p_std * normal), within.low, within.high)

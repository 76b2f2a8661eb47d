"""The Gaussian corruption z = y + sigma * eps, and how it is shared out among the blocks."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Array, Float, Key

from dblocks_jax.diffusion.noise import (
    NoiseDistribution,
    SigmaRange,
    block_edges,
    blocks_of_sigmas,
    inference_sigmas,
    sample_sigma,
    training_ranges,
)

KARRAS_RHO = 7.0


@dataclass(frozen=True)
class Gaussian:
    """sigma ~ p_noise, cut into `num_blocks` intervals, block 0 the noisiest (paper, section 3).

    They have equal mass, or, by the "log" partition that the paper compares with, equal widths in ln sigma.

    In training each interval is widened by `gamma` of its width in ln sigma. Training, evaluation and samplers ask this
    one object which block owns a level.
    """

    noise: NoiseDistribution
    num_blocks: int
    gamma: float
    partition: Literal["mass", "log"] = "mass"

    @cached_property
    def edges(self) -> np.ndarray:
        """float64 [num_blocks + 1], descending: block b owns [edges[b + 1], edges[b])."""
        if self.partition == "log":
            return np.geomspace(self.noise.sigma_max, self.noise.sigma_min, self.num_blocks + 1)
        return block_edges(self.noise, self.num_blocks)

    @cached_property
    def shares(self) -> list[SigmaRange]:
        """What each block trains on."""
        return training_ranges(self.noise, self.edges, self.gamma)

    def draw(self, key: Key[Array, ""], count: int, share: SigmaRange) -> Float[Array, " {count}"]:
        """Levels of one share, on the device."""
        return sample_sigma(key, count, share, p_mean=self.noise.p_mean, p_std=self.noise.p_std)

    def levels(self, count: int, spacing: str) -> Float[np.ndarray, " {count}"]:
        """Those of a sampler, descending: "cdf", evenly in probability, or "karras", with rho = 7."""
        return inference_sigmas(self.noise, count, rho=KARRAS_RHO if spacing == "karras" else None)

    def owners(self, levels: Float[np.ndarray, " n"]) -> list[int]:
        """The block of each level."""
        return blocks_of_sigmas(self.edges, levels)

    def describe(self, block: int) -> str:
        """A block's own interval in words."""
        return f"sigma {self.edges[block]:.3g} .. {self.edges[block + 1]:.3g}"

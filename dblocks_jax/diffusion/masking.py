"""The masking corruption: tokens are hidden, each with probability t, and shares of t are the blocks' (appendix D)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from dblocks_jax.diffusion.noise import Scalar


class MaskRange(NamedTuple):
    """The levels (low, high] that a block trains on: float32 scalars, or [blocks] for several blocks."""

    low: Scalar
    high: Scalar


@dataclass(frozen=True)
class Masking:
    """Levels t in (0, 1]: a token stays with probability alpha(t) = 1 - t. Block 0 has the most hidden.

    The mass of an interval is what alpha loses in it, so that equal masses are equal widths, 1 / num_blocks. In
    training each is widened by `gamma` of that at both ends, within [0, 1]. Training, evaluation and samplers ask this
    one object which block owns a level.
    """

    num_blocks: int
    gamma: float

    @cached_property
    def edges(self) -> Float[np.ndarray, " edges"]:
        """float64 [num_blocks + 1], descending: block b owns (edges[b + 1], edges[b]]."""
        return np.arange(self.num_blocks, -1, -1) / self.num_blocks

    @cached_property
    def shares(self) -> Sequence[MaskRange]:
        """What each block trains on."""
        margin = self.gamma / self.num_blocks
        lows, highs = np.maximum(self.edges[1:] - margin, 0), np.minimum(self.edges[:-1] + margin, 1)
        return [MaskRange(np.float32(low), np.float32(high)) for low, high in zip(lows, highs, strict=True)]

    def draw(self, key: Key[Array, ""], count: int, share: MaskRange) -> Float[Array, " {count}"]:
        """Levels of one share, on the device: one draw, and the others at equal distances from it (antithetic)."""
        distances = jnp.arange(count, dtype=jnp.float32) / count
        part = 1 - (jax.random.uniform(key) + distances) % 1  # in (0, 1]
        return jnp.maximum(share.low + (share.high - share.low) * part, jnp.finfo(jnp.float32).tiny)

    def levels(self, count: int, start: float = 1.0) -> Float[np.ndarray, " {count}"]:
        """Those of a sampler, descending evenly from `start`; after the last nothing is hidden: float64 [count]."""
        return start * (np.arange(count, 0, -1) / count)  # so divided, levels on an edge are the edge to the last bit

    def owners(self, levels: Float[np.ndarray, " n"]) -> list[int]:
        """The block of each level."""
        from_the_clear_end = np.searchsorted(self.edges[::-1], np.asarray(levels, np.float64), side="left")
        return [int(block) for block in np.clip(self.num_blocks - from_the_clear_end, 0, self.num_blocks - 1)]

    def describe(self, block: int) -> str:
        """A block's own interval in words."""
        return f"{self.edges[block]:.3g} .. {self.edges[block + 1]:.3g} of the tokens hidden"


def hide_each(key: Key[Array, ""], level: Float[Array, " b"], length: int) -> Bool[Array, "b {length}"]:
    """Which tokens are hidden: each with probability t, whatever becomes of the others."""
    return jax.random.uniform(key, (level.shape[0], length)) < level[:, None]

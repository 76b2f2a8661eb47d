"""Rotary positions: queries and keys turn with their position, so that scores see only how far apart they are."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

BASE = 10_000.0


def rotate(
    x: Float[Array, "b t h w"], positions: Int[Array, " t"] | None = None, base: float = BASE
) -> Float[Array, "b t h w"]:
    """Features i and i + w / 2 of each head as a vector in the plane, turned by position * base^(-2 i / w) radians.

    Which features make a pair is Hugging Face's way. Positions are 0..t-1 where none are given; `w` must be even.
    Computed in float32: in bfloat16 an angle of 1000 has no digits left.
    """
    t, half = x.shape[1], x.shape[3] // 2
    positions = jnp.arange(t) if positions is None else positions
    frequencies = (base ** (-np.arange(half) / half)).astype(np.float32)
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None]
    cos, sin = (function(angles)[None, :, None] for function in (jnp.cos, jnp.sin))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)

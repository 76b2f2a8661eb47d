"""Random streams: every draw is a function of (seed, name, step), so nothing about randomness is ever saved."""

import zlib

import jax
from jaxtyping import Array, Key

LARGEST_SEED = 2**32 - 1


def stream(seed: int | Array, name: str, step: int | Array) -> Key[Array, ""]:
    """The key of one named use of randomness at one step. `step` may be traced, and so may a `seed` of type uint32."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode())), step)

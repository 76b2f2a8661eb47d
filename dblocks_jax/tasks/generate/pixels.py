"""Pixels as the signal that is denoised, and back."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Num, UInt8


def to_signal(images: Num[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """What is denoised: uint8 pixels in [-1, 1]; latents as they are."""
    return images.astype(jnp.float32) / 127.5 - 1.0 if images.dtype == jnp.uint8 else images


def to_pixels(signal: Float[Array, "b h w c"]) -> UInt8[Array, "b h w c"]:
    """The inverse of `to_signal` for pixels: uint8, cut to what there is."""
    return jnp.clip(jnp.round((signal + 1.0) * 127.5), 0, 255).astype(jnp.uint8)

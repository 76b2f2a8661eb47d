"""Where diffusion and network meet: a block of a DiT as a denoiser of images, guided or not, and its loss."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dblocks_jax.diffusion.precondition import loss_weight, precondition
from dblocks_jax.diffusion.sampler import guide
from dblocks_jax.models.conditioned import ConditionedBlock
from dblocks_jax.models.dit import DiTShared, run_block
from dblocks_jax.tasks.task import Losses


def denoise(
    shared: DiTShared,
    block: ConditionedBlock,
    labels: Int[Array, " b"],
    z: Float[Array, "b h w c"],
    sigma: Float[Array, " b"],
    *,
    sigma_data: float,
) -> Float[Array, "b h w c"]:
    """The image behind z = y + sigma * eps: D = c_skip * z + c_out * F(c_in * z, c_noise; label)."""
    c = precondition(sigma, sigma_data)
    c_skip, c_out, c_in = (factor[:, None, None, None] for factor in (c.c_skip, c.c_out, c.c_in))
    return c_skip * z + c_out * run_block(shared, block, c_in * z, c.c_noise, labels)


def guided(
    shared: DiTShared,
    block: ConditionedBlock,
    labels: Int[Array, " b"],
    z: Float[Array, "b h w c"],
    sigma: Float[Array, " b"],
    *,
    sigma_data: float,
    scale: float | Float[Array, ""],
) -> Float[Array, "b h w c"]:
    """Classifier-free guidance on all channels: D_u + scale * (D_c - D_u), where D_u is for the null class.

    One pass of the network over twice the batch. At scale 1 this is `denoise`, up to rounding, at twice the work.
    """
    twice = jnp.concatenate([labels, jnp.full_like(labels, shared.null_label)])
    both = denoise(
        shared, block, twice, jnp.concatenate([z, z]), jnp.concatenate([sigma, sigma]), sigma_data=sigma_data
    )
    conditional, unconditional = jnp.split(both, 2)
    return guide(conditional, unconditional, scale)


def squared_error(denoised: Float[Array, "b h w c"], images: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    """|D - y|^2, the mean over pixels and channels, one for each sample."""
    return jnp.mean((denoised - images) ** 2, axis=(1, 2, 3))


def denoising_losses(
    shared: DiTShared,
    block: ConditionedBlock,
    images: Float[Array, "b h w c"],
    labels: Int[Array, " b"],
    sigma: Float[Array, " b"],
    eps: Float[Array, "b h w c"],
    *,
    sigma_data: float,
) -> Losses:
    """One block's on z = y + sigma * eps, given the noise: |D - y|^2 of each image, and w(sigma)."""
    z = images + sigma[:, None, None, None] * eps
    errors = squared_error(denoise(shared, block, labels, z, sigma, sigma_data=sigma_data), images)
    return Losses(errors, loss_weight(sigma, sigma_data), {"error": errors})

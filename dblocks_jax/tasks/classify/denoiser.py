"""Where diffusion and network meet: a block as a denoiser of the label embedding that answers with logits."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dblocks_jax.diffusion.noise import Scalar
from dblocks_jax.diffusion.precondition import precondition
from dblocks_jax.diffusion.sampler import euler_step, guide
from dblocks_jax.models.dblock_vit import Block, Shared, normalize_rows, run_block

Table = Literal["raw", "normalized"]


def denoise(
    shared: Shared,
    block: Block,
    images: Float[Array, "b h w c"],
    z: Float[Array, "b d"],
    sigma: Float[Array, " b"],
    *,
    sigma_data: float,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "b classes"]:
    """Logits of the label behind z = y + sigma * eps: classify D = c_skip * z + c_out * F(c_in * z, c_noise; image)."""
    c = precondition(sigma, sigma_data)
    features, cond = run_block(shared, block, images, c.c_in[:, None] * z, c.c_noise, key)
    return shared.classify(c.c_out[:, None] * features + c.c_skip[:, None] * z, cond)


def denoise_step(
    shared: Shared,
    block: Block,
    images: Float[Array, "b h w c"],
    z: Float[Array, "b d"],
    sigma: Scalar,
    sigma_next: Scalar,
    *,
    sigma_data: float,
    cfg_scale: float,
    table: Table,
    labels_next: Float[Array, "classes d"] | None = None,
) -> tuple[Float[Array, "b classes"], Float[Array, "b d"]]:
    """One step of the sampler: (logits at sigma, z at sigma_next).

    The denoised estimate is the mean label embedding under the predicted probabilities, over the table as it is
    ("raw", the released code) or with unit rows as in training ("normalized", the paper's text). With cfg_scale > 0
    the logits are guided away from those of an all-zero image.

    Where the next step's block has label embeddings of its own, `labels_next`, the estimate is carried over to them,
    and the noise stays what it is.
    """
    sigmas = jnp.full(z.shape[:1], sigma)
    logits = denoise(shared, block, images, z, sigmas, sigma_data=sigma_data)
    if cfg_scale > 0:
        blank = jnp.zeros_like(images)
        logits = guide(logits, denoise(shared, block, blank, z, sigmas, sigma_data=sigma_data), cfg_scale)
    probs = jax.nn.softmax(logits)
    denoised = probs @ _table(shared.labels[...], table)
    z = euler_step(z, denoised, sigma, sigma_next)
    return logits, z if labels_next is None else z + (probs @ _table(labels_next, table) - denoised)


def join(logits: Float[Array, "n b classes"]) -> Float[Array, "n b classes"]:
    """The mean log-probabilities of the first 1, 2, ..., n answers, each given without the others.

    A block that reads in z what earlier blocks guessed counts their evidence again. At z = 0 every label is equally
    near, so a block answers from the image alone, and the answers are judgements to be averaged.
    """
    counts = jnp.arange(1, logits.shape[0] + 1, dtype=logits.dtype)
    return jnp.cumsum(jax.nn.log_softmax(logits), axis=0) / counts[:, None, None]


def _table(labels: Float[Array, "classes d"], table: Table) -> Float[Array, "classes d"]:
    return normalize_rows(labels) if table == "normalized" else labels

"""Where diffusion and network meet: a block as a denoiser of token embeddings that answers with logits."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dblocks_jax.diffusion.noise import Scalar
from dblocks_jax.diffusion.precondition import Preconditioning, precondition
from dblocks_jax.diffusion.sampler import euler_step
from dblocks_jax.models.dblock_llama import DBlockLlamaBlock, DBlockLlamaShared, run_block
from dblocks_jax.models.dblock_vit import normalize_rows
from dblocks_jax.models.llama import Cache


def denoise(
    shared: DBlockLlamaShared,
    block: DBlockLlamaBlock,
    tokens: Int[Array, "b t"],
    z: Float[Array, "b t d"],
    sigma: Float[Array, " b"],
    *,
    sigma_data: float,
    sigma_min: float,
) -> Float[Array, "b t v"]:
    """Logits of the token behind each z_i = y_i + sigma * eps_i, given the clean tokens before it.

    The network is F(c_in * z, c_noise; tokens before), and the estimate D = c_skip * z + c_out * F. Clean tokens have
    the c_noise of `sigma_min`.
    """
    c = precondition(sigma, sigma_data)
    return read_out(shared, run_at(shared, block, tokens, z, c, sigma_min=sigma_min), z, c)


def run_at(
    shared: DBlockLlamaShared,
    block: DBlockLlamaBlock,
    tokens: Int[Array, "b t"],
    z: Float[Array, "b t d"],
    c: Preconditioning,
    *,
    sigma_min: float,
) -> Float[Array, "b t d"]:
    """F(c_in * z, c_noise; tokens before)."""
    clean = shared.table()[tokens]
    return run_block(shared, block, clean, c.c_in[:, None, None] * z, c.c_noise, c_noise_of_clean(sigma_min))


def read_out(
    shared: DBlockLlamaShared, features: Float[Array, "b t d"], z: Float[Array, "b t d"], c: Preconditioning
) -> Float[Array, "b t v"]:
    """Logits of F, or of the estimate D: the head knows which."""
    denoised = c.c_out[:, None, None] * features + c.c_skip[:, None, None] * z
    return shared.head(features, denoised, shared.table())


def c_noise_of_clean(sigma_min: float) -> float:
    """What clean tokens tell of their noise: that of the least there is."""
    return math.log(sigma_min) / 4


def remember(
    shared: DBlockLlamaShared, block: DBlockLlamaBlock, tokens: Int[Array, "b t"], length: int, *, sigma_min: float
) -> Cache:
    """A block's cache of `length` slots that holds these clean tokens."""
    return block.remember(
        shared.table()[tokens].astype(shared.dtype), _cond_clean(shared, len(tokens), sigma_min), length
    )


def append(
    shared: DBlockLlamaShared,
    block: DBlockLlamaBlock,
    token: Int[Array, " b"],
    cache: Cache,
    position: Int[Array, ""],
    *,
    sigma_min: float,
) -> Cache:
    """A block's cache with the clean token at `position`."""
    clean = shared.table()[token][:, None].astype(shared.dtype)
    return block.step(clean, _cond_clean(shared, len(token), sigma_min), cache, position)[1]


def _cond_clean(shared: DBlockLlamaShared, count: int, sigma_min: float) -> Float[Array, "b d"]:
    return shared.noise(jnp.full(count, c_noise_of_clean(sigma_min)))


def denoise_step(
    shared: DBlockLlamaShared,
    block: DBlockLlamaBlock,
    z: Float[Array, "b d"],
    cache: Cache,
    position: Int[Array, ""],
    sigma: Scalar,
    sigma_next: Scalar,
    *,
    sigma_data: float,
    embeddings_next: Float[Array, "v d"] | None = None,
) -> tuple[Float[Array, "b v"], Float[Array, "b d"], Cache]:
    """One step of the token at `position`: (logits at sigma, z at sigma_next by `move`, cache)."""
    c = precondition(jnp.full(z.shape[:1], sigma), sigma_data)
    cond = shared.noise(c.c_noise)
    z_in = (c.c_in[:, None] * z)[:, None]
    x, cache = block.step(z_in.astype(shared.dtype), cond, cache, position)
    logits = read_out(shared, shared.normalize(x, cond), z[:, None], c)[:, 0]
    return logits, move(shared, logits, z, sigma, sigma_next, embeddings_next), cache


def move(
    shared: DBlockLlamaShared,
    logits: Float[Array, "b *t v"],
    z: Float[Array, "b *t d"],
    sigma: Scalar,
    sigma_next: Scalar,
    embeddings_next: Float[Array, "v d"] | None,
) -> Float[Array, "b *t d"]:
    """z at sigma_next by Euler's step toward the mean of the embeddings under the logits.

    Where the next step's block has embeddings of its own, `embeddings_next`, the estimate is carried over to them, and
    the noise stays what it is.
    """
    probs = jax.nn.softmax(logits)
    denoised = probs @ shared.table()
    z = euler_step(z, denoised, sigma, sigma_next)
    return z if embeddings_next is None else z + (probs @ normalize_rows(embeddings_next) - denoised)

"""From noise to an answer: the blocks run in turn, each moving z toward what it believes the target to be."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dblocks_jax.diffusion.noise import Scalar

# (block, z, sigma, sigma_next) -> (logits at sigma, z at sigma_next)
Step = Callable[[int, Float[Array, "b d"], np.float32, np.float32], tuple[Float[Array, "b c"], Float[Array, "b d"]]]


def initial_z(unit_noise: Float[Array, "b d"], sigma_max: float, init_noise_scale: float = 1.0) -> Float[Array, "b d"]:
    """The sampler's start: noise as large as a noisy target of unit variance, times `init_noise_scale`.

    Scale 1 is the paper; scale 0 starts at the mean, so that the sampler chooses a label rather than drawing one.
    """
    return unit_noise * (init_noise_scale * np.sqrt(1.0 + sigma_max**2)).astype(np.float32)


def euler_step(
    z: Float[Array, "b d"], denoised: Float[Array, "b d"], sigma: Scalar, sigma_next: Scalar
) -> Float[Array, "b d"]:
    """One Euler step of dz/dsigma = (z - D) / sigma. Since sigma falls, z moves toward the estimate D."""
    return z + (sigma_next - sigma) * ((z - denoised) / sigma)


def guide(conditional: Float[Array, "b c"], unconditional: Float[Array, "b c"], scale: float) -> Float[Array, "b c"]:
    """Classifier-free guidance on logits: unconditional + scale * (conditional - unconditional)."""
    return unconditional + scale * (conditional - unconditional)


def sample(
    step: Step, z: Float[Array, "b d"], sigmas: np.ndarray, blocks: Sequence[int]
) -> tuple[Float[Array, "n b c"], Float[Array, "n b d"]]:
    """Run the sampler: n levels make n network calls and n - 1 moves; the last logits are the answer.

    Returns the logits of every step and the z that each step saw. `blocks` holds what `step` is given first. `step` may
    be jitted: it is called from Python with one block at a time, so that only that block need be on the device; under
    an outer jit the loop unrolls.
    """
    all_logits, trajectory = [], []
    levels = sigmas.astype(np.float32)
    for block, sigma, sigma_next in zip(blocks, levels, [*levels[1:], levels[-1]], strict=True):
        trajectory.append(z)
        logits, z = step(block, z, sigma, sigma_next)
        all_logits.append(logits)
    return jnp.stack(all_logits), jnp.stack(trajectory)

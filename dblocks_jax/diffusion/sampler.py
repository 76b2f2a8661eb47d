"""From noise to an answer: the blocks run in turn, each moving z toward what it believes the target to be."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dblocks_jax.diffusion.noise import Scalar

# (block, z, sigma, sigma_next) -> (logits at sigma, z at sigma_next)
Step = Callable[[int, Float[Array, "b d"], np.float32, np.float32], tuple[Float[Array, "b c"], Float[Array, "b d"]]]

# (whose turn it is, z, sigma) -> the estimate D(z; sigma) of the target
Denoise = Callable[[Any, Float[Array, "b *d"], np.float32], Float[Array, "b *d"]]
Solver = Literal["euler", "heun"]


def initial_z(
    unit_noise: Float[Array, "b *d"], sigma_max: float, init_noise_scale: float = 1.0
) -> Float[Array, "b *d"]:
    """The sampler's start: noise as large as a noisy target of unit variance, times `init_noise_scale`.

    Scale 1 is the paper; scale 0 starts at the mean, so that the sampler chooses a label rather than drawing one.
    """
    return unit_noise * (init_noise_scale * np.sqrt(1.0 + sigma_max**2)).astype(np.float32)


def euler_step(
    z: Float[Array, "b *d"], denoised: Float[Array, "b *d"], sigma: Scalar, sigma_next: Scalar
) -> Float[Array, "b *d"]:
    """One Euler step of dz/dsigma = (z - D) / sigma. Since sigma falls, z moves toward the estimate D."""
    return z + (sigma_next - sigma) * ((z - denoised) / sigma)


def heun_step(
    z: Float[Array, "b *d"],
    denoised: Float[Array, "b *d"],
    z_next: Float[Array, "b *d"],
    denoised_next: Float[Array, "b *d"],
    sigma: Scalar,
    sigma_next: Scalar,
) -> Float[Array, "b *d"]:
    """Euler's step again with the mean of two slopes: that at z, and that at z_next, where Euler's step led."""
    slope, slope_next = (z - denoised) / sigma, (z_next - denoised_next) / sigma_next
    return z + (sigma_next - sigma) * (0.5 * (slope + slope_next))


def guide(
    conditional: Float[Array, "b *d"], unconditional: Float[Array, "b *d"], scale: float | Float[Array, ""]
) -> Float[Array, "b *d"]:
    """Classifier-free guidance: unconditional + scale * (conditional - unconditional)."""
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


def solve(
    denoise: Denoise, z: Float[Array, "b *d"], sigmas: np.ndarray, owners: Sequence[Any], solver: Solver
) -> Iterator[tuple[Float[Array, "b *d"], Float[Array, "b *d"]]]:
    """Follow dz/dsigma = (z - D) / sigma from z at sigmas[0] down to no noise, where z becomes D.

    Yields (D at this level, z at the next) for each of the n descending levels: the last z is the answer. Euler makes
    one network call a level, n in all. Heun (EDM, Algorithm 1 without churn) makes a second one at the next level
    unless that is 0, 2 n - 1 in all, and its error falls with the square of the step.

    owners[i] is who answers at sigmas[i], for both of Heun's calls there. `denoise` may be jitted: it is called from
    Python for one owner at a time, so that only that block need be on the device; under an outer jit the loop unrolls.
    """
    levels = sigmas.astype(np.float32)
    for i, (owner, sigma) in enumerate(zip(owners, levels, strict=True)):
        denoised = denoise(owner, z, sigma)
        if i == len(levels) - 1:
            yield denoised, denoised
            return
        z_next = euler_step(z, denoised, sigma, levels[i + 1])
        if solver == "heun":
            again = denoise(owners[i + 1], z_next, levels[i + 1])
            z_next = heun_step(z, denoised, z_next, again, sigma, levels[i + 1])
        z = z_next
        yield denoised, z

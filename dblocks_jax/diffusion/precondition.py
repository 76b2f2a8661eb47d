"""EDM preconditioning (Karras et al. 2022, Table 1): what the network sees and how its output becomes an estimate."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Preconditioning(NamedTuple):
    """Coefficients of D = c_skip * z + c_out * F(c_in * z, c_noise), one for each sample."""

    c_skip: Float[Array, " b"]
    c_out: Float[Array, " b"]
    c_in: Float[Array, " b"]
    c_noise: Float[Array, " b"]


def precondition(sigma: Float[Array, " b"], sigma_data: float) -> Preconditioning:
    """EDM's coefficients for a target of standard deviation `sigma_data`."""
    total = sigma**2 + sigma_data**2
    return Preconditioning(
        c_skip=sigma_data**2 / total,
        c_out=sigma * sigma_data / jnp.sqrt(total),
        c_in=1 / jnp.sqrt(total),
        c_noise=jnp.log(sigma) / 4,
    )


def loss_weight(sigma: Float[Array, " b"], sigma_data: float) -> Float[Array, " b"]:
    """w(sigma) = (sigma^2 + sigma_data^2) / (sigma * sigma_data)^2."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2

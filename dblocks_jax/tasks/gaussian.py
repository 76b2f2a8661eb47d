"""What tasks with Gaussian noise have in common: the fields of their noise levels, and their meaning."""

from itertools import pairwise
from typing import Literal

import numpy as np
from ml_collections import ConfigDict

from dblocks_jax.diffusion.gaussian import Gaussian
from dblocks_jax.diffusion.noise import NoiseDistribution
from dblocks_jax.run.checks import check_fields
from dblocks_jax.run.errors import UserError

TYPES = {
    int: ("num_inference_steps",),
    float: ("gamma", "sigma_min", "sigma_max", "sigma_data", "p_mean", "p_std"),
}
GUIDANCE = {float: ("cfg_scale", "class_dropout_prob")}  # types of the fields of tasks that have it
CHOICES = {"sampler_spacing": ("cdf", "karras")}
POSITIVE = ("sigma_min", "sigma_max", "sigma_data", "p_std")
NOT_NEGATIVE = ("num_inference_steps",)
LARGEST = {"num_inference_steps": 1000}
SMALLEST_SIGMA, LARGEST_SIGMA = 1e-6, 1e6  # their squares and quotients keep their digits in float32


def check_gaussian_fields(config: ConfigDict) -> None:
    """Refuse values that mean nothing, whatever the model.

    Raises:
      UserError: naming the field.
    """
    check_fields(
        config,
        types=TYPES,
        choices=CHOICES,
        positive=POSITIVE,
        not_negative=NOT_NEGATIVE,
        largest=LARGEST,
    )
    if not 0 <= config.gamma <= 0.5:
        raise UserError(f"gamma must lie in [0, 0.5], not {config.gamma}")


def check_guidance(config: ConfigDict) -> None:
    """Refuse guidance that means nothing, for tasks that have it.

    Raises:
      UserError: naming the field.
    """
    check_fields(config, types=GUIDANCE, not_negative=("cfg_scale",), below_one=("class_dropout_prob",))


def check_noise(config: ConfigDict, partition: Literal["mass", "log"] = "mass") -> None:
    """Refuse noise that cannot be shared out among the blocks.

    Raises:
      UserError: naming the fields.
    """
    for field in ("sigma_min", "sigma_max", "sigma_data"):
        if not SMALLEST_SIGMA <= config[field] <= LARGEST_SIGMA:
            raise UserError(f"{field} must lie in [{SMALLEST_SIGMA}, {LARGEST_SIGMA}], not {config[field]}")
    if config.sigma_min >= config.sigma_max:
        raise UserError(f"sigma_min={config.sigma_min} must be below sigma_max={config.sigma_max}")
    edges = gaussian(config).edges
    # Where float64 cannot tell a probability from 0 or 1, the outer edges are not where they should be.
    ends_differ = (abs(edges[0] / config.sigma_max - 1), abs(edges[-1] / config.sigma_min - 1))
    if not (max(ends_differ) < 1e-3 and all(high > low * (1 + 1e-6) > 0 for high, low in pairwise(edges))):
        raise UserError(
            f"p_mean={config.p_mean}, p_std={config.p_std} put almost no noise between sigma_min={config.sigma_min} "
            f"and sigma_max={config.sigma_max}: it cannot be shared out among {config.num_blocks} blocks"
        )
    shares = gaussian(config, partition).shares
    poorest = min(range(config.num_blocks), key=lambda block: shares[block].mass)
    if shares[poorest].mass < np.finfo(np.float32).tiny:  # float32 has no such levels to draw
        raise UserError(
            f"p_mean={config.p_mean}, p_std={config.p_std} put no noise into the share of block {poorest}: take fewer "
            "blocks, a wider p_std, or partition=mass"
        )


def gaussian(config: ConfigDict, partition: Literal["mass", "log"] = "mass") -> Gaussian:
    """The noise of a config, shared out among its blocks."""
    noise = NoiseDistribution(config.p_mean, config.p_std, config.sigma_min, config.sigma_max)
    return Gaussian(noise, config.num_blocks, config.gamma, partition)

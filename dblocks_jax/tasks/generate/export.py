"""A generator as a program: (labels int32 [b], positions int32 [b], guidance float32) to images [b, h, w, c].

The whole sampler. Images are uint8; latents are float32, unscaled, for the decoder that they belong to. A sample is a
function of its label, its position, which stands for its noise, and the guidance, of which 1 is none.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num
from ml_collections import ConfigDict

from dblocks_jax.data.datasets import Card
from dblocks_jax.models.blueprint import Blueprint
from dblocks_jax.run.naming import shown
from dblocks_jax.tasks.generate.config import LATENTS
from dblocks_jax.tasks.generate.pixels import to_pixels
from dblocks_jax.tasks.generate.sampler import make_sampler
from dblocks_jax.tasks.generate.task import Generate

PROGRAM = "sampler.stablehlo"
DIFFERENCE = "largest_difference_of_images"  # in units of [-1, 1], or of latents, before rounding to grey levels
TOLERANCE = 1e-3  # an eighth of a grey level: many steps, each from where rounding left the one before
TRIED_GUIDANCE = (1.0, 2.5)
TRIED_IMAGES = 3


def inputs(task: Generate, count: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What the program takes, for `count` images."""
    del task
    whole = jax.ShapeDtypeStruct((count,), jnp.int32)
    return whole, whole, jax.ShapeDtypeStruct((), jnp.float32)


def answerer(task: Generate, blueprint: Blueprint) -> Callable[..., Float[Array, "b h w c"]]:
    """(parameters by part, labels, positions, guidance) -> the signal that becomes images, by the whole sampler."""
    sampler = make_sampler(task.config, blueprint, task.card)

    def answer(params, labels, positions, guidance) -> Array:
        *_, (_, z) = sampler(params, positions, labels, jnp.asarray(guidance))
        return z

    return answer


def output(task: Generate, signal: Float[Array, "b h w c"]) -> Num[Array, "b h w c"]:
    """What the program returns of an answer."""
    return signal / task.config.latent_scale if task.config.dataset == LATENTS else to_pixels(signal)


def trials(task: Generate) -> list[tuple[Any, ...]]:
    """Inputs on which the program is tried: other classes, with and without guidance."""
    places = np.arange(TRIED_IMAGES, dtype=np.int32)
    labels = places % len(task.card.class_names)
    return [(labels, 7 * places, np.float32(guidance)) for guidance in TRIED_GUIDANCE]


def difference(task: Generate, returned: Num[np.ndarray, "b h w c"], expected: Float[np.ndarray, "b h w c"]) -> float:
    """Between what the program returned and the answer; of grey levels what is beyond rounding."""
    if task.config.dataset == LATENTS:
        return float(np.abs(returned * task.config.latent_scale - expected).max())
    levels = (np.clip(expected.astype(np.float64), -1, 1) + 1) * 127.5
    return max(0.0, float(np.abs(returned - levels).max()) - 0.5) / 127.5


def safe(card: Card) -> Card:
    """The card with names that can be shown."""
    return replace(card, class_names=tuple(map(shown, card.class_names)))


def describe(config: ConfigDict) -> str:
    """The model in words."""
    return "A plain DiT" if config.num_blocks == 1 else f"DiffusionBlocks of a DiT, {config.num_blocks} blocks"


def facts(config: ConfigDict, trained_on: str, scores: dict[str, Any]) -> dict[str, Any]:
    """What a model hub searches by. The scores stand on the card alone: none of them is one that hubs rank by."""
    del trained_on, scores
    blocks = ["diffusion-blocks"] if config.num_blocks > 1 else []
    return {
        "library_name": "dblocks_jax",
        "pipeline_tag": "unconditional-image-generation",  # hubs know no other that takes no text
        "tags": ["jax", "flax", "diffusion", "dit", "class-conditional", *blocks],
    }

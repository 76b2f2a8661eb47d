"""The fields of masked diffusion: what they may be, and the sizes, data and corruption that they describe."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dblocks_jax.data.datasets import NAMES
from dblocks_jax.data.pixels import PixelCard, Pixels
from dblocks_jax.diffusion.masking import Masking
from dblocks_jax.models.masked_transformer import MaskedArchitecture
from dblocks_jax.run.checks import check_divides, check_fields, check_fits_host
from dblocks_jax.run.errors import UserError
from dblocks_jax.tasks import images, text

TYPES = {int: ("image_size", "num_inference_steps", "bound_draws", "score_samples"), float: ("gamma", "temperature")}
POSITIVE = ("image_size", "num_inference_steps", "bound_draws", "temperature")
NOT_NEGATIVE = ("score_samples",)
LARGEST = {"image_size": 64, "num_inference_steps": 10_000, "bound_draws": 1000, "score_samples": 10_000}
CHOICES = {"dataset": (*text.NAMES, *NAMES)}
# Fields that only the sampler and the scores read: a trained model may be used with others.
SAMPLER_FIELDS = ("num_inference_steps", "bound_draws", "score_samples", "temperature")


def check(config: ConfigDict) -> None:
    """Refuse what cannot work, before any data is read.

    Raises:
      UserError: naming the field, its value and what it must be.
    """
    text.check_text_fields(config)
    check_fields(config, types=TYPES, choices=CHOICES, positive=POSITIVE, not_negative=NOT_NEGATIVE, largest=LARGEST)
    if not 0 <= config.gamma <= 0.5:
        raise UserError(f"gamma must lie in [0, 0.5], not {config.gamma}")
    check_divides(config, "num_blocks", "num_layers")
    text.check_rotary(config)
    check_fits_host(config, text.weights_of_transformer(config), config.num_blocks)


def describe(config: ConfigDict) -> str:
    """The model in words."""
    if config.num_blocks == 1:
        return "plain masked diffusion"
    return f"DiffusionBlocks of masked diffusion, {config.num_blocks} blocks"


def corruption(config: ConfigDict) -> Masking:
    """What is hidden, shared out among the blocks of a config."""
    return Masking(config.num_blocks, config.gamma)


def architecture(config: ConfigDict, card: text.TextCard | PixelCard) -> MaskedArchitecture:
    """The network's sizes, for the symbols of a data set."""
    return MaskedArchitecture(
        vocabulary=len(card.vocabulary),
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        gradient_checkpointing=config.gradient_checkpointing,
        dtype=config.dtype,
    )


def find_data(config: ConfigDict, *, may_prepare: bool = True) -> Any:
    """Text, or images as sequences of grey levels."""
    if config.dataset in text.NAMES:
        return text.find_text(config)
    return Pixels(images.find_dataset(config, may_prepare=may_prepare))


def card(saved: Mapping[str, Any]) -> text.TextCard | PixelCard:
    """The card among what a run has saved of its data."""
    return PixelCard.of(saved) if "image_shape" in saved else text.TextCard.of(saved)


def card_without_data(config: ConfigDict) -> Any:
    """What the data are like, as far as it is known without reading them."""
    if config.dataset in text.NAMES:
        return text.card_without_data(config)
    return PixelCard(images.card_without_images(config))

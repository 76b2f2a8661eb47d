"""The fields of image generation: what they may be, and the sizes and noise that they describe."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from absl import logging
from ml_collections import ConfigDict

from dblocks_jax.data.datasets import Card, Dataset, Source
from dblocks_jax.data.latents import load_latents
from dblocks_jax.diffusion.gaussian import Gaussian
from dblocks_jax.models.dit import DiTArchitecture
from dblocks_jax.run.checks import check_divides, check_fields, check_fits_host
from dblocks_jax.run.errors import UserError
from dblocks_jax.tasks import images
from dblocks_jax.tasks.gaussian import check_gaussian_fields, check_guidance, check_noise, gaussian

TYPES = {int: ("score_samples",), float: ("latent_scale",), str: ("judge",)}
CHOICES = {"partition": ("mass", "log"), "solver": ("euler", "heun")}
POSITIVE = ("num_inference_steps", "latent_scale")
NOT_NEGATIVE = ("score_samples",)
LARGEST = {"score_samples": 1_000_000}
LEAST_SAMPLES = 100  # fewer say nothing
LEAST_REAL = 4  # a kernel distance is between halves of a split's images, and takes two of each
# Fields that only the sampler and the scores read: a trained model may be used with others.
SAMPLER_FIELDS = ("num_inference_steps", "sampler_spacing", "solver", "cfg_scale", "score_samples", "judge")
LATENTS = "latents"
LARGEST_SCALE = 1000.0  # of guidance


def check(config: ConfigDict) -> None:
    """Refuse what cannot work, before any data is read.

    Raises:
      UserError: naming the field, its value and what it must be.
    """
    check_gaussian_fields(config)
    check_guidance(config)
    images.check_image_fields(config)
    check_fields(config, types=TYPES, choices=CHOICES, positive=POSITIVE, not_negative=NOT_NEGATIVE, largest=LARGEST)
    check_divides(config, "num_blocks", "num_layers")
    if config.cfg_scale > LARGEST_SCALE:
        raise UserError(f"cfg_scale must be at most {LARGEST_SCALE:g}, not {config.cfg_scale}")
    if config.hidden_size % 4:
        raise UserError(
            f"hidden_size must be a multiple of 4 for positions in two dimensions, not {config.hidden_size}"
        )
    if 0 < config.score_samples < LEAST_SAMPLES:
        raise UserError(f"score_samples must be 0, for no scores of samples, or at least {LEAST_SAMPLES}")
    if config.dataset == LATENTS and (config.flip or config.crop_padding):
        raise UserError("latents cannot be cropped or flipped: set flip=False and crop_padding=0")
    check_noise(config, config.partition)
    check_fits_host(config, images.weights_of_transformer(config), num_blocks(config))


def num_blocks(config: ConfigDict) -> int:
    """How many blocks are trained. With one it is the plain DiT."""
    return config.num_blocks


def describe(config: ConfigDict) -> str:
    """The model in words."""
    return "plain DiT" if config.num_blocks == 1 else f"DiffusionBlocks of a DiT, {config.num_blocks} blocks"


def warn(trained: ConfigDict, used: ConfigDict) -> None:
    """Say what will not work as one might think."""
    if used.cfg_scale != 1 and trained.class_dropout_prob == 0:
        logging.warning("guidance asks for images of no class, but none was trained on: class_dropout_prob was 0")


def corruption(config: ConfigDict) -> Gaussian:
    """The noise of a config, shared out among its blocks."""
    return gaussian(config, config.partition)


def architecture(config: ConfigDict, card: Card) -> DiTArchitecture:
    """The network's sizes, for the images and classes of a data set."""
    return DiTArchitecture(
        image_size=config.image_size,
        channels=card.image_shape[2],
        num_labels=len(card.class_names),
        patch_size=config.patch_size,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        gradient_checkpointing=config.gradient_checkpointing,
        dtype=config.dtype,
    )


def find_data(config: ConfigDict, *, may_prepare: bool = True) -> Dataset:
    """Images, or latents of images."""
    if config.dataset == LATENTS:
        return load_latents(
            config.data_dir, scale=config.latent_scale, val_fraction=config.val_fraction, seed=config.seed
        )
    found = images.find_dataset(config, may_prepare=may_prepare)
    return replace(found, load=partial(_enough_to_score, found.load)) if config.score_samples else found


def _enough_to_score(load: Callable[[str], Source | None], split: str) -> Source | None:
    """Load a split; one that samples are scored by must not be too small."""
    source = load(split)
    if source is not None and split != "val" and len(source) < LEAST_REAL:
        raise UserError(f"scores of samples need {LEAST_REAL} training and test images: set score_samples=0")
    return source


def card_without_data(config: ConfigDict) -> Card:
    """What the images are like, where that is known; folders are looked into."""
    return find_data(config) if config.dataset == LATENTS else images.card_without_images(config)

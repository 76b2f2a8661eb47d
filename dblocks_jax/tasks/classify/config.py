"""The fields of classification: what they may be, and the sizes they describe."""

from absl import logging
from ml_collections import ConfigDict

from dblocks_jax.data.datasets import Card
from dblocks_jax.models.vit import Architecture
from dblocks_jax.run.checks import check_divides, check_fields, check_fits_host
from dblocks_jax.run.errors import UserError
from dblocks_jax.tasks.gaussian import check_gaussian_fields, check_guidance, check_noise
from dblocks_jax.tasks.images import check_image_fields, weights_of_transformer

TYPES = {float: ("dropout", "init_noise_scale"), bool: ("open_gates", "resized_crop", "add_rand_aug")}
CHOICES = {
    "model_type": ("vit", "dblock"),
    "pool": ("cls", "mean"),
    "weighting": ("batch_mean", "per_sample", "none"),
    "label_table": ("raw", "normalized"),
    "answer": ("sampler", "joined"),
}
NOT_NEGATIVE = ("init_noise_scale",)
# Fields that only the sampler reads: a trained model may be used with others.
SAMPLER_FIELDS = ("answer", "num_inference_steps", "sampler_spacing", "label_table", "init_noise_scale", "cfg_scale")


def check(config: ConfigDict) -> None:
    """Refuse what cannot work, before any data is read.

    Raises:
      UserError: naming the field, its value and what it must be.
    """
    check_fields(config, types=TYPES, choices=CHOICES, not_negative=NOT_NEGATIVE, below_one=("dropout",))
    check_gaussian_fields(config)
    check_guidance(config)
    check_image_fields(config)
    if config.model_type == "dblock":
        check_divides(config, "num_blocks", "num_layers")
        if config.hidden_size < 6:
            raise UserError(f"hidden_size must be at least 6 for a conditioned model, not {config.hidden_size}")
        check_noise(config)
        if config.answer == "joined" and (config.num_inference_steps or config.init_noise_scale):
            raise UserError(
                'answer="joined" asks each block once, without noise: set num_inference_steps=0 and '
                f"init_noise_scale=0, not {config.num_inference_steps} and {config.init_noise_scale}"
            )
    elif config.block_parallel or config.train_blocks or config.grow_at or config.begin_from:
        raise UserError(
            "block_parallel, train_blocks, grow_at and begin_from are of DiffusionBlocks: the plain model has no blocks"
        )
    check_fits_host(config, weights_of_transformer(config), num_blocks(config))


def num_blocks(config: ConfigDict) -> int:
    """How many blocks are trained; the plain model is one."""
    return 1 if config.model_type == "vit" else config.num_blocks


def describe(config: ConfigDict) -> str:
    """The model in words."""
    return "plain ViT" if config.model_type == "vit" else f"DiffusionBlocks, {config.num_blocks} blocks"


def plain(config: ConfigDict) -> ConfigDict:
    """The plain model to compare with."""
    other = ConfigDict(config.to_dict())
    other.update(model_type="vit", block_parallel=False, train_blocks=(), grow_at=(), begin_from="")
    return other


def architecture(config: ConfigDict, card: Card) -> Architecture:
    """The transformer's sizes, for the images and classes of a data set."""
    return Architecture(
        image_size=config.image_size,
        channels=card.image_shape[2],
        num_labels=len(card.class_names),
        patch_size=config.patch_size,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        dropout_rate=config.dropout,
        pool=config.pool,
        open_gates=config.open_gates,
        gradient_checkpointing=config.gradient_checkpointing,
        dtype=config.dtype,
    )


def image_dropout(config: ConfigDict) -> float:
    """Probability of an all-zero training image: without guidance none, as in the released code."""
    return config.class_dropout_prob if config.cfg_scale > 0 else 0.0


def warn(trained: ConfigDict, used: ConfigDict) -> None:
    """Say what will not work as one might think."""
    if used.cfg_scale > 0 and image_dropout(trained) == 0:
        logging.warning("guidance asks the model about blank images, but it was trained without any: cfg_scale was 0")


def num_inference_steps(config: ConfigDict) -> int:
    """Denoising steps of the sampler."""
    return config.num_inference_steps or config.num_blocks

"""The fields of next-token text: what they may be, and the sizes and noise that they describe."""

from ml_collections import ConfigDict

from dblocks_jax.models.llama import LlamaArchitecture
from dblocks_jax.run.checks import check_divides, check_fields, check_fits_host
from dblocks_jax.run.errors import UserError
from dblocks_jax.tasks import text, text_order
from dblocks_jax.tasks.gaussian import check_gaussian_fields, check_noise

TYPES = {float: ("init_noise_scale",)}
CHOICES = {"model_type": ("llama", "dblock"), "head": ("linear", "denoised", "cosine")}
NOT_NEGATIVE = ("init_noise_scale",)
# Fields that only the writer and the scores read: a trained model may be used with others.
SAMPLER_FIELDS = ("num_inference_steps", "sampler_spacing", "init_noise_scale", *text_order.SAMPLER_FIELDS)


def check(config: ConfigDict) -> None:
    """Refuse what cannot work, before any data is read.

    Raises:
      UserError: naming the field, its value and what it must be.
    """
    text_order.check_order_fields(config)
    check_gaussian_fields(config)
    check_fields(config, types=TYPES, choices=CHOICES, not_negative=NOT_NEGATIVE)
    if config.model_type == "dblock":
        check_divides(config, "num_blocks", "num_layers")
        check_noise(config)
    elif config.block_parallel or config.train_blocks or config.grow_at or config.begin_from:
        raise UserError(
            "block_parallel, train_blocks, grow_at and begin_from are of DiffusionBlocks: the plain model has no blocks"
        )
    check_fits_host(config, text.weights_of_transformer(config), num_blocks(config))


def num_blocks(config: ConfigDict) -> int:
    """How many blocks are trained; the plain model is one."""
    return 1 if config.model_type == "llama" else config.num_blocks


def describe(config: ConfigDict) -> str:
    """The model in words."""
    if config.model_type == "llama":
        return "plain decoder"
    return f"DiffusionBlocks of a decoder, {config.num_blocks} block{'s' if config.num_blocks > 1 else ''}"


def plain(config: ConfigDict) -> ConfigDict:
    """The plain model to compare with."""
    other = ConfigDict(config.to_dict())
    other.update(model_type="llama", block_parallel=False, train_blocks=(), grow_at=(), begin_from="")
    return other


def architecture(config: ConfigDict, card: text.TextCard) -> LlamaArchitecture:
    """The network's sizes, for the vocabulary of a text."""
    return LlamaArchitecture(
        vocab_size=len(card.vocabulary),
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        gradient_checkpointing=config.gradient_checkpointing,
        dtype=config.dtype,
    )

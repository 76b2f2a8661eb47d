"""The fields of recurrent depth: what they may be, and the sizes that they describe."""

from ml_collections import ConfigDict

from dblocks_jax.models.huginn import MEAN_STEPS, HuginnArchitecture
from dblocks_jax.run.checks import check_fields, check_fits_host
from dblocks_jax.run.errors import UserError
from dblocks_jax.tasks import text, text_order
from dblocks_jax.tasks.gaussian import check_gaussian_fields, check_noise

TYPES = {int: ("prelude_layers", "coda_layers")}
CHOICES = {"model_type": ("huginn", "dblock")}
POSITIVE = ("prelude_layers", "coda_layers", "num_inference_steps")
CACHE_BYTES = 2**29
SAMPLER_FIELDS = ("num_inference_steps", "sampler_spacing", *text_order.SAMPLER_FIELDS)


def check(config: ConfigDict) -> None:
    """Refuse what cannot work, before any data is read.

    Raises:
      UserError: naming the field, its value and what it must be.
    """
    text_order.check_order_fields(config)
    check_gaussian_fields(config)
    check_fields(config, types=TYPES, choices=CHOICES, positive=POSITIVE)
    if config.num_layers <= config.prelude_layers + config.coda_layers:
        raise UserError(
            f"prelude_layers={config.prelude_layers} and coda_layers={config.coda_layers} leave no layer of "
            f"num_layers={config.num_layers} to the core"
        )
    if config.num_blocks != 1:
        raise UserError(
            f"num_blocks must be 1, not {config.num_blocks}: with recurrent depth the whole network is the denoiser"
        )
    if config.block_parallel or config.train_blocks or config.grow_at or config.begin_from:
        raise UserError("block_parallel, train_blocks, grow_at and begin_from are of several blocks: here there is one")
    if config.sharing != "shared":
        raise UserError(f"sharing={config.sharing} is of several blocks: here there is one")
    if config.model_type == "dblock":
        check_noise(config)
    check_fits_host(config, text.weights_of_transformer(config), num_blocks(config))


def num_blocks(config: ConfigDict) -> int:
    """The whole network is one block."""
    del config
    return 1


def describe(config: ConfigDict) -> str:
    """The model in words."""
    if config.model_type == "huginn":
        return "decoder of recurrent depth"
    return "DiffusionBlocks of a decoder of recurrent depth, one block"


def plain(config: ConfigDict) -> ConfigDict:
    """The original to compare with, answering after at least as many steps as it is trained for on average."""
    other = ConfigDict(config.to_dict())
    if config.model_type == "huginn":
        return other
    other.update(model_type="huginn", num_inference_steps=max(config.num_inference_steps, int(MEAN_STEPS)))
    return other


def architecture(config: ConfigDict, card: text.TextCard) -> HuginnArchitecture:
    """The network's sizes, for the vocabulary of a text."""
    return HuginnArchitecture(
        vocab_size=len(card.vocabulary),
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        gradient_checkpointing=config.gradient_checkpointing,
        dtype=config.dtype,
        prelude_layers=config.prelude_layers,
        coda_layers=config.coda_layers,
    )


def written_at_once(config: ConfigDict, length: int) -> int:
    """Texts that are written side by side: as many as have CACHE_BYTES of keys and values, of all layers and levels."""
    steps, core = config.num_inference_steps, config.num_layers - config.prelude_layers - config.coda_layers
    coda = config.coda_layers * (1 if config.model_type == "huginn" else steps)
    bytes_of_token = 4 * 2 * config.hidden_size * (config.prelude_layers + steps * core + coda)
    return max(1, min(config.eval_batch_size, CACHE_BYTES // (bytes_of_token * length)))

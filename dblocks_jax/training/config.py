"""What a config means: its checks, and the objects the rest of the program is built from."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from dblocks_jax.data.batches import steps_per_epoch
from dblocks_jax.data.datasets import Card, Dataset, load_dataset
from dblocks_jax.diffusion.noise import NoiseDistribution, block_edges
from dblocks_jax.models.vit import Architecture
from dblocks_jax.run.errors import UserError
from dblocks_jax.training.curriculum import BLOCK_SCHEDULES, Curriculum
from dblocks_jax.training.optimizer import learning_rate

CHOICES = {
    "model_type": ("vit", "dblock"),
    "pool": ("cls", "mean"),
    "weighting": ("batch_mean", "per_sample", "none"),
    "sampler_spacing": ("cdf", "karras"),
    "label_table": ("raw", "normalized"),
    "block_schedule": BLOCK_SCHEDULES,
    "idle_blocks": ("device", "host"),
    "sharing": ("shared", "isolated"),
    "dtype": ("float32", "bfloat16"),
    "matmul_precision": ("default", "high", "highest"),
    "prng_impl": ("threefry2x32", "rbg"),
}
POSITIVE = (
    "image_size", "patch_size", "num_layers", "hidden_size", "num_heads", "intermediate_size", "num_blocks",
    "sigma_min", "sigma_max", "sigma_data", "p_std", "num_epochs", "batch_size", "accumulate_grad_batches",
    "clip_norm", "chunk_steps", "steps_per_call", "eval_batch_size", "save_every_n_epochs", "log_every_n_steps",
    "max_bad_steps",
)  # fmt: skip
NOT_NEGATIVE = (
    "num_inference_steps", "init_noise_scale", "cfg_scale", "crop_padding", "lr", "weight_decay", "num_warmup_steps",
    "seed", "save_top_k", "max_steps",
)  # fmt: skip
BELOW_ONE = ("dropout", "class_dropout_prob")
# Beyond these a program would be built for hours, or not at all.
LARGEST = {
    "image_size": 4096, "num_layers": 1000, "num_inference_steps": 1000, "steps_per_call": 10_000, "seed": 2**32 - 1,
}  # fmt: skip
LARGEST_FLOAT = 1e30  # room to calculate with it in float32
LARGEST_STEP = 2**31 - 1  # steps are counted in 32 bits on the device
BYTES_PER_PARAMETER = 12  # itself and AdamW's two moments
SMALLEST_SIGMA, LARGEST_SIGMA = 1e-6, 1e6  # their squares and quotients keep their digits in float32

# Fields that the parameters do not depend on: a resumed run may change them.
FREE_TO_CHANGE = (
    "data_dir", "eval_batch_size", "idle_blocks", "log_every_n_steps", "max_bad_steps", "postfix",
    "save_every_n_epochs", "save_top_k", "steps_per_call", "wandb",
)  # fmt: skip
# Fields that only the sampler reads: `--mode=eval` may change them too.
SAMPLER_FIELDS = ("num_inference_steps", "sampler_spacing", "label_table", "init_noise_scale", "cfg_scale")
# Fields of arithmetic that evaluation may choose for itself.
ARITHMETIC_FIELDS = ("dtype", "matmul_precision")


def check_config(config: ConfigDict) -> None:
    """Refuse what cannot work, before any data is read.

    Raises:
      UserError: naming the field, its value and what it must be.
    """
    for field, value in config.items():
        if isinstance(value, float) and not abs(value) <= LARGEST_FLOAT:
            raise UserError(f"{field} must be a finite number of at most {LARGEST_FLOAT}, not {value}")
    for field, choices in CHOICES.items():
        if config[field] not in choices:
            raise UserError(f"{field} is {config[field]!r}; choose one of {', '.join(choices)}")
    for field in POSITIVE:
        if config[field] <= 0:
            raise UserError(f"{field} must be greater than 0, not {config[field]}")
    for field in NOT_NEGATIVE:
        if config[field] < 0:
            raise UserError(f"{field} must not be negative, but is {config[field]}")
    for field in BELOW_ONE:
        if not 0 <= config[field] < 1:
            raise UserError(f"{field} must lie in [0, 1), not {config[field]}")
    if not 0 <= config.gamma <= 0.5:
        raise UserError(f"gamma must lie in [0, 0.5], not {config.gamma}")
    if not 0 <= config.val_fraction <= 0.5:
        raise UserError(f"val_fraction must lie in [0, 0.5], not {config.val_fraction}")
    for field, largest in LARGEST.items():
        if config[field] > largest:
            raise UserError(f"{field} must be at most {largest}, not {config[field]}")
    if config.crop_padding > config.image_size:
        raise UserError(f"crop_padding={config.crop_padding} must be at most image_size={config.image_size}")
    _check_divides(config, "patch_size", "image_size")
    _check_divides(config, "num_heads", "hidden_size")
    if config.model_type == "dblock":
        _check_diffusion(config)
    elif config.block_parallel or config.train_blocks:
        raise UserError("block_parallel and train_blocks are of DiffusionBlocks: the plain model has no blocks")
    schedule(config, updates=1)
    _check_fits_host(config)


def _check_fits_host(config: ConfigDict) -> None:
    """A model starts in host memory. Its layers and patch embedding alone, which are nearly all of it, must fit."""
    width = config.hidden_size
    of_layer = 4 * width**2 + 2 * width * config.intermediate_size
    num_patches = (config.image_size // config.patch_size) ** 2
    weights = config.num_layers * of_layer + (config.patch_size**2 + num_patches) * width
    needed = weights * BYTES_PER_PARAMETER
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available:
        raise UserError(
            f"a model of {weights:.3g} parameters needs {needed / 2**30:.4g} GiB of the host's memory, "
            f"which has {available / 2**30:.4g}: lower num_layers, hidden_size or intermediate_size"
        )


def _check_divides(config: ConfigDict, divisor: str, field: str) -> None:
    if config[field] % config[divisor]:
        raise UserError(f"{divisor}={config[divisor]} must divide {field}={config[field]}")


def _check_diffusion(config: ConfigDict) -> None:
    _check_divides(config, "num_blocks", "num_layers")
    _check_blocks(config)
    if config.hidden_size < 6:
        raise UserError(f"hidden_size must be at least 6 for a conditioned model, not {config.hidden_size}")
    for field in ("sigma_min", "sigma_max", "sigma_data"):
        if not SMALLEST_SIGMA <= config[field] <= LARGEST_SIGMA:
            raise UserError(f"{field} must lie in [{SMALLEST_SIGMA}, {LARGEST_SIGMA}], not {config[field]}")
    if config.sigma_min >= config.sigma_max:
        raise UserError(f"sigma_min={config.sigma_min} must be below sigma_max={config.sigma_max}")
    edges = block_edges(noise_distribution(config), config.num_blocks)
    # Where float64 cannot tell a probability from 0 or 1, the outer edges are not where they should be.
    ends_differ = (abs(edges[0] / config.sigma_max - 1), abs(edges[-1] / config.sigma_min - 1))
    if not (max(ends_differ) < 1e-3 and all(high > low * (1 + 1e-6) > 0 for high, low in pairwise(edges))):
        raise UserError(
            f"p_mean={config.p_mean}, p_std={config.p_std} put almost no noise between sigma_min={config.sigma_min} "
            f"and sigma_max={config.sigma_max}: it cannot be shared out among {config.num_blocks} blocks"
        )


def _check_blocks(config: ConfigDict) -> None:
    if config.block_parallel and config.block_schedule != "random":
        raise UserError(
            f"block_parallel trains all blocks at once: block_schedule={config.block_schedule} has no meaning"
        )
    chosen = config.train_blocks
    if not all(type(block) is int and 0 <= block < config.num_blocks for block in chosen) or list(chosen) != sorted(
        set(chosen)
    ):
        raise UserError(f"train_blocks must be ascending numbers below num_blocks={config.num_blocks}, not {chosen}")
    if chosen and config.sharing != "isolated":
        raise UserError("train_blocks needs sharing=isolated: blocks that share parameters cannot be trained apart")
    if chosen and config.block_parallel:
        raise UserError("train_blocks and block_parallel exclude each other: the one trains apart, the other together")


def trained_blocks(config: ConfigDict) -> tuple[int, ...]:
    """The blocks that this run trains; the plain model is one block."""
    if config.model_type == "vit":
        return (0,)
    return tuple(config.train_blocks) or tuple(range(config.num_blocks))


def rest_on_host(config: ConfigDict) -> bool:
    """Whether the blocks of a model, but for the one at work, stay in host memory."""
    return config.model_type == "dblock" and (config.idle_blocks == "host" or config.block_parallel)


def curriculum(config: ConfigDict, total_steps: int) -> Curriculum:
    """What each of a run's `total_steps` steps trains."""
    return Curriculum(
        seed=config.seed,
        schedule="sequential" if config.block_parallel else config.block_schedule,
        chunk_steps=config.chunk_steps,
        num_blocks=config.num_blocks if config.model_type == "dblock" else 1,
        blocks=(0,) if config.block_parallel else trained_blocks(config),  # one turn for all
        total_steps=total_steps,
    )


@contextmanager
def arithmetic(config: ConfigDict) -> Iterator[None]:
    """The context in which a config's programs are compiled: precision of products, generator of random numbers."""
    with jax.default_matmul_precision(config.matmul_precision), jax.default_prng_impl(config.prng_impl):
        yield


def noise_distribution(config: ConfigDict) -> NoiseDistribution:
    """The distribution of sigma in training."""
    return NoiseDistribution(config.p_mean, config.p_std, config.sigma_min, config.sigma_max)


def find_dataset(config: ConfigDict, *, may_prepare: bool = True) -> Dataset:
    """The data set of a config; see `load_dataset`."""
    return load_dataset(
        config.dataset,
        data_dir=config.data_dir,
        image_size=config.image_size,
        val_fraction=config.val_fraction,
        seed=config.seed,
        may_prepare=may_prepare,
    )


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


def num_inference_steps(config: ConfigDict) -> int:
    """Denoising steps of the sampler."""
    return config.num_inference_steps or config.num_blocks


class Length(NamedTuple):
    """How long a run is."""

    steps: int  # of this run
    updates: int  # of all blocks, here and elsewhere: what the learning rate's schedule spans
    steps_per_epoch: int  # in one pass over the data


def count_steps(config: ConfigDict, num_images: int) -> Length:
    """How long a run on `num_images` images is.

    `num_epochs` passes for each block, so that a layer is updated as often as in the plain model. An update takes
    `accumulate_grad_batches` full batches. A run that trains some of the blocks makes their share of the updates; one
    that trains all at once makes an update of each in a step.

    Raises:
      UserError: not even one update's images are there.
    """
    per_epoch = steps_per_epoch(num_images, config.batch_size * config.accumulate_grad_batches)
    num_blocks = config.num_blocks if config.model_type == "dblock" else 1
    updates = config.num_epochs * per_epoch * num_blocks
    updates = min(updates, config.max_steps or updates)
    trained = 1 if config.block_parallel else len(trained_blocks(config))
    if updates > LARGEST_STEP:
        raise UserError(f"a run of {updates} steps is too long, {LARGEST_STEP} are possible: set max_steps")
    return Length(max(1, updates * trained // num_blocks), updates, per_epoch)


def schedule(config: ConfigDict, updates: int):
    """Update -> learning rate, for `updates` of them."""
    return learning_rate(
        config.scheduler_type,
        lr=config.lr,
        num_warmup_steps=config.num_warmup_steps,
        total_steps=updates,
        specific_kwargs=config.scheduler_specific_kwargs,
    )


def check_resumable(saved: dict[str, Any], config: ConfigDict, workdir: str) -> None:
    """Refuse to go on in a workdir whose run had another config.

    Fields in FREE_TO_CHANGE may differ; `num_epochs` and `max_steps` may grow where neither the learning rate nor the
    order of the blocks depends on the run's length.

    Raises:
      UserError: naming each field that differs, with both values.
    """
    saved, now = _as_saved(saved), _as_saved(config.to_dict())
    grows = config.scheduler_type == "constant_with_warmup" and config.block_schedule == "random"
    may_grow = ("num_epochs", "max_steps") if grows else ()
    differing = [
        f"{field} was {saved.get(field, 'absent')!r}, is {now.get(field, 'absent')!r}"
        for field in sorted(saved.keys() | now.keys())
        if saved.get(field) != now.get(field)
        and field not in FREE_TO_CHANGE
        and not (field in may_grow and _length(saved.get(field, 0)) <= _length(now[field]))
    ]
    if differing:
        raise UserError(
            f"{workdir} holds a run with another config: {'; '.join(differing)}. "
            "Set --workdir or --config.postfix for a run of its own, or repeat the first run's settings to resume it."
        )


def check_same_data(saved: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """Refuse data that a run was not trained on: "class_names" and, where both know it, the number of "images".

    Raises:
      UserError: naming what differs.
    """
    if saved["class_names"] != now["class_names"]:
        lost = [name for name in saved["class_names"] if name not in now["class_names"]]
        new = [name for name in now["class_names"] if name not in saved["class_names"]]
        raise UserError(f"{where} was trained on other classes: missing are {lost or 'none'}, new are {new or 'none'}")
    if "images" in now and saved["images"] != now["images"]:
        raise UserError(f"{where} was trained on {saved['images']} images, but now there are {now['images']}")


def _as_saved(value: Any) -> Any:
    """What becomes of a value when it is saved: tuples are lists."""
    return json.loads(json.dumps(value))


def _length(value: int) -> float:
    """0 stands for no limit."""
    return float(value or math.inf)


def for_evaluation(saved: dict[str, Any], overrides: dict[str, Any], config: ConfigDict) -> ConfigDict:
    """The config of a saved run, with the sampler and evaluation fields given on the command line.

    `config` supplies fields that an older run did not have; everything else comes from the checkpoint.

    Raises:
      UserError: an override contradicts how the model was trained.
    """
    result = ConfigDict({**config.to_dict(), **saved})
    for field, value in overrides.items():
        if field in (*SAMPLER_FIELDS, *ARITHMETIC_FIELDS, *FREE_TO_CHANGE):
            result[field] = value
        elif field not in ("num_epochs", "max_steps") and _as_saved(saved.get(field)) != _as_saved(value):
            raise UserError(
                f"--config.{field}={value!r} contradicts the checkpoint, which was trained with {saved.get(field)!r}; "
                f"evaluation takes {', '.join((*SAMPLER_FIELDS, *ARITHMETIC_FIELDS, *FREE_TO_CHANGE))}"
            )
    return result

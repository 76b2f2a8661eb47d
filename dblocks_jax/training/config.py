"""What the fields that all tasks have mean: their checks, and the objects that the trainer is built from."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from dblocks_jax.data.batches import steps_per_epoch
from dblocks_jax.run.checks import check_fields, check_finite
from dblocks_jax.run.errors import UserError
from dblocks_jax.run.streams import LARGEST_SEED
from dblocks_jax.tasks.task import Entry
from dblocks_jax.training.curriculum import BLOCK_SCHEDULES, Curriculum
from dblocks_jax.training.optimizer import learning_rate
from dblocks_jax.training.stages import block_counts

TYPES = {
    int: (
        "num_layers", "hidden_size", "num_heads", "intermediate_size", "num_blocks", "num_epochs", "max_steps",
        "batch_size", "accumulate_grad_batches", "num_warmup_steps", "chunk_steps", "steps_per_call", "seed",
        "eval_batch_size", "save_every_n_epochs", "max_bad_steps", "save_top_k", "log_every_n_steps",
    ),
    float: ("lr", "weight_decay", "clip_norm", "ema_decay"),
    bool: ("gradient_checkpointing", "block_parallel", "shard_parameters", "wandb"),
    str: ("scheduler_type", "scheduler_specific_kwargs", "begin_from", "postfix"),
    tuple: ("train_blocks", "grow_at"),
}  # fmt: skip
CHOICES = {
    "block_schedule": BLOCK_SCHEDULES,
    "idle_blocks": ("device", "host", "disk"),
    "sharing": ("shared", "isolated"),
    "dtype": ("float32", "bfloat16"),
    "matmul_precision": ("default", "high", "highest"),
    "prng_impl": ("threefry2x32", "rbg"),
}
POSITIVE = (
    "num_layers", "hidden_size", "num_heads", "intermediate_size", "num_blocks", "num_epochs", "batch_size",
    "accumulate_grad_batches", "clip_norm", "chunk_steps", "steps_per_call", "eval_batch_size", "save_every_n_epochs",
    "log_every_n_steps", "max_bad_steps",
)  # fmt: skip
NOT_NEGATIVE = ("lr", "weight_decay", "num_warmup_steps", "seed", "save_top_k", "max_steps")
BELOW_ONE = ("ema_decay",)
# Beyond these a program would be built for hours, or not at all.
LARGEST = {"num_layers": 1000, "steps_per_call": 10_000, "seed": LARGEST_SEED}
LARGEST_STEP = 2**31 - 1  # steps are counted in 32 bits on the device

# Fields that the parameters do not depend on: a resumed run may change them.
FREE_TO_CHANGE = (
    "data_dir", "eval_batch_size", "idle_blocks", "log_every_n_steps", "max_bad_steps", "postfix",
    "save_every_n_epochs", "save_top_k", "shard_parameters", "steps_per_call", "wandb",
)  # fmt: skip
# Fields of arithmetic that evaluation may choose for itself.
ARITHMETIC_FIELDS = ("dtype", "matmul_precision")
# Fields that runs of earlier versions do not have, and what those runs did; and those of classification.
SINCE = {"task": "classify", "ema_decay": 0.0, "grow_at": (), "begin_from": "", "shard_parameters": False}
SINCE_IN_CLASSIFICATION = {"answer": "sampler"}


def check_config(entry: Entry, config: ConfigDict) -> None:
    """Refuse what cannot work, before any data is read.

    Raises:
      UserError: naming the field, its value and what it must be.
    """
    check_finite(config)
    check_fields(
        config,
        types=TYPES,
        choices=CHOICES,
        positive=POSITIVE,
        not_negative=NOT_NEGATIVE,
        below_one=BELOW_ONE,
        largest=LARGEST,
    )
    if config.hidden_size % config.num_heads:
        raise UserError(f"num_heads={config.num_heads} must divide hidden_size={config.hidden_size}")
    entry.check(config)
    _check_blocks(entry, config)
    schedule(config, updates=1)


def _check_blocks(entry: Entry, config: ConfigDict) -> None:
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
    if config.shard_parameters and config.block_parallel:
        raise UserError("shard_parameters and block_parallel exclude each other: blocks side by side lie apart already")
    if config.grow_at and (chosen or config.block_parallel):
        raise UserError(
            f"grow_at excludes {'train_blocks' if chosen else 'block_parallel'}, for it begins with one block alone: "
            "train that by a run of its own, and name its folder as begin_from"
        )
    block_counts(config, entry.num_blocks(config))


def trained_blocks(entry: Entry, config: ConfigDict) -> tuple[int, ...]:
    """The blocks that this run trains; the plain model is one block."""
    return tuple(config.train_blocks) or tuple(range(entry.num_blocks(config)))


def rest_off_device(entry: Entry, config: ConfigDict) -> bool:
    """Whether the blocks of a model, but for the one at work, stay in host memory or on disk."""
    return config.block_parallel or (config.idle_blocks != "device" and entry.num_blocks(config) > 1)


def rest_on_disk(entry: Entry, config: ConfigDict) -> bool:
    """Whether they stay on disk."""
    return config.idle_blocks == "disk" and not config.block_parallel and entry.num_blocks(config) > 1


def curriculum(entry: Entry, config: ConfigDict, total_steps: int) -> Curriculum:
    """What each of a run's `total_steps` steps trains."""
    return Curriculum(
        seed=config.seed,
        schedule="sequential" if config.block_parallel else config.block_schedule,
        chunk_steps=config.chunk_steps,
        num_blocks=entry.num_blocks(config),
        blocks=(0,) if config.block_parallel else trained_blocks(entry, config),  # one turn for all
        total_steps=total_steps,
    )


@contextmanager
def arithmetic(config: ConfigDict) -> Iterator[None]:
    """The context in which a config's programs are compiled: precision of products, generator of random numbers."""
    with jax.default_matmul_precision(config.matmul_precision), jax.default_prng_impl(config.prng_impl):
        yield


class Length(NamedTuple):
    """How long a run is."""

    steps: int  # of this run
    updates: int  # of all blocks, here and elsewhere: what the learning rate's schedule spans
    steps_per_epoch: int  # in one pass over the data


def count_steps(entry: Entry, config: ConfigDict, num_examples: int) -> Length:
    """How long a run on `num_examples` examples is.

    `num_epochs` passes for each block, so that a layer is updated as often as in the plain model. An update takes
    `accumulate_grad_batches` full batches. A run that trains some of the blocks makes their share of the updates; one
    that trains all at once makes an update of each in a step.

    Raises:
      UserError: not even one update's examples are there.
    """
    per_epoch = steps_per_epoch(num_examples, config.batch_size * config.accumulate_grad_batches)
    num_blocks = entry.num_blocks(config)
    updates = config.num_epochs * per_epoch * num_blocks
    updates = min(updates, config.max_steps or updates)
    trained = 1 if config.block_parallel else len(trained_blocks(entry, config))
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

    Fields in FREE_TO_CHANGE may differ; `num_epochs` and `max_steps` may grow where neither the learning rate, nor the
    order of the blocks, nor when they are divided depends on the run's length.

    Raises:
      UserError: naming each field that differs, with both values.
    """
    saved, now = _as_saved(complete(saved)), _as_saved(config.to_dict())
    is_open = config.scheduler_type == "constant_with_warmup" and config.block_schedule == "random"
    may_grow = ("num_epochs", "max_steps") if is_open and not config.grow_at else ()
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


def complete(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved config with the fields that it lacks since it is of an earlier version, as that version had them."""
    full = SINCE | saved
    return SINCE_IN_CLASSIFICATION | full if full["task"] == "classify" else full


def _as_saved(value: Any) -> Any:
    """What becomes of a value when it is saved: tuples are lists."""
    return json.loads(json.dumps(value))


def _length(value: int) -> float:
    """0 stands for no limit."""
    return float(value or math.inf)


def for_evaluation(
    entry: Entry,
    saved: dict[str, Any],
    overrides: dict[str, Any],
    config: ConfigDict,
    asked: dict[str, Any] | None = None,
) -> ConfigDict:
    """The config of a saved run, with the sampler and evaluation fields given on the command line.

    `config` supplies fields that an older run did not have; everything else comes from the checkpoint. `asked` is the
    config of the whole run, which an override may repeat: a checkpoint from before a division is of fewer blocks.

    Raises:
      UserError: an override contradicts how the model was trained.
    """
    result = ConfigDict({**config.to_dict(), **complete(saved)})
    free = (*entry.sampler_fields, *ARITHMETIC_FIELDS, *FREE_TO_CHANGE)
    for field, value in overrides.items():
        if field in free:
            result[field] = value
        elif field not in ("num_epochs", "max_steps", "begin_from") and _as_saved(value) not in (
            _as_saved(result.get(field)),
            (asked or {}).get(field),
        ):
            raise UserError(
                f"--config.{field}={value!r} contradicts the checkpoint, which was trained with {result.get(field)!r}; "
                f"evaluation takes {', '.join(free)}"
            )
    return result

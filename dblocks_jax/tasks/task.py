"""The seam between tasks and trainer: what a task answers, and all that the trainer knows of it.

Algorithm 1 of the paper, as `dblocks_jax/training/step.py` runs it for every task:

    block   = curriculum.at(step)                                    on the host
    batch   = feed.take(position)                                    a pytree of arrays
    example = task.prepare(key, batch)                               augmented, normalised
    level   = task.corruption.draw(key, n, shares[block])            this block's share only
    losses  = task.losses(modules, example, level, keys)             one for each sample, and its weight, apart
    loss    = weighted_loss(losses.each, losses.weight, task.weighting)
    parts   = adamw(parts, grad(loss))                               this block's and the common ones, nothing else

To write a task of one's own: docs/new_task.md, examples/own_task.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from dblocks_jax.data.source import Data
from dblocks_jax.diffusion.loss import Weighting
from dblocks_jax.models.blueprint import Blueprint, Params


class Draws(NamedTuple):
    """The random keys of one step of one block."""

    level: Key[Array, ""]
    noise: Key[Array, ""]
    condition: Key[Array, ""]  # what is dropped of it, for guidance
    network: Key[Array, ""]  # dropout


class Losses(NamedTuple):
    """What a batch costs: never a mean."""

    each: Float[Array, " b"]
    weight: Float[Array, " b"] | None  # w(level), as the paper has it; None where there is none
    watched: dict[str, Float[Array, " b"]]  # figures to be logged, by name


@runtime_checkable
class Corruption(Protocol):
    """How a target is hidden, and which part of that is whose. Block 0 has the most corrupted."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def shares(self) -> Sequence[Any]:
        """What each block trains on: pytrees of numpy scalars, all alike."""
        ...

    def draw(self, key: Key[Array, ""], count: int, share: Any) -> Float[Array, " count"]:
        """Levels of one share, on the device."""
        ...

    def owners(self, levels: Float[np.ndarray, " n"]) -> list[int]:
        """The block of each level: the one answer, for training, evaluation and samplers."""
        ...

    def describe(self, block: int) -> str:
        """A block's own share in words."""
        ...


# (parameters by part, data, split, what is called at each batch and may end it) -> figures by name
Scorer = Callable[[dict[str, Params], Data, str, Callable[[], None]], dict[str, Any]]


@dataclass(frozen=True)
class MainScore:
    """The figure that chooses a checkpoint."""

    name: str
    more_is_better: bool


@runtime_checkable
class Task(Protocol):
    """One of the paper's experiments, for given data and sizes. A plain network has one part and no corruption.

    A task that inherits from this need not write what has a body here.
    """

    @property
    def corruption(self) -> Any:
        """A `Corruption`, or None."""
        ...

    @property
    def weighting(self) -> Weighting:
        """How the losses' weights count: see `weighted_loss`."""
        return "per_sample"

    def modules(self, key: Key[Array, ""]) -> dict[str, Any]:
        """A fresh model by part: see `Blueprint`."""
        ...

    def prepare(self, key: Key[Array, ""], batch: Any) -> Any:
        """What becomes of a batch on the device before anything is learned from it."""
        return batch

    def batch_shapes(self, count: int) -> Any:
        """The shapes of a batch of so many examples; only `--mode=memory` asks."""
        ...

    def losses(self, modules: tuple[Any, ...], example: Any, level: Array | None, draws: Draws) -> Losses:
        """What one block's modules make of an example at these levels. `draws.level` is spent."""
        ...

    def scorer(self, blueprint: Blueprint, mesh: Mesh) -> Scorer | None:
        """How a model is judged while it trains and at the end; the main score is among the figures.

        None: by its own loss on held-out examples, see `dblocks_jax/training/heldout.py`.
        """
        return None

    def tell(self, scores: dict[str, Any]) -> str:
        """A line of the log about scores."""
        return ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if isinstance(value, float))


def nothing(*_: Any) -> None:
    """What a task says that has nothing to say."""


def num_blocks_field(config: ConfigDict) -> int:
    """The field `num_blocks`."""
    return config.num_blocks


def in_words(config: ConfigDict) -> str:
    """How many blocks there are."""
    return "one block" if config.num_blocks == 1 else f"DiffusionBlocks, {config.num_blocks} blocks"


def as_one_block(config: ConfigDict) -> ConfigDict:
    """The same layers, trained end to end."""
    other = ConfigDict(config.to_dict())
    other.update(num_blocks=1, block_parallel=False, train_blocks=(), sharing="shared", idle_blocks="device")
    other.update(grow_at=(), begin_from="")
    return other


@dataclass(frozen=True)
class Entry:
    """What can be said of a task by its config alone. What has a default need not be said."""

    name: str  # of the task
    find_data: Callable[..., Any]  # Data: (config), and, of what is prepared at its first use, (*, may_prepare)
    make: Callable[[ConfigDict, Any], Task]  # (config, card)
    main_score: MainScore = MainScore("loss", more_is_better=False)
    check: Callable[[ConfigDict], None] = nothing  # refuses fields that cannot work, before anything is read
    num_blocks: Callable[[ConfigDict], int] = num_blocks_field  # 1 for a plain network
    card: Callable[[dict[str, Any]], Any] = nothing  # of the data, from what a run has saved of them
    card_without_data: Callable[[ConfigDict], Any] = nothing  # as far as it is known without reading them
    describe: Callable[[ConfigDict], str] = in_words  # the model in words
    plain: Callable[[ConfigDict], ConfigDict] = as_one_block  # the plain network to compare with
    warn: Callable[[ConfigDict, ConfigDict], None] = nothing  # (as it was trained, as it is used): what does not fit
    sampler_fields: tuple[str, ...] = ()  # that only answering reads: a trained model may be used with others

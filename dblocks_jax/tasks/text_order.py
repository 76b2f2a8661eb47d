"""What tasks have in common that tell tokens in order: their fields, the losses of tokens, and bits."""

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from dblocks_jax.diffusion.loss import cross_entropy
from dblocks_jax.models.blueprint import Blueprint, Params
from dblocks_jax.models.chunks import over_tokens
from dblocks_jax.run.checks import check_fields
from dblocks_jax.run.devices import to_device
from dblocks_jax.run.errors import UserError
from dblocks_jax.tasks import text
from dblocks_jax.tasks.task import Losses, Scorer
from dblocks_jax.tasks.text import TextCard, scored_batches

TYPES = {int: ("score_samples",), float: ("temperature", "top_p")}
CHOICES = {"dataset": text.NAMES, "weighting": ("none", "per_sample")}
POSITIVE = ("top_p",)
NOT_NEGATIVE = ("score_samples", "temperature")
LARGEST = {"score_samples": 10_000, "top_p": 1}
# Of these fields, those that only the writer and the scores read.
SAMPLER_FIELDS = ("temperature", "top_p", "score_samples")

# (parameters of the first block, tokens [b, t], number of each sequence [b]) -> logits of tokens 1 .. t - 1
LogitsOf = Callable[..., Float[Array, "b n v"]]


@runtime_checkable
class InOrder(Protocol):
    """What such a task answers besides the trainer's questions."""

    @property
    def config(self) -> ConfigDict: ...
    @property
    def card(self) -> TextCard: ...
    @property
    def is_plain(self) -> bool: ...

    def logits_of(self, blueprint: Blueprint) -> LogitsOf:
        """Build the logits of every token but the first, each given those before it."""
        ...

    def writer(self, blueprint: Blueprint) -> Callable[..., Any]:
        """Build what continues texts: a `Writer`, see `dblocks_jax/tasks/text_writing.py`."""
        ...

    def written_at_once(self) -> int:
        """Texts that are written side by side."""
        ...


def check_order_fields(config: ConfigDict) -> None:
    """Refuse values that mean nothing, whatever the model.

    Raises:
      UserError: naming the field.
    """
    text.check_text_fields(config)
    check_fields(config, types=TYPES, choices=CHOICES, positive=POSITIVE, not_negative=NOT_NEGATIVE, largest=LARGEST)
    text.check_rotary(config)
    if config.text_length < 2:
        raise UserError("text_length must be at least 2: there is no next token in one")


def losses_of_tokens(
    read: Callable[..., Float[Array, "b t v"]], tokens: Int[Array, "b t"], vocab_size: int, *features: Array
) -> tuple[Float[Array, "b t"], Bool[Array, "b t"]]:
    """(cross-entropy, whether the likeliest token is the right one) of the logits read(*features).

    Logits of a large vocabulary are larger than all else, and exist for some tokens at a time.
    """

    def judge(tokens, *features):
        logits = read(*features)
        return cross_entropy(logits, tokens), jnp.argmax(logits, axis=-1) == tokens

    return over_tokens(judge, len(tokens) * vocab_size * 4, tokens, *features)


def losses_of_samples(
    ce: Float[Array, "b t"], correct: Bool[Array, "b t"], weight: Float[Array, " b"] | None
) -> Losses:
    """The mean of each sample, in nats."""
    each = jnp.mean(ce, axis=1)
    return Losses(each, weight, {"ce": each, "accuracy": jnp.mean(correct, axis=1)})


def losses_of_following(
    read: Callable[..., Float[Array, "b t v"]],
    tokens: Int[Array, "b t"],
    vocab_size: int,
    weight: Float[Array, " b"] | None,
    *features: Array,
) -> Losses:
    """Where the logits read(*features) at i are of token i + 1: of every token but the first."""
    ce, correct = losses_of_tokens(read, jnp.roll(tokens, -1, axis=1), vocab_size, *features)
    return losses_of_samples(ce[:, :-1], correct[:, :-1], weight)


def make_score(
    task: InOrder, blueprint: Blueprint
) -> Callable[[dict[str, Params], Any, Callable[[], None]], dict[str, Any]]:
    """Build (parameters by part, split, what to call at each batch) -> {"bits", "num_sequences"}.

    The bits of a character, exactly: each token given those before it. The first token of a sequence is left out:
    nothing is before it.
    """
    card, logits_of = task.card, task.logits_of(blueprint)

    @jax.jit
    def costs_of(together, tokens: Array, positions: Int[Array, " b"]) -> Float[Array, " b"]:
        tokens = tokens.astype(jnp.int32)
        return cross_entropy(logits_of(together, tokens, positions), tokens[:, 1:]).sum(axis=1)

    def run(params: dict[str, Params], source: Any, at_each_batch: Callable[[], None]) -> dict[str, Any]:
        count = len(source)
        together = tuple(to_device(params[name]) for name in blueprint.names(0))
        nats, characters = [], 0
        for places, real in scored_batches(task.config, card, count):
            at_each_batch()
            tokens = source.take(places)["tokens"]
            characters += card.vocabulary.count_characters(tokens[:real, 1:].ravel())
            nats.append((real, costs_of(together, tokens, places.astype(np.int32))))
        total = sum(np.sum(np.asarray(costs, np.float64)[:real]) for real, costs in nats)
        return {"num_sequences": count, "bits": float(total / characters / math.log(2))}

    return run


def make_scorer(task: InOrder, blueprint: Blueprint) -> Scorer:
    """Build the scorer of a task: the bits of a character of held-out text."""
    score = make_score(task, blueprint)

    def run(params: dict[str, Params], data: Any, split: str, at_each_batch: Callable[[], None]) -> dict[str, Any]:
        found = score(params, data.split(split), at_each_batch)
        return found if math.isfinite(found["bits"]) else found | {"diverged": True}

    return run

"""What tasks on text have in common: their data, and the windows that they see of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, Integer, Key
from ml_collections import ConfigDict

from dblocks_jax.data.text import NAMES, Text, find_text
from dblocks_jax.data.vocabulary import Vocabulary, letters
from dblocks_jax.run.checks import check_fields
from dblocks_jax.run.errors import UserError, naming_malformed

__all__ = [
    "NAMES", "TextCard", "card_without_data", "check_rotary", "check_text_fields", "crop", "find_data", "find_text",
    "unit",
]  # fmt: skip

TYPES = {int: ("text_length", "vocab_size"), float: ("val_fraction",), str: ("dataset", "data_dir", "vocabulary")}
CHOICES = {"vocabulary": ("letters", "characters", "bpe")}
POSITIVE = ("text_length", "vocab_size")
LOGITS_BYTES = 2**29
LARGEST = {"text_length": 2**16, "vocab_size": 2**17}


@dataclass(frozen=True)
class TextCard:
    """What a model knows of its text: the symbols, and how many it sees at a time."""

    vocabulary: Vocabulary
    length: int

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> "TextCard":
        """The card among what a run has saved of its data.

        Raises:
          UserError: a field is missing, or is none of a card.
        """
        with naming_malformed("what is saved of the data"):
            vocabulary, length = Vocabulary.of(saved["vocabulary"]), saved["length"]
            if type(length) is not int or not 0 < length <= LARGEST["text_length"]:
                raise ValueError("its length is no number of symbols")
        return cls(vocabulary, length)

    def to_dict(self) -> dict[str, Any]:
        """The fields, as they are saved."""
        return {"vocabulary": self.vocabulary.to_dict(), "length": self.length}


def unit(card: Any) -> str:
    """What bits are counted for: a character of text, whatever the symbols; a dimension of an image."""
    return "character" if isinstance(card.vocabulary, Vocabulary) else "dimension"


def check_text_fields(config: ConfigDict) -> None:
    """Refuse values that mean nothing, whatever the model.

    Raises:
      UserError: naming the field.
    """
    check_fields(config, types=TYPES, choices=CHOICES, positive=POSITIVE, largest=LARGEST)
    if not 0 <= config.val_fraction <= 0.5:
        raise UserError(f"val_fraction must lie in [0, 0.5], not {config.val_fraction}")


def check_rotary(config: ConfigDict) -> None:
    """Refuse heads that cannot be rotated.

    Raises:
      UserError: naming the fields.
    """
    if config.hidden_size // config.num_heads % 2:
        raise UserError(
            f"hidden_size={config.hidden_size} gives {config.num_heads} heads an odd width, which rotary positions "
            "cannot turn: raise or lower one of them"
        )


def find_data(config: ConfigDict, *, may_prepare: bool = True) -> Text:
    """The text; nothing of it is ever prepared on disk."""
    del may_prepare
    return find_text(config)


def card_without_data(config: ConfigDict) -> TextCard:
    """What a model must know of the text; only the 27 letters are known without reading it."""
    if config.vocabulary == "letters":
        return TextCard(letters(), config.text_length)
    text = find_text(config)
    return TextCard(text.vocabulary, text.length)


def crop(key: Key[Array, ""], tokens: Integer[Array, "b m"], length: int) -> Int[Array, "b {length}"]:
    """A window of `length` of each row's m tokens, at any place alike; the row itself where it is as long."""
    starts = jax.random.randint(key, tokens.shape[:1], 0, tokens.shape[1] - length + 1)
    cut = partial(jax.lax.dynamic_slice_in_dim, slice_size=length)
    return jax.vmap(cut)(tokens, starts).astype("int32")


def scored_at_once(config: ConfigDict, length: int, symbols: int) -> int:
    """Sequences of a batch that is scored: `eval_batch_size`, or as many as have LOGITS_BYTES of logits."""
    return max(1, min(config.eval_batch_size, LOGITS_BYTES // (4 * length * symbols)))


def scored_batches(config: ConfigDict, card: TextCard, count: int) -> Iterator[tuple[Int[np.ndarray, " m"], int]]:
    """(places of a batch, how many of them are new) of `count` sequences. All batches have one shape."""
    size = min(scored_at_once(config, card.length, len(card.vocabulary)), count)
    for start in range(0, count, size):
        yield np.arange(start, start + size) % count, min(size, count - start)


def weights_of_transformer(config: ConfigDict) -> int:
    """About how many parameters a transformer on symbols has: layers, embedding and head."""
    width = config.hidden_size
    of_layer = 4 * width**2 + 2 * width * config.intermediate_size
    symbols = config.vocab_size if config.vocabulary == "bpe" else 256
    return config.num_layers * of_layer + 2 * symbols * width

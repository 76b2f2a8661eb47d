"""Text as tokens: training takes windows at every offset, scoring takes each token once."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import numpy as np
from jaxtyping import Int, Integer
from ml_collections import ConfigDict

from dblocks_jax.data.corpora import Parts, file_parts, sotu_parts, text8_parts
from dblocks_jax.data.vocabulary import KINDS, Vocabulary, characters_of, letters, train_bpe
from dblocks_jax.run.arrays import checksum
from dblocks_jax.run.errors import UserError

NAMES = ("sotu", "text8", "text_file")


@dataclass(frozen=True)
class TextSource:
    """Windows of one part of a text, `stride` tokens apart. The tokens exist once; `take` copies what it is asked for.

    For training a window has 2 * length - 1 tokens and the stride is the length: `length` tokens of it, from a place
    drawn at random among its first `length`, begin anywhere in the text with equal probability, but for fewer than
    `length` places at its end. An epoch is one pass. For scoring windows of `length` tokens lie end to end.
    """

    tokens: Integer[np.ndarray, " n"] = field(repr=False)
    window: int
    stride: int
    units: int  # characters of text, in what all windows together cover: bits per character are bits over this

    def __len__(self) -> int:
        return count_windows(len(self.tokens), self.window, self.stride)

    def take(self, indices: Int[np.ndarray, " b"]) -> dict[str, Integer[np.ndarray, "b window"]]:
        """{"tokens": [b, window]}, of the smallest type that holds the vocabulary."""
        windows = np.lib.stride_tricks.sliding_window_view(self.tokens, self.window)[:: self.stride]
        return {"tokens": windows[indices]}


def count_windows(num_tokens: int, window: int, stride: int) -> int:
    """How many fit; what is left at the end belongs to none."""
    return max(0, (num_tokens - window) // stride + 1)


@dataclass(frozen=True)
class Text:
    """A text in tokens: its splits, and the number of tokens that a model sees at once."""

    name: str
    vocabulary: Vocabulary
    length: int
    splits: Mapping[str, TextSource] = field(repr=False)

    def split(self, which: str) -> TextSource | None:
        """None where there is no "val"."""
        return self.splits.get(which)

    def to_dict(self) -> dict[str, Any]:
        """The vocabulary, the length, and a checksum of the training tokens."""
        crc32 = checksum(self.splits["train"].tokens)
        return {"vocabulary": self.vocabulary.to_dict(), "length": self.length, "crc32": crc32}

    def check_same(self, saved: dict[str, Any], where: str) -> None:
        """Refuse another vocabulary, length or training text than those of a run.

        Raises:
          UserError: naming what differs.
        """
        was = Vocabulary.of(saved.get("vocabulary"))
        if was != self.vocabulary:
            raise UserError(
                f"{where} was trained on {was.describe()}, but {self.name} has {self.vocabulary.describe()} now"
                f"{_difference(was, self.vocabulary)}: restore the text, or use another --workdir"
            )
        if saved.get("length") != self.length:
            raise UserError(f"{where} was trained on text of another text_length than {self.length}: set it as it was")
        if saved.get("crc32") != self.to_dict()["crc32"]:
            raise UserError(
                f"{where} was trained on another text than that of {self.name} which is here now: restore it, or use "
                "another --workdir"
            )

    def describe(self) -> str:
        """The vocabulary, and how much a model sees."""
        return f"text of {self.vocabulary.describe()}, {self.length} at a time"


def _difference(was: Vocabulary, now: Vocabulary) -> str:
    if len(was) != len(now) or was.kind != now.kind:
        return ""
    differ = next((pair for pair in zip(was.symbols, now.symbols, strict=True) if pair[0] != pair[1]), None)
    return f", {differ[1]!r} in the place of {differ[0]!r}" if differ else ", joined otherwise"


def find_text(config: ConfigDict) -> Text:
    """The text of a config in tokens.

    `dataset` is "sotu" (addresses of presidents, nothing to download), "text8" (with text8 or text8.zip in
    `data_dir`) or "text_file" (`data_dir` is a file, or a folder of .txt files). The first two have a validation split
    of their own, so `val_fraction` is 0; of a user's text it is the part set apart, see `file_parts`. The vocabulary
    is that of the training part: for "characters" those that are there, for "bpe" `vocab_size` pieces.

    Raises:
      UserError: the text cannot be had, or does not go with the other fields.
    """
    text, name = _read_parts(config), config.dataset
    vocabulary = _make_vocabulary(config, text.train)
    length = config.text_length
    shapes = {"train": (2 * length - 1, length), "val": (length, length), "test": (length, length)}
    splits = {
        which: _make_source(f"the {which} part of {name}", vocabulary, part, window, stride)
        for (which, (window, stride)), part in zip(shapes.items(), text, strict=True)
        if part is not None
    }
    return Text(name, vocabulary, length, splits)


def _read_parts(config: ConfigDict) -> Parts:
    name = config.dataset
    if name not in NAMES:
        close = get_close_matches(name, NAMES, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"there is no text {name!r}: {hint}Known are {', '.join(NAMES)}")
    if not 0 <= config.val_fraction <= 0.5:
        raise UserError(f"val_fraction must lie in [0, 0.5], not {config.val_fraction}")
    if name == "text_file":
        return file_parts(config.data_dir, config.val_fraction)
    if config.val_fraction:
        raise UserError(f"val_fraction must be 0, not {config.val_fraction}: {name} has a validation split of its own")
    return sotu_parts() if name == "sotu" else text8_parts(config.data_dir)


def _make_vocabulary(config: ConfigDict, training_text: str) -> Vocabulary:
    if config.vocabulary not in KINDS:
        raise UserError(f"vocabulary is {config.vocabulary!r}; choose one of {', '.join(KINDS)}")
    if config.vocabulary == "letters":
        return letters()
    if config.vocabulary == "characters":
        return characters_of(training_text)
    return train_bpe(training_text, config.vocab_size)


def _make_source(what: str, vocabulary: Vocabulary, text: str, window: int, stride: int) -> TextSource:
    tokens = vocabulary.encode_all(text)
    count = count_windows(len(tokens), window, stride)
    if not count:
        fitting = len(tokens) if window == stride else (len(tokens) + 1) // 2
        raise UserError(
            f"text_length={stride} does not fit {what}, which has {len(tokens):,} tokens: "
            + (f"set it to {fitting} or less" if fitting else "take a longer text")
        )
    covered = (count - 1) * stride + window
    return TextSource(tokens, window, stride, vocabulary.count_characters(tokens[:covered]))

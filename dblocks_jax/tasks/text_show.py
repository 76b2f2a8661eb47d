"""What tasks on text show of their data, and of what they wrote."""

from typing import Any

import numpy as np
from jaxtyping import Integer

from dblocks_jax.data.text import Text, TextSource
from dblocks_jax.data.vocabulary import Vocabulary
from dblocks_jax.pages.figures import Figure
from dblocks_jax.pages.findings import DataShown, held_out_curves
from dblocks_jax.run.naming import shown

FIGURES_OF_TEXTS = (
    Figure("distinct_2", "distinct pairs of words", is_share=True, has_spread=True),
    Figure("repetition", "repeated words", is_share=True, has_spread=True),
    Figure("known_words", "words that exist", is_share=True, has_spread=True),
)
ABOUT_TEXTS = (
    "Of texts that were made: how many of their pairs of words are different, how much is said again in the same text, "
    "and how many words the training text has too; the data's own stand in the results."
)
BEGINNING = 600  # tokens of the training text
MOST_SYMBOLS = 200


def text_shown(text: Text) -> DataShown:
    """The vocabulary, how much text each split has, and how the training text begins."""
    vocabulary = text.vocabulary
    found = {name: split for name in ("train", "val", "test") if (split := text.split(name)) is not None}
    splits = {name: amounts(split, vocabulary) for name, split in found.items()}
    return DataShown(
        about=f"Text in tokens of {vocabulary.describe()}, {text.length} of them at a time: {symbols(vocabulary)}",
        splits=splits,
        result={"tokens": {name: of["tokens"] for name, of in splits.items()}, "vocabulary": len(vocabulary)},
        pictures={},
        kinds_left=0,
        beginning=beginning(found["train"].tokens, vocabulary),
    )


def curve_of_bits(lines: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """(steps, bits there) of a log: on the validation split, or without one on the test split."""
    return next(iter(held_out_curves(lines, "bits").values()), ([], []))


def amounts(split: TextSource, vocabulary: Vocabulary) -> dict[str, int]:
    """How long a part of a text is."""
    tokens = split.tokens
    return {"tokens": len(tokens), "characters": vocabulary.count_characters(tokens), "stretches": len(split)}


def symbols(vocabulary: Vocabulary) -> str:
    """What its tokens stand for, as far as there is room."""
    named = " ".join(repr(each)[1:-1] if each.strip() else repr(each) for each in vocabulary.symbols[:MOST_SYMBOLS])
    left = len(vocabulary) - MOST_SYMBOLS
    return named + (f" and {left:,} more" if left > 0 else "")


def beginning(tokens: Integer[np.ndarray, " n"], vocabulary: Vocabulary) -> str:
    """The first lines of a text, as its tokens have it."""
    lines = vocabulary.decode(tokens[:BEGINNING]).splitlines()
    return "\n".join(map(shown, lines)) + (" ..." if len(tokens) > BEGINNING else "")

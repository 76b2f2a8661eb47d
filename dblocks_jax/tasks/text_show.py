"""What tasks on text show of their data."""

import numpy as np
from jaxtyping import Integer

from dblocks_jax.data.text import Text, TextSource
from dblocks_jax.data.vocabulary import Vocabulary
from dblocks_jax.pages.findings import DataShown
from dblocks_jax.run.naming import shown

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

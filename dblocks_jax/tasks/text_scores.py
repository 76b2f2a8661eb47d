"""What texts that a model made are like, beside the data: whether they vary, loop, and use words that exist."""

from collections import Counter
from collections.abc import Callable, Sequence, Set
from itertools import chain
from typing import Any

import numpy as np
from jaxtyping import Integer

# Figures of the texts, each with a "_data" beside it: (figure, in words).
OF_TEXTS = (
    ("distinct_2", "pairs of words that are different"),
    ("repetition", "runs of four words that were there before in the same text"),
    ("known_words", "words that the training text has too"),
)
AT_ONCE = 1 << 20  # tokens that are decoded at once
LOOP = 4  # words in a row which, said twice in a text, count as repeated


def rows_about_texts(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of `text_scores`, as far as there are some, for a page: in words, of what was made, of the data."""
    return [
        {"words": words, "made": found[name], "data": found[f"{name}_data"]}
        for name, words in OF_TEXTS
        if name in found
    ]


def text_scores(made: Sequence[str], real: Sequence[str], known: Set[str]) -> dict[str, Any]:
    """Figures of `made`, each with "_data" behind it for as many `real` texts. `known` are the words of the data."""
    found = {}
    for suffix, texts in (("", made), ("_data", real[: len(made)])):
        found[f"distinct_2{suffix}"] = distinct_share(texts, 2)
        found[f"repetition{suffix}"] = repeated_share(texts, LOOP)
        found[f"known_words{suffix}"] = known_share(texts, known)
    return found


def known_words(tokens: Integer[np.ndarray, " n"], decode: Callable[[Any], str]) -> set[str]:
    """The words of a text in tokens, which is decoded some at a time: words alone are few."""
    words, cut = set(), ""
    for start in range(0, len(tokens), AT_ONCE):
        *whole, cut = (cut + decode(tokens[start : start + AT_ONCE])).split(" ")
        words.update(" ".join(whole).split())
    return words | set(cut.split())


def runs(text: str, length: int) -> list[tuple[str, ...]]:
    """All sequences of so many words in a row. Words at the edges may be cut, and are left out."""
    words = text.split()[1:-1]
    return list(zip(*(words[i:] for i in range(length)), strict=False))


def distinct_share(texts: Sequence[str], length: int) -> float:
    """distinct-n: how many different runs there are, over how many there are in all texts together."""
    found = list(chain.from_iterable(runs(text, length) for text in texts))
    return len(set(found)) / max(1, len(found))


def repeated_share(texts: Sequence[str], length: int) -> float:
    """The share of runs that were there before in the same text: 0 without loops, near 1 for a text that is one."""
    repeated = total = 0
    for text in texts:
        counts = Counter(runs(text, length))
        total += counts.total()
        repeated += counts.total() - len(counts)
    return repeated / max(1, total)


def known_share(texts: Sequence[str], known: Set[str]) -> float:
    """The share of words that the data have too."""
    found = [word for text in texts for word in text.split()[1:-1]]
    return sum(word in known for word in found) / max(1, len(found))

"""Texts from a masked model: blanks as a user writes them, and what they become step by step."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from dblocks_jax.run.errors import UserError
from dblocks_jax.run.naming import shown
from dblocks_jax.tasks.text import TextCard

BLANK = "_"


class Template(NamedTuple):
    """A text of which some symbols are hidden. Beyond the `given` ones everything is."""

    tokens: Int[np.ndarray, " t"]
    is_hidden: Bool[np.ndarray, " t"]
    given: int  # symbols that the user wrote, blanks among them


def all_hidden(card: TextCard) -> Template:
    """Nothing is given."""
    return Template(np.zeros(card.length, np.int32), np.ones(card.length, bool), card.length)


def read_template(text: str, card: TextCard) -> Template:
    """A text in which each BLANK is a symbol to be found.

    Raises:
      UserError: it holds what the vocabulary lacks, is longer than the model sees, empty, or without a blank.
    """
    if BLANK not in text:
        raise UserError(f"the text {shown(text)!r} has nothing to fill in: write {BLANK} for each missing symbol")
    tokens, is_hidden = [], []
    for index, piece in enumerate(text.split(BLANK)):
        if index:
            tokens.append(0)
            is_hidden.append(True)
        seen = card.vocabulary.encode(piece).tolist() if piece else []
        tokens += seen
        is_hidden += [False] * len(seen)
    given = len(tokens)
    if given > card.length:
        raise UserError(f"the text has {given} symbols, of which the model sees {card.length}: shorten it")
    rest = card.length - given
    return Template(np.array(tokens + [0] * rest, np.int32), np.array(is_hidden + [True] * rest), given)


def show(tokens: Int[np.ndarray, " t"], is_hidden: Bool[np.ndarray, " t"], card: TextCard) -> str:
    """A text of which some is hidden, on one line."""
    if not is_hidden.any():
        return shown(card.vocabulary.decode(tokens))
    pieces = (
        BLANK if hidden else card.vocabulary.decode(token[None])
        for token, hidden in zip(tokens, is_hidden, strict=True)
    )
    return shown("".join(pieces))

"""Texts from a masked model: blanks as a user writes them, and what they become step by step."""

from collections.abc import Iterable, Iterator, Set
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from dblocks_jax.data.pixels import PixelCard
from dblocks_jax.run.errors import UserError
from dblocks_jax.run.naming import shown
from dblocks_jax.tasks.text import TextCard

BLANK = "_"


class Template(NamedTuple):
    """A text of which some symbols are hidden. Beyond the `given` ones everything is."""

    tokens: Int[np.ndarray, " t"]
    is_hidden: Bool[np.ndarray, " t"]
    given: int  # symbols that the user wrote, blanks among them


class Stage(NamedTuple):
    """Texts on their way."""

    block: int  # that uncovered what was uncovered last
    tokens: Int[np.ndarray, "b t"]
    is_hidden: Bool[np.ndarray, "b t"]


def all_hidden(card: TextCard | PixelCard) -> Template:
    """Nothing is given."""
    return Template(np.zeros(card.length, np.int32), np.ones(card.length, bool), card.length)


def read_template(text: str, card: TextCard) -> Template:
    """A text in which each BLANK is a symbol to be found.

    Raises:
      UserError: it is without a blank, or none that `read_text` takes.
    """
    if BLANK not in text:
        raise UserError(f"the text {shown(text)!r} has nothing to fill in: write {BLANK} for each missing symbol")
    return read_text(text, card)


def read_text(text: str, card: TextCard) -> Template:
    """A text in which BLANKs, if there are any, are symbols to be found.

    Raises:
      UserError: it holds what the vocabulary lacks, is longer than the model sees, or empty.
    """
    tokens, is_hidden = [], []
    for index, piece in enumerate(text.split(BLANK)):
        if index:
            tokens.append(0)
            is_hidden.append(True)
        seen = card.vocabulary.encode(piece).tolist() if piece else []
        tokens += seen
        is_hidden += [False] * len(seen)
    given = len(tokens)
    if not given:
        raise UserError("the text is empty: write some")
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


def kept_steps(steps: Iterable[tuple[int, Any, Any]], kept: Set[int]) -> Iterator[tuple[int, Any, Any]]:
    """Of a sampler's steps those of these numbers, and each block's last one: what the next one found."""
    before = None
    for number, step in enumerate(steps):
        if before is not None and (number - 1 in kept or step[0] != before[0]):
            yield before
        before = step
    if before is not None:
        yield before


def uncovered_by(stages: Iterable[Stage]) -> list[Int[np.ndarray, "b t"]]:
    """Which block uncovered each token, at each of `kept_steps`; -1 where it is hidden still."""
    found: list[Int[np.ndarray, "b t"]] = []
    for stage in stages:
        owners = found[-1].copy() if found else np.full(stage.tokens.shape, -1)
        owners[~stage.is_hidden & (owners == -1)] = stage.block
        found.append(owners)
    return found

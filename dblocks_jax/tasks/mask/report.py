"""What a person wants to see of a trained masked model: bits by block, and texts or images being uncovered."""

import math
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from dblocks_jax.data.vocabulary import Vocabulary
from dblocks_jax.pages import charts
from dblocks_jax.pages.findings import Findings, block_curves, held_out_picture
from dblocks_jax.pages.pictures import data_uri
from dblocks_jax.tasks.mask.task import Mask
from dblocks_jax.tasks.mask.writing import BLANK, Stage, uncovered_by
from dblocks_jax.tasks.text import TextCard, unit
from dblocks_jax.tasks.text_scores import rows_about_texts

TEXTS, IMAGES = 6, 60  # that are shown of those that were made


class Made(NamedTuple):
    """What was made and scored."""

    stages: list[Stage]  # of the first text
    texts: list[str]
    images: UInt8[np.ndarray, "n h w c"] | None


class Piece(NamedTuple):
    """Neighbouring tokens that one block uncovered; -1 where they are hidden still."""

    block: int
    text: str


def look(task: Mask, found: dict[str, Any], made: Made | None, lines: list[dict[str, Any]]) -> Findings:
    """Choose what is shown of a masked model. `found` are its scores, `made` what it made, if anything.

    `lines` are those of its log.
    """
    made = Made([], [], None) if made is None else made
    vocabulary: Any = task.card.vocabulary
    values = {
        "unit": unit(task.card),
        "is_text": isinstance(task.card, TextCard),
        "tints": charts.tints(task.config.num_blocks),
        "stages": [
            {"block": stage.block, "pieces": pieces(stage.tokens[0], owners[0], vocabulary)}
            for stage, owners in zip(made.stages, uncovered_by(made.stages), strict=True)
        ],
        "texts": made.texts[:TEXTS],
        "samples": [] if made.images is None else [data_uri(image) for image in made.images[:IMAGES]],
        "guessing": math.log2(len(vocabulary)),
        "of_texts": rows_about_texts(found),
    }
    return Findings(found, values, draw(lines, task), {})


def pieces(tokens: Int[np.ndarray, " t"], owners: Int[np.ndarray, " t"], vocabulary: Vocabulary) -> list[Piece]:
    """A text, cut where another block has uncovered it."""
    found = []
    for owner, places in groupby(range(len(tokens)), key=lambda place: int(owners[place])):
        mine = tokens[list(places)]
        found.append(Piece(owner, BLANK * len(mine) if owner == -1 else vocabulary.decode(mine)))
    return found


def draw(lines: list[dict[str, Any]], task: Mask) -> dict[str, str]:
    """Curves over the training steps."""
    drawn, ylabel = {}, f"bits per {unit(task.card)}"
    if any("blocks" in line for line in lines):
        drawn["bits"] = block_curves(lines, "bits", "bits per symbol on training batches", task.config.num_blocks)
    return drawn | held_out_picture(lines, "bits", f"{ylabel}, kept apart")

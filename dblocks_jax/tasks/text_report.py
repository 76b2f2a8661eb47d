"""What a person wants to see of a trained decoder: bits, and how it goes on from beginnings of held-out texts."""

import math
from typing import Any

from dblocks_jax.pages.findings import Findings, block_curves, held_out_picture
from dblocks_jax.tasks.text_order import InOrder
from dblocks_jax.tasks.text_scores import rows_about_texts

TEXTS = 6  # that are shown


def look(task: InOrder, found: dict[str, Any], written: list[tuple[str, str]], lines: list[dict[str, Any]]) -> Findings:
    """Choose what is shown of a decoder. `found` are its scores, `written` beginnings and what it wrote after them.

    `lines` are those of its log.
    """
    values = {
        "texts": written[:TEXTS],
        "guessing": math.log2(len(task.card.vocabulary)),
        "of_texts": rows_about_texts(found),
    }
    return Findings(found, values, draw(lines, task), {})


def draw(lines: list[dict[str, Any]], task: InOrder) -> dict[str, str]:
    """Curves over the training steps."""
    drawn = {}
    if any("blocks" in line for line in lines):
        num_blocks = None if task.is_plain else task.config.num_blocks
        drawn["ce"] = block_curves(lines, "ce", "cross-entropy on training batches", num_blocks)
    return drawn | held_out_picture(lines, "bits", "bits per character, kept apart")

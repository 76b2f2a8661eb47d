"""A decoder to play with: a text that it goes on from, token by token, and what it took for likely at each."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dblocks_jax.models.blueprint import Blueprint, Params
from dblocks_jax.run.errors import NOT_FINITE, Diverged
from dblocks_jax.tasks.demo import LARGEST_NUMBER, Demo, Frame, Wanted, text_of, whole_number
from dblocks_jax.tasks.text import TextCard
from dblocks_jax.tasks.text_order import InOrder
from dblocks_jax.tasks.text_writing import least_prompt, read_prompt

LIKELIEST = 5  # tokens that are told
FIRST_LENGTH = 40  # tokens of the text when the page opens


def demo(task: InOrder, blueprint: Blueprint, params: dict[str, Params], test: Any) -> Demo:
    """A request is {"text", to go on from; "number", of the sample}: the text is that of `--mode=sample`.

    A frame has what is written so far, and the likeliest tokens at its last one, before temperature and nucleus.
    """
    card, vocabulary, write = task.card, task.card.vocabulary, task.writer(blueprint)

    def answer(wanted: Wanted) -> Iterator[Frame]:
        prompt = read_prompt(text_of(wanted, "text"), card, if_empty="write some")
        samples = np.array([whole_number(wanted, "number", 0, LARGEST_NUMBER)], np.int32)
        count, written = card.length - len(prompt), []
        for token, logits in write(params, jnp.asarray(prompt[None]), count, jnp.asarray(samples)):
            probabilities = np.asarray(jax.nn.softmax(logits[0]))
            if not np.isfinite(probabilities).all():
                raise Diverged(NOT_FINITE)
            written.append(int(token[0]))
            best = np.argsort(-probabilities, kind="stable")[:LIKELIEST]
            yield {
                "step": len(written), "of": count, "given": vocabulary.decode(prompt),
                "text": vocabulary.decode(np.array(written)), "symbol": vocabulary.decode(np.array(written[-1:])),
                "likeliest": [
                    {"label": vocabulary.decode(best[i : i + 1]), "probability": float(probabilities[each])}
                    for i, each in enumerate(best)
                ],
            }  # fmt: skip

    asked = {"text": first_text(card, test), "number": 0}
    return Demo("demo_decoder.html", {"length": card.length, "asked": asked}, [asked], answer)


def first_text(card: TextCard, test: Any) -> str:
    """What stands there when the page opens: how the test text begins, or without it what every text may begin with."""
    if test is not None:
        return card.vocabulary.decode(test.take(np.zeros(1, int))["tokens"][0, : min(FIRST_LENGTH, card.length // 2)])
    return least_prompt(card)

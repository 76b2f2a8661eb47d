"""A masked model to play with: a text with blanks, or pictures, uncovered step by step."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int, UInt8

from dblocks_jax.data.pixels import PixelCard
from dblocks_jax.models.blueprint import Blueprint, Params
from dblocks_jax.pages import charts
from dblocks_jax.pages.pictures import data_uri
from dblocks_jax.run.errors import NOT_FINITE, Diverged, UserError
from dblocks_jax.tasks.demo import LARGEST_NUMBER, Demo, Frame, Wanted, kept, text_of, whole_number
from dblocks_jax.tasks.generate.pictures import grid
from dblocks_jax.tasks.mask.report import pieces
from dblocks_jax.tasks.mask.sampler import make_sampler
from dblocks_jax.tasks.mask.task import Mask
from dblocks_jax.tasks.mask.writing import BLANK, all_hidden, read_text
from dblocks_jax.tasks.text import TextCard

GIVEN = -2  # whose a symbol is that the user wrote
FIRST_LENGTH, EACH = 60, 4  # of the text when the page opens: symbols, and of so many the last two are blanks
MOST_IMAGES = 16  # so many are always made, for one program
HIDDEN = (176, 190, 209)  # the colour of what is hidden in a picture


def demo(task: Mask, blueprint: Blueprint, params: dict[str, Params], test: Any) -> Demo:
    """Of text or of pictures, whichever the model was trained on."""
    make = of_pictures if isinstance(task.card, PixelCard) else of_text
    return make(task, blueprint, params, test)


def of_text(task: Mask, blueprint: Blueprint, params: dict[str, Params], test: Any) -> Demo:
    """A request is {"text", with a BLANK for each symbol to be found; "number", of the draw}.

    A frame has the whole text, cut where another block has uncovered it: what follows the given text is made, too.
    """
    card, config, sampler = task.card, task.config, make_sampler(task.config, blueprint)
    assert isinstance(card, TextCard)
    which = kept(config.num_inference_steps)

    def answer(wanted: Wanted) -> Iterator[Frame]:
        template = read_text(text_of(wanted, "text"), card)
        drawn = whole_number(wanted, "number", 0, LARGEST_NUMBER)
        if not template.is_hidden.any():
            raise UserError(f"the text has nothing to fill in: write {BLANK} for each missing symbol, or shorten it")
        owners = np.where(template.is_hidden, -1, GIVEN)
        chain = sampler(params, template.tokens[None], template.is_hidden[None], drawn)
        for i, (block, *state) in enumerate(chain):
            tokens, is_hidden = (each[0] for each in jax.device_get(state))
            if (tokens < 0).any():
                raise Diverged(NOT_FINITE)
            owners[~is_hidden & (owners == -1)] = block
            if i in which:
                text = [piece._asdict() for piece in pieces(tokens, owners, card.vocabulary)]
                yield {"step": i + 1, "of": config.num_inference_steps, "block": block, "pieces": text}

    asked = {"text": first_text(card, test), "number": 0}
    values = {"length": card.length, "asked": asked, "tints": charts.tints(config.num_blocks)}
    return Demo("demo_mask.html", values, [asked], answer)


def first_text(card: TextCard, test: Any) -> str:
    """What stands there when the page opens: how the test text begins, with blanks; or without it nothing but those."""
    length = min(FIRST_LENGTH, card.length)
    if test is None:
        return BLANK * length
    tokens = test.take(np.zeros(1, int))["tokens"][0, :length]
    symbols = [card.vocabulary.decode(tokens[i : i + 1]) for i in range(len(tokens))]
    return "".join(BLANK if i % EACH >= EACH - 2 else symbol for i, symbol in enumerate(symbols))


def of_pictures(task: Mask, blueprint: Blueprint, params: dict[str, Params], test: Any) -> Demo:
    """A request is {"number", of the draw}; a frame has MOST_IMAGES images, grey-blue where they are hidden."""
    del test
    card, config, sampler = task.card, task.config, make_sampler(task.config, blueprint)
    assert isinstance(card, PixelCard)
    which, shape = kept(config.num_inference_steps), (MOST_IMAGES, *card.images.image_shape)
    tokens, is_hidden = (np.broadcast_to(each, (MOST_IMAGES, card.length)) for each in all_hidden(card)[:2])

    def answer(wanted: Wanted) -> Iterator[Frame]:
        drawn = whole_number(wanted, "number", 0, LARGEST_NUMBER)
        for i, (block, *state) in enumerate(sampler(params, tokens, is_hidden, drawn)):
            found, is_left = jax.device_get(state)
            if (found < 0).any():
                raise Diverged(NOT_FINITE)
            if i in which:
                picture = data_uri(grid(colour(found.reshape(shape), is_left.reshape(shape))))
                yield {"step": i + 1, "of": config.num_inference_steps, "block": block, "picture": picture}

    values = {"asked": {"number": 0}, "tints": charts.tints(config.num_blocks)}
    return Demo("demo_pixels.html", values, [values["asked"]], answer)


def colour(levels: Int[np.ndarray, "n h w c"], is_hidden: Bool[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "n h w 3"]:
    """Grey levels as a picture in colour, HIDDEN where they are not known."""
    shape = (*levels.shape[:-1], 3)
    return np.where(np.broadcast_to(is_hidden, shape), HIDDEN, np.broadcast_to(levels, shape)).astype(np.uint8)

"""Texts of a trained masked model: made from nothing or around what is given, watched while they are, and scored."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from dblocks_jax.data.images import telling
from dblocks_jax.data.pixels import PixelCard
from dblocks_jax.modes.load import Trained, load_run, only
from dblocks_jax.modes.sample import FOLDER
from dblocks_jax.run.errors import NOT_FINITE, Diverged, UserError
from dblocks_jax.run.files import saving, write_whole
from dblocks_jax.tasks.generate.pictures import write_grid
from dblocks_jax.tasks.mask.report import Made
from dblocks_jax.tasks.mask.sampler import make_sampler
from dblocks_jax.tasks.mask.task import MASK
from dblocks_jax.tasks.mask.writing import Stage, Template, all_hidden, kept_steps, read_template, show
from dblocks_jax.tasks.text import TextCard
from dblocks_jax.tasks.text_scores import known_words, text_scores
from dblocks_jax.training.config import arithmetic

TEXTS, PICTURE = "samples.txt", "samples.png"
STAGES = 6  # of a text being uncovered that are shown
MOST_TEXTS = 10_000


class Scored(NamedTuple):
    """What came of scoring what was made: nothing but an empty `figures` where nothing is asked for."""

    figures: dict[str, Any]
    made: Made | None


def uncover(trained: Trained, template: Template, count: int) -> Iterator[list[Stage]]:
    """Batches of texts made around a template: of each batch stages, the last one the answer. Progress is told.

    A stage is what a block left to the next, and some between, so that each token's block is known.

    The same seed gives the same texts, in batches of one size.

    Raises:
      Diverged: the model's answers are not finite.
    """
    config = trained.config
    sampler = make_sampler(config, trained.blueprint)
    size = min(config.eval_batch_size, count)
    starts = list(range(0, count, size))
    kept = set(np.linspace(0, config.num_inference_steps - 1, STAGES).astype(int).tolist())
    for start in telling(starts, total=count, each=size, doing="making %s texts"):
        tokens, is_hidden = (np.broadcast_to(each, (size, len(each))) for each in template[:2])
        with arithmetic(config):
            steps = kept_steps(sampler(trained.params, tokens, is_hidden, start), kept)
            stages = [Stage(*jax.device_get(step)) for step in steps]
        if (stages[-1].tokens < 0).any():
            raise Diverged(NOT_FINITE)
        yield [Stage(owner, *(each[: count - start] for each in state)) for owner, *state in stages]


def sample_texts(
    config: ConfigDict, workdir: Path, *, text: str | None, count: int, overrides: dict[str, Any], checkpoint: str
) -> dict[str, Any]:
    """Make `count` texts and write them to <workdir>/FOLDER/TEXTS, a line each; of a model of pixels a grid to PICTURE.

    `text` may give some of the symbols: see `read_template`.

    Raises:
      UserError: there is no such run, the text does not fit, or the number is none.
      Unsaved: they cannot be written.
    """
    if not 1 <= count <= MOST_TEXTS:
        raise UserError(f"--count must lie in [1, {MOST_TEXTS:,}], not {count}")
    trained, _ = load_run(workdir, checkpoint=checkpoint, config=config, overrides=overrides)
    card = only(trained, workdir, MASK).card
    about = {"mode": "sample", "workdir": str(workdir), "checkpoint": trained.step, "seed": trained.config.seed}
    if isinstance(card, PixelCard):
        if text is not None:
            raise UserError(f"{workdir} was trained on images: it has no use for --text")
        images, path = make_images(trained, count), workdir / FOLDER / PICTURE
        with saving(path):
            path.parent.mkdir(exist_ok=True)
            write_grid(path, images)
        return about | {"num_images": count, "picture": str(path)}
    template = all_hidden(card) if text is None else read_template(text, card)
    batches = list(uncover(trained, template, count))
    for stage in batches[0]:
        print(f"block {stage.block}: {show(stage.tokens[0], stage.is_hidden[0], card)}")
    texts = texts_of(batches, template, card)
    save_texts(workdir / FOLDER / TEXTS, texts)
    return about | {"num_texts": count, "texts": texts[:STAGES], "file": str(workdir / FOLDER / TEXTS)}


def make_images(trained: Trained, count: int) -> np.ndarray:
    """uint8 [count, h, w, c]."""
    card = trained.card
    tokens = np.concatenate([stages[-1].tokens for stages in uncover(trained, all_hidden(card), count)])
    return tokens.astype(np.uint8).reshape(count, *card.images.image_shape)


def make_texts(trained: Trained, count: int, template: Template | None = None) -> list[str]:
    """Texts made from nothing or around a template, as much of them as it gives."""
    template = all_hidden(trained.card) if template is None else template
    batches = uncover(trained, template, count)
    return texts_of(batches, template, trained.card)


def texts_of(batches: Iterable[list[Stage]], template: Template, card: TextCard) -> list[str]:
    """What became of each text in the end."""
    return [card.vocabulary.decode(row[: template.given]) for stages in batches for row in stages[-1].tokens]


def save_texts(path: Path, texts: list[str]) -> None:
    """A line each; line breaks within are spaces."""
    with saving(path):
        path.parent.mkdir(exist_ok=True)
        write_whole(path, "".join(" ".join(text.splitlines()) + "\n" for text in texts).encode())


def make_and_score(trained: Trained, data: Any, workdir: Path) -> Scored:
    """Make `score_samples` texts and score them beside held-out ones; write TEXTS, or of a model of pixels PICTURE."""
    count, card = trained.config.score_samples, trained.card
    if count == 0:
        return Scored({}, None)
    if isinstance(card, PixelCard):
        images = make_images(trained, count)
        with saving(workdir / PICTURE):
            write_grid(workdir / PICTURE, images)
        return Scored({"num_samples": count}, Made([], [], images))
    template = all_hidden(card)
    batches = list(uncover(trained, template, count))
    for stage in batches[0]:
        logging.info("block %d: %s", stage.block, show(stage.tokens[0], stage.is_hidden[0], card))
    decode = card.vocabulary.decode
    texts = texts_of(batches, template, card)
    save_texts(workdir / TEXTS, texts)
    test = data.split("test")
    real = [decode(row) for row in test.take(np.unique(np.linspace(0, len(test) - 1, count).astype(int)))["tokens"]]
    known = known_words(data.split("train").tokens, decode)
    first = [Stage(block, *(each[:1] for each in state)) for block, *state in batches[0]]
    return Scored({"num_samples": count} | text_scores(texts, real, known), Made(first, texts, None))

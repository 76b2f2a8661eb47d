"""Trained models in Python: images drawn, texts written and scored, and data. Classifiers are in `load.py`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Num
from ml_collections import ConfigDict

from dblocks_jax.data.pixels import PixelCard
from dblocks_jax.data.source import Data
from dblocks_jax.modes.continuing import continued
from dblocks_jax.modes.load import Trained
from dblocks_jax.modes.reading import score, score_in_order
from dblocks_jax.modes.sample import check_scale, make_images
from dblocks_jax.modes.writing import MOST_TEXTS, make_texts
from dblocks_jax.run.errors import UserError
from dblocks_jax.tasks.generate.config import LATENTS
from dblocks_jax.tasks.generate.task import GENERATE
from dblocks_jax.tasks.mask.task import MASK
from dblocks_jax.tasks.mask.writing import read_template, read_text
from dblocks_jax.tasks.table import entry_of
from dblocks_jax.tasks.task import Entry
from dblocks_jax.tasks.text_order import InOrder
from dblocks_jax.training.config import arithmetic


def find_data(config: ConfigDict, own: Entry | None = None) -> Data:
    """What a config's run is trained and scored on; some data sets are downloaded at their first use.

    `find_data(config).split("test").take(np.arange(8))` are eight examples, arrays [8, ...] by name: "image", uint8
    [h, w, c], and "label" of images, "tokens" of text. The splits are "train", "test" and, where the config sets some
    apart, "val".

    Raises:
      UserError: the config names no task or data set, or it cannot be read or downloaded.
    """
    return entry_of(config, own).find_data(config)


def draw_images(
    trained: Trained, labels: Int[np.ndarray, " n"] | Sequence[int], cfg_scale: float | None = None
) -> Num[np.ndarray, "n h w c"]:
    """An image of each class in `labels`, by number: uint8, or float32 latents in the units of their decoder.

    Class names are `trained.card.class_names`. `cfg_scale` is the strength of guidance, 1 is none; left out, it is the
    config's. Image i is a function of the seed, i and its class alone. Each call compiles: ask for many at once.

    Raises:
      UserError: the model draws no images, there is no such class, or the scale is none.
      Diverged: the images are not finite.
    """
    if trained.entry.name != GENERATE.name:
        raise _unfit(trained, "draws no images of classes")
    wanted, known = np.asarray(labels), len(trained.card.class_names)
    if wanted.ndim != 1 or not len(wanted) or wanted.dtype.kind not in "iu":
        raise UserError("labels must be numbers of classes, one for each image: such as [3, 7]")
    if wanted.min() < 0 or wanted.max() >= known:
        raise UserError(f"labels must lie in [0, {known - 1}], not in [{wanted.min()}, {wanted.max()}]")
    scale = check_scale(trained.config.cfg_scale if cfg_scale is None else cfg_scale)
    images = make_images(trained, wanted.astype(np.int32), scale)
    return images / trained.config.latent_scale if trained.config.dataset == LATENTS else images


def write_texts(trained: Trained, count: int, text: str | None = None) -> list[str]:
    """`count` texts, each as long as what the model was trained on.

    A model that tells tokens in order goes on from `text`. A masked model replaces each "_" in it, and writes no more
    than it gives. The same seed writes the same texts. Each call compiles: ask for many at once.

    Raises:
      UserError: the model writes no text, `text` does not fit, or the number is none.
      Diverged: the model's answers are not finite.
    """
    if not 1 <= count <= MOST_TEXTS:
        raise UserError(f"count must lie in [1, {MOST_TEXTS:,}], not {count}")
    if isinstance(trained.task, InOrder):
        return continued(trained, text, count)
    _check_reads_text(trained)
    return make_texts(trained, count, None if text is None else read_template(text, trained.card))


def score_text(trained: Trained, text: str) -> dict[str, Any]:
    """How well a model foretells a text.

    "bits" for each character, all told: exact of a model that tells tokens in order, where the first token is given
    and "tokens" has the "probability" of each other "symbol"; of a masked model at most so many, with "bits_error",
    the standard error of that bound. "text" is what was read, in the model's own symbols, "characters" how many count.

    Raises:
      UserError: the model reads no text, or the text is empty, too long, or holds what the model does not know.
      Diverged: the answers are not finite.
    """
    if isinstance(trained.task, InOrder):
        return score_in_order(trained, trained.task, text)
    _check_reads_text(trained)
    template = read_text(text, trained.card)
    if template.is_hidden[: template.given].any():
        raise UserError("the text has blanks (_): a text that is scored has none")
    with arithmetic(trained.config):
        return score(trained, template)


def _check_reads_text(trained: Trained) -> None:
    if trained.entry.name != MASK.name or isinstance(trained.card, PixelCard):
        raise _unfit(trained, "knows no text")


def _unfit(trained: Trained, why: str) -> UserError:
    return UserError(f"a model of the task {trained.entry.name} on {trained.config.get('dataset', 'its data')} {why}")

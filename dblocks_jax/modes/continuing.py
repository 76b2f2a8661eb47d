"""Texts of a trained decoder: what it writes after a text that is given, or after beginnings of held-out ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Int
from ml_collections import ConfigDict

from dblocks_jax.data.images import telling
from dblocks_jax.modes.load import Trained, load_run, only
from dblocks_jax.modes.sample import FOLDER
from dblocks_jax.modes.writing import MOST_TEXTS, STAGES, TEXTS, save_texts
from dblocks_jax.run.errors import NOT_FINITE, Diverged, UserError
from dblocks_jax.run.naming import shown
from dblocks_jax.tasks.next_token.chain import score_chain
from dblocks_jax.tasks.next_token.task import NEXT_TOKEN
from dblocks_jax.tasks.recurrent.task import RECURRENT
from dblocks_jax.tasks.text_order import InOrder
from dblocks_jax.tasks.text_scores import known_words, text_scores
from dblocks_jax.tasks.text_writing import least_prompt, read_prompt
from dblocks_jax.training.config import arithmetic

PROMPT_SHARE = 4  # of what a model sees one part in so many is given, where texts are made to be scored


def write_on(trained: Trained, prompts: Int[np.ndarray, "n t"], count: int) -> Int[np.ndarray, "n count"]:
    """`count` tokens after each prompt. Progress is told.

    A text is a function of the seed, its number and prompt.

    Raises:
      Diverged: the model's answers are not finite.
    """
    config, task = trained.config, trained.task
    assert isinstance(task, InOrder)
    write = task.writer(trained.blueprint)
    size = min(task.written_at_once(), len(prompts))
    starts = list(range(0, len(prompts), size))
    made = []
    for start in telling(starts, total=len(prompts), each=size, doing="writing %s texts"):
        numbers = np.minimum(np.arange(start, start + size), len(prompts) - 1)  # the last fills the last batch
        samples = jax.numpy.asarray(numbers, "int32")
        with arithmetic(config):
            written = list(write(trained.params, jax.numpy.asarray(prompts[numbers]), count, samples))
        if not np.isfinite(jax.device_get([logits.max() for _, logits in written])).all():
            raise Diverged(NOT_FINITE)
        made.append(np.stack(jax.device_get([token for token, _ in written]), axis=1)[: len(prompts) - start])
    return np.concatenate(made)


def continue_text(
    config: ConfigDict, workdir: Path, *, text: str | None, count: int, overrides: dict[str, Any], checkpoint: str
) -> dict[str, Any]:
    """Go on from `text` `count` times, to the length that the model was trained on.

    Without it from nothing but a space, or the first symbol of a vocabulary that has none.

    Raises:
      UserError: there is no such run, the text does not fit, or the number is none.
      Unsaved: the texts cannot be written.
    """
    if not 1 <= count <= MOST_TEXTS:
        raise UserError(f"--count must lie in [1, {MOST_TEXTS:,}], not {count}")
    trained, _ = load_run(workdir, checkpoint=checkpoint, config=config, overrides=overrides)
    texts = continued(only(trained, workdir, NEXT_TOKEN, RECURRENT), text, count)
    print("\n".join(shown(each) for each in texts[:STAGES]))
    save_texts(workdir / FOLDER / TEXTS, texts)
    about = {"mode": "sample", "workdir": str(workdir), "checkpoint": trained.step, "seed": trained.config.seed}
    return about | {"num_texts": count, "texts": texts[:STAGES], "file": str(workdir / FOLDER / TEXTS)}


def continued(trained: Trained, text: str | None, count: int) -> list[str]:
    """`count` texts that begin with `text`: see `continue_text`.

    Raises:
      UserError: the text does not fit.
      Diverged: the model's answers are not finite.
    """
    card = trained.card
    beginning = least_prompt(card) if text is None else text
    prompt = read_prompt(beginning, card, if_empty="leave it out, or write what is to be gone on from")
    made = write_on(trained, np.tile(prompt, (count, 1)), card.length - len(prompt))
    return [card.vocabulary.decode(np.concatenate([prompt, row])) for row in made]


def continue_and_score(trained: Trained, data: Any, workdir: Path) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """(figures, (beginning, what was written after it) of each text).

    The beginnings are those of `score_samples` held-out texts, and what is written is scored beside how those go on.
    All of it is written to TEXTS.
    """
    count, card = trained.config.score_samples, trained.card
    if count == 0:
        return {}, []
    test, decode = data.split("test"), card.vocabulary.decode
    real = test.take(np.unique(np.linspace(0, len(test) - 1, count).astype(int)))["tokens"].astype(np.int32)
    given = max(1, card.length // PROMPT_SHARE)
    made = write_on(trained, real[:, :given], card.length - given)
    texts = list(zip(_decoded(decode, real[:, :given]), _decoded(decode, made), strict=True))
    for beginning, text in texts[:STAGES]:
        logging.info("%s | %s", shown(beginning), shown(text))
    save_texts(workdir / TEXTS, ["".join(each) for each in texts])
    known = known_words(data.split("train").tokens, decode)
    figures = text_scores([text for _, text in texts], _decoded(decode, real[:, given:]), known)
    return {"num_samples": len(real)} | figures, texts


def score_steps(trained: Trained, data: Any) -> dict[str, Any]:
    """Bits of the test text after each of the sampler's steps, and by all blocks together; {} of other models."""
    config = trained.config
    if trained.entry.name != NEXT_TOKEN.name or trained.task.corruption is None:
        return {}
    with arithmetic(config):
        return score_chain(config, trained.blueprint, trained.card, trained.params, data.split("test"))


def _decoded(decode: Any, rows: Int[np.ndarray, "n t"]) -> Sequence[str]:
    return [decode(row) for row in rows]

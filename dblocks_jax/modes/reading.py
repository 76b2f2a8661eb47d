"""`--mode=predict --text=...`: how many bits a text takes, or what its blanks most likely are."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dblocks_jax.modes.load import Trained, load_run, only
from dblocks_jax.modes.predict import PREDICTIONS, UNLIMITED
from dblocks_jax.run.devices import to_device
from dblocks_jax.run.errors import NOT_FINITE, Diverged, UserError
from dblocks_jax.run.files import saving
from dblocks_jax.run.naming import shown
from dblocks_jax.run.workdir import write_json
from dblocks_jax.tasks.mask.reading import bits_of_text, fill
from dblocks_jax.tasks.mask.task import MASK
from dblocks_jax.tasks.mask.writing import Template, read_text
from dblocks_jax.tasks.text import TextCard
from dblocks_jax.tasks.text_order import InOrder
from dblocks_jax.training.config import arithmetic


def predict_text(
    config: ConfigDict, workdir: Path, text: str, *, overrides: dict[str, Any], checkpoint: str
) -> dict[str, Any]:
    """Score a text, or where it has blanks fill them in; print what was found, and write PREDICTIONS into the workdir.

    Raises:
      UserError: there is no such run, or the text is empty, too long, or holds what the model does not know.
      Diverged: the model's answers are not finite.
      Unsaved: it is printed, but PREDICTIONS cannot be written.
    """
    trained, _ = load_run(workdir, checkpoint=checkpoint, config=config, overrides=overrides)
    if isinstance(trained.task, InOrder):
        found = score_in_order(trained, trained.task, text)
        print(in_words(found))
        return _written(found, trained, workdir)
    card = only(trained, workdir, MASK).card
    if not isinstance(card, TextCard):
        raise UserError(f"{workdir} was trained on images, of which it makes more (--mode=sample): it reads no text")
    template = read_text(text, card)
    with arithmetic(trained.config):
        is_whole = not template.is_hidden[: template.given].any()
        found = score(trained, template) if is_whole else fill_in(trained, template)
    if is_whole:
        print(in_words(found))
    else:
        print_blanks(found["filled"], found["blanks"])
    return _written(found, trained, workdir)


def in_words(found: dict[str, Any]) -> str:
    """A line about a text that was scored: the bits, or the most that they are."""
    error = found.get("bits_error", math.nan)
    most, spread = "<= " if "bits_error" in found else "", "" if math.isnan(error) else f" ± {error:.4f}"
    return f"{most}{found['bits']:.4f}{spread} bits per character: {shown(found['text'])}"


def _written(found: dict[str, Any], trained: Trained, workdir: Path) -> dict[str, Any]:
    with saving(workdir / PREDICTIONS):
        write_json(workdir / PREDICTIONS, found)
    about = {"mode": "predict", "workdir": str(workdir), "checkpoint": trained.step}
    return about | found | {"predictions": str(workdir / PREDICTIONS)}


def score_in_order(trained: Trained, task: InOrder, text: str) -> dict[str, Any]:
    """Bits for each character of a text after its first token, each token given those before it.

    Raises:
      UserError: the text is too short or too long, or holds what the model does not know.
      Diverged: the answers are not finite.
    """
    card, vocabulary = trained.card, trained.card.vocabulary
    tokens = vocabulary.encode(text)
    if not 2 <= len(tokens) <= card.length:
        raise UserError(f"the text has {len(tokens)} tokens: it must have from 2 to {card.length}")
    padded = np.pad(tokens, (0, card.length - len(tokens)))[None]
    together = tuple(to_device(trained.params[name]) for name in trained.blueprint.names(0))
    with arithmetic(trained.config):
        logits = task.logits_of(trained.blueprint)(together, jnp.asarray(padded), jnp.zeros(1, jnp.int32))
        log_p = np.asarray(jax.nn.log_softmax(logits[0]), np.float64)[np.arange(len(tokens) - 1), tokens[1:]]
    characters = vocabulary.count_characters(tokens[1:])
    bits = -log_p.sum() / math.log(2) / max(1, characters)
    if not math.isfinite(bits):
        raise Diverged(NOT_FINITE)
    each = [
        {"symbol": vocabulary.decode(tokens[i : i + 1]), "probability": math.exp(log_p[i - 1])}
        for i in range(1, len(tokens))
    ]
    return {"text": vocabulary.decode(tokens), "characters": characters, "bits": bits, "tokens": each}


def score(trained: Trained, template: Template) -> dict[str, Any]:
    """Bits for each character of a text, at most."""
    vocabulary, config, task = trained.card.vocabulary, trained.config, trained.task
    tokens = template.tokens[: template.given]
    characters = vocabulary.count_characters(tokens)
    bits, error = bits_of_text(template, task.corruption, trained.blueprint, trained.params, config.bound_draws)
    if not math.isfinite(bits):
        raise Diverged(NOT_FINITE)
    return {
        "text": vocabulary.decode(tokens), "characters": characters, "bits": bits / characters,
        "bits_error": error / characters,
    }  # fmt: skip


def fill_in(trained: Trained, template: Template) -> dict[str, Any]:
    """The blanks of a text one after the other, the surest first, each with the symbols that are likeliest there."""
    vocabulary = trained.card.vocabulary
    tokens, blanks = fill(template, trained.task.corruption, trained.blueprint, trained.params)
    if not all(math.isfinite(blank.probability) for blank in blanks):
        raise Diverged(NOT_FINITE)

    def symbol(token: int) -> str:
        return vocabulary.decode(np.array([token]))

    filled = vocabulary.decode(tokens[: template.given])
    records = [
        {
            "place": blank.place,
            "symbol": symbol(blank.token),
            "probability": blank.probability,
            "top5": [{"symbol": symbol(token), "probability": share} for token, share in blank.likeliest],
        }
        for blank in blanks
    ]
    return {"filled": filled, "probability": math.prod(blank.probability for blank in blanks), "blanks": records}


def print_blanks(filled: str, records: list[dict[str, Any]]) -> None:
    """The text, and a line for each blank in the order in which they were filled in."""
    console = Console()
    if not console.is_terminal:  # a file or another program reads it: nothing is cut
        console = Console(width=UNLIMITED)
    table = Table("symbol", "taken for", "probability", "likeliest there", box=None)
    for record in records:
        others = ", ".join(f"{each['symbol']!r} {each['probability']:.1%}" for each in record["top5"])
        cells = (str(record["place"] + 1), repr(record["symbol"]), f"{record['probability']:.1%}", others)
        table.add_row(*map(Text, cells))  # as text, of which rich reads no markup
    console.print(Text(shown(filled)))
    console.print(table)

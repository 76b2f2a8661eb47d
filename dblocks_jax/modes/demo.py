"""`--mode=demo`: a page of this machine on which a trained model is played with."""

import secrets
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from dblocks_jax.modes.load import WEIGHTS, Trained, load_exported, load_run
from dblocks_jax.modes.serving import MOST_BYTES, DemoServer
from dblocks_jax.pages.template import render
from dblocks_jax.run.errors import UserError
from dblocks_jax.run.naming import shown
from dblocks_jax.run.stop import Stop
from dblocks_jax.tasks import text_demo
from dblocks_jax.tasks.classify import demo as of_classifier
from dblocks_jax.tasks.demo import Demo
from dblocks_jax.tasks.generate import demo as of_generator
from dblocks_jax.tasks.mask import demo as of_masked
from dblocks_jax.training.config import arithmetic, check_config, for_evaluation

DEMOS: dict[str, Any] = {  # by task
    "classify": of_classifier.demo,
    "generate": of_generator.demo,
    "mask": of_masked.demo,
    "next_token": text_demo.demo,
    "recurrent": text_demo.demo,
}
FRAMES_COMPILED = 2  # of an answer: after these nothing new is compiled


def demo(
    config: ConfigDict | None,
    workdir: Path,
    *,
    port: int,
    overrides: dict[str, Any],
    checkpoint: str,
    stop: Stop,
) -> None:
    """Serve the page of a run or of an exported folder until a signal comes. Nothing is written.

    Raises:
      UserError: there is no such run or checkpoint, the model makes nothing to be shown, or the port cannot be had.
    """
    trained = load(config, workdir, overrides=overrides, checkpoint=checkpoint)
    with open_server(trained, workdir.absolute().name, port) as server:
        stop.interrupt()
        try:
            print(f"{trained.entry.describe(trained.config)}: {server.address} (Ctrl-C ends it)", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)  # once more ends at once
            server.close()


def load(config: ConfigDict | None, folder: Path, *, overrides: dict[str, Any], checkpoint: str) -> Trained:
    """The model of a run or of an exported folder, with the sampler's fields as the command has them."""
    if not (folder / WEIGHTS).exists():
        return load_run(folder, checkpoint=checkpoint, config=config, overrides=overrides)[0]
    trained = load_exported(folder)
    merged = for_evaluation(trained.entry, trained.config.to_dict(), overrides, config or ConfigDict())
    check_config(trained.entry, merged)
    return replace(trained, config=merged, task=trained.entry.make(merged, trained.card))


def open_server(trained: Trained, name: str, port: int) -> DemoServer:
    """The server of a model's page, with all compiled that its answers need.

    Raises:
      UserError: the model makes nothing to be shown, or the port cannot be had.
    """
    made: Demo = DEMOS[trained.entry.name](trained.task, trained.blueprint, trained.params, split_at_hand(trained))

    def answer(wanted: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with arithmetic(trained.config):  # which holds for the thread that answers
            yield from made.answer(wanted)

    nonce = secrets.token_urlsafe(16)
    about = {"name": shown(name), "nonce": nonce, "most_bytes": MOST_BYTES, "config": trained.config}
    page = render(made.template, about | {"step": trained.step} | made.values)
    server = DemoServer(port, page, nonce, answer)
    try:
        logging.info("compiling, so that the first answer is quick")
        for wanted in made.first:
            list(islice(answer(wanted), FRAMES_COMPILED))
    except BaseException:
        server.server_close()
        raise
    return server


def split_at_hand(trained: Trained) -> Any:
    """The data's test split to take examples from, where it is at hand and of the model's kind; None elsewhere."""
    try:
        data = trained.entry.find_data(trained.config, may_prepare=False)
        if trained.entry.card(data.to_dict()) == trained.card:
            test = data.split("test")
            return test if len(test) else None
        why = "what is there is other data"
    except UserError as error:
        why = str(error)
    logging.info("the page shows no test data: %s", why)
    return None

"""A masked model of text, once trained: scores, texts, report, comparison, export and inspection say one thing."""

from pathlib import Path

import jax
import numpy as np
import pytest
from test_pages import Page

from configs import mask
from dblocks_jax.modes.evaluate import evaluate_run
from dblocks_jax.modes.inspect import inspect
from dblocks_jax.modes.load import load_trained
from dblocks_jax.modes.train import train
from dblocks_jax.run.workdir import finish

TINY = {
    "dataset": "text_file", "vocabulary": "letters", "text_length": 8, "num_layers": 2, "num_blocks": 2,
    "hidden_size": 8, "num_heads": 2, "intermediate_size": 16, "batch_size": 100, "num_epochs": 1, "lr": 1e-2,
    "num_warmup_steps": 0, "log_every_n_steps": 1, "save_every_n_epochs": 1, "num_inference_steps": 6,
    "bound_draws": 3, "score_samples": 20,
}  # fmt: skip
WORDS = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen")


def text_of(count: int) -> str:
    """So many words in an order that is no order."""
    return " ".join(WORDS[i] for i in np.random.default_rng(0).integers(0, len(WORDS), count))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(text_of(1000))
    config = mask.get_config()
    config.update(TINY | {"data_dir": str(folder / "text.txt")})
    workdir = folder / "run"
    trained = train(config, workdir, command=["launch.py"], overrides={})
    finish(workdir, trained)
    return config, workdir, trained


def test_training_and_evaluation_score_alike(run):
    config, workdir, trained = run
    scored = evaluate_run(config, workdir, overrides={}, checkpoint="best")
    names = set(trained) & set(scored) - {"mode"}
    assert {"bits", "bits_error", "bits_by_block", "distinct_2", "repetition_data", "known_words"} <= names
    assert {name: scored[name] for name in names} == {name: trained[name] for name in names}
    assert len((workdir / "samples.txt").read_text().splitlines()) == 20


def test_the_text_is_inspected(run, tmp_path, capsys):
    config, workdir, _ = run
    result = inspect(config, tmp_path)
    text = text_of(1000)
    train_part = text[: len(text) - len(text) // 20]
    assert result["tokens"] == {"train": len(train_part), "test": len(text) // 20} and result["vocabulary"] == 27
    params = load_trained(workdir).params
    assert result["parameters"] == {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
    page, printed = Page(tmp_path / "inspect.html"), capsys.readouterr().out
    assert page.loaded == [] and page.pictures == 1 and train_part[:500] in page.text
    assert "block 0: 1 .. 0.5 of the tokens hidden" in printed and f"{len(train_part):,} characters" in printed

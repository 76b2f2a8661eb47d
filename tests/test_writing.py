"""A masked model of text, once trained: scores, texts, report, comparison, export and inspection say one thing."""

import re
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from test_pages import Page

from configs import mask, mask_digits
from dblocks_jax.data.vocabulary import letters
from dblocks_jax.modes.evaluate import evaluate_run
from dblocks_jax.modes.inspect import inspect
from dblocks_jax.modes.load import load_trained
from dblocks_jax.modes.report import report
from dblocks_jax.modes.train import train
from dblocks_jax.run.checkpoint import Checkpoints
from dblocks_jax.run.workdir import finish, write_json
from dblocks_jax.tasks.mask.report import pieces
from dblocks_jax.tasks.mask.task import MASK
from dblocks_jax.tasks.mask.writing import Stage, kept_steps, uncovered_by
from dblocks_jax.tasks.text import TextCard
from dblocks_jax.training.setting import fresh_parts

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


def test_each_token_is_of_the_block_that_uncovered_it():
    """Steps are kept by their number and where the next block takes over, so between two that are kept one worked."""
    hidden = np.array([[[1, 1, 1]], [[1, 1, 0]], [[1, 0, 0]], [[0, 0, 0]]], bool)
    steps = [(block, np.array([[7, 8, 9]]), hidden[i]) for i, block in enumerate([0, 0, 1, 1])]
    assert [step[0] for step in kept_steps(steps, set())] == [0, 1]
    assert [step[2].sum() for step in kept_steps(steps, {0})] == [3, 2, 0]
    owners = uncovered_by([Stage(*step) for step in kept_steps(steps, {0})])
    assert [each.tolist() for each in owners] == [[[-1, -1, -1]], [[-1, -1, 0]], [[1, 1, 0]]]
    assert [tuple(piece) for piece in pieces(steps[0][1][0], owners[1][0], TextCard(letters(), 3))] == [
        (-1, "__"), (0, "i"),
    ]  # fmt: skip


def test_a_report_says_what_evaluation_measures_and_shows_who_uncovered(run):
    config, workdir, trained = run
    result = report(config, workdir, overrides={}, checkpoint="best")
    names = ("bits", "bits_error", "bits_by_block", "distinct_2", "repetition_data", "known_words")
    assert {name: result[name] for name in names} == {name: trained[name] for name in names}
    page, text = Page(workdir / "report.html"), (workdir / "report.html").read_text()
    assert page.loaded == [] and page.pictures == 5  # shares, loss, bits, bits kept apart, memory
    for bits in (trained["bits"], *trained["bits_by_block"]):
        assert f"{bits:.4f}" in page.text
    assert f"± {trained['bits_error']:.4f}" in page.text and f"{trained['known_words_data']:.1%}" in page.text
    stages = re.findall(r'<pre class="command">(<span.*?)</pre>', text)
    shown = ["".join(re.findall(r"<span[^>]*>(.*?)</span>", stage)) for stage in stages]
    written = (workdir / "samples.txt").read_text().splitlines()
    assert shown[-1] == written[0] and written[5] in page.text
    for earlier, later in pairwise(shown):  # what is uncovered stays
        assert all(a in ("_", b) for a, b in zip(earlier, later, strict=True)) and len(earlier) == 8
    assert set(re.findall(r'title="block (\d)"', stages[-1])) <= {"0", "1"} and "title" in stages[-1]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> tuple[ConfigDict, Path]:
    """A model of pixels that was never trained."""
    config, workdir = mask_digits.get_config(), tmp_path_factory.mktemp("pixels")
    config.update(dict.fromkeys(["num_layers", "num_blocks", "num_heads"], 2) | {"hidden_size": 8, "grow_at": ()})
    config.update(intermediate_size=16, num_inference_steps=4, score_samples=5, bound_draws=2, ema_decay=0.0)
    write_json(workdir / "config.json", config.to_dict())
    data = MASK.find_data(config).to_dict() | {"images": 1437}
    with Checkpoints(workdir) as checkpoints:
        parts = fresh_parts(MASK, config, MASK.make(config, MASK.card(data)))
        checkpoints.save(7, parts, {"config": config.to_dict(), "data": data})
    return config, workdir


def test_images_are_made_and_shown_where_symbols_are_grey_levels(drawn):
    """A model whose head is still zero needs 8 bits for each of 256 grey levels, whatever is hidden."""
    config, workdir = drawn
    result = report(config, workdir, overrides={}, checkpoint="best")
    assert result["bits"] == pytest.approx(8, abs=1e-4) and result["bits_error"] < 1e-4
    assert result["bits_by_block"] == pytest.approx([8, 8], abs=1e-4) and result["unit"] == "dimension"
    page, text = Page(workdir / "report.html"), (workdir / "report.html").read_text()
    assert text.count("an image that was made") == 5 and page.loaded == [] and "training images" in page.text
    with Image.open(workdir / "samples.png") as grid:
        assert grid.size == (3 * 66 + 2, 2 * 66 + 2)
    assert inspect(config, workdir)["images"] == {"train": 1437, "test": 360}

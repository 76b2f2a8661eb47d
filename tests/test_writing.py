"""A masked model of text, once trained: scores, texts, report, comparison, export and inspection say one thing."""

import json
import re
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from ml_collections import ConfigDict
from PIL import Image
from playing import frames, mistake, pixels_of, send, served
from test_pages import Page, needed_without_compiling

from configs import mask_digits
from dblocks_jax.data.vocabulary import letters
from dblocks_jax.fields import mask
from dblocks_jax.models.masked_transformer import run_block
from dblocks_jax.modes import demo
from dblocks_jax.modes.compare import compare
from dblocks_jax.modes.evaluate import evaluate_run
from dblocks_jax.modes.export import export_run
from dblocks_jax.modes.in_use import score_text, write_texts
from dblocks_jax.modes.inspect import inspect
from dblocks_jax.modes.load import load_trained
from dblocks_jax.modes.reading import predict_text
from dblocks_jax.modes.report import report
from dblocks_jax.modes.train import train
from dblocks_jax.run.checkpoint import Checkpoints
from dblocks_jax.run.errors import UserError
from dblocks_jax.run.workdir import finish, write_json
from dblocks_jax.tasks.mask.demo import HIDDEN
from dblocks_jax.tasks.mask.reading import fill_by
from dblocks_jax.tasks.mask.report import pieces
from dblocks_jax.tasks.mask.task import MASK
from dblocks_jax.tasks.mask.writing import Stage, kept_steps, read_text, uncovered_by
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


def test_a_page_uncovers_a_text(run, tmp_path):
    """What is written stays, and so does what is uncovered, until nothing is hidden."""
    with served(demo.open_server(load_trained(run[1]), "run", 0)) as server:
        found = frames(server, {"text": "c_t d", "number": 3})
        assert frames(server, {"text": "c_t d", "number": 3}) == found
        for text, told in (
            ("", "is empty"),
            ("ant bees", "nothing to fill in"),
            ("ant bees ", "of which the model sees 8"),
        ):
            assert told in mistake(server, {"text": text, "number": 0})
        (tmp_path / "page.html").write_text(send(server, b"", method="GET", path="/")[1])
    texts = ["c_t d___", *("".join(piece["text"] for piece in frame["pieces"]) for frame in found)]
    assert len(found) == 6 and "_" not in texts[-1]
    for before, after in pairwise(texts):
        assert all(b in (a, "_") for b, a in zip(before, after, strict=True))
    assert found[-1]["pieces"][0] == {"block": -2, "text": "c"}
    assert {piece["block"] for piece in found[-1]["pieces"]} <= {-2, 0, 1}
    assert Page(tmp_path / "page.html").loaded == []


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
    assert [tuple(piece) for piece in pieces(steps[0][1][0], owners[1][0], letters())] == [
        (-1, "__"), (0, "i"),
    ]  # fmt: skip


@pytest.mark.long
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


@pytest.mark.long
def test_images_are_made_and_shown_where_symbols_are_grey_levels(drawn, monkeypatch):
    """A model whose head is still zero needs 8 bits for each of 256 grey levels, whatever is hidden."""
    config, workdir = drawn
    needed_without_compiling(monkeypatch)
    result = report(config, workdir, overrides={}, checkpoint="best")
    assert result["bits"] == pytest.approx(8, abs=1e-4) and result["bits_error"] < 1e-4
    assert result["bits_by_block"] == pytest.approx([8, 8], abs=1e-4) and result["unit"] == "dimension"
    page, text = Page(workdir / "report.html"), (workdir / "report.html").read_text()
    assert text.count("an image that was made") == 5 and page.loaded == [] and "training images" in page.text
    with Image.open(workdir / "samples.png") as grid:
        assert grid.size == (3 * 66 + 2, 2 * 66 + 2)
    assert inspect(config, workdir)["images"] == {"train": 1437, "test": 360}


@pytest.mark.long
def test_a_page_uncovers_pictures(drawn):
    """Of the 8 x 8 pixels of 16 images three quarters are hidden after one of four steps; in the end none is."""
    with served(demo.open_server(load_trained(drawn[1]), "run", 0)) as server:
        first, *_, last = frames(server, {"number": 0})
        assert "number must be a whole number" in mistake(server, {"number": -1})
    steps = first["of"]
    hidden = [(pixels_of(frame["picture"]) == HIDDEN).all(axis=-1).mean() for frame in (first, last)]
    assert hidden[0] == pytest.approx((1 - 1 / steps) * (256 / 266) ** 2, abs=0.05) and hidden[1] == 0


def test_masked_models_are_ranked_by_bits(run, tmp_path, capsys):
    _, workdir, trained = run
    better, other_seed = tmp_path / "better", tmp_path / "other"
    for folder, config, result in (
        (better, {"num_blocks": 1}, {"bits": 0.25, "bits_error": None}),
        (other_seed, {"seed": 7}, {"bits": trained["bits"] + 0.5}),
    ):
        folder.mkdir()
        for name, change in (("config.json", config), ("train.json", result)):
            (folder / name).write_text(json.dumps(json.loads((workdir / name).read_text()) | change))
    first, second = compare([workdir, better, other_seed], tmp_path)["groups"]
    assert (first["fields"], first["bits_mean"], first["bits_std"]) == ({"num_blocks": 1}, 0.25, None)
    assert second["bits_mean"] == pytest.approx(trained["bits"] + 0.25) and second["seeds"] == [42, 7]
    assert second["bits_std"] == pytest.approx(0.5 / 2**0.5)
    page, printed = Page(tmp_path / "compare.html"), capsys.readouterr().out
    for text in (f"{trained['bits'] + 0.25:.4f} ± {0.5 / 2**0.5:.4f}", "0.2500", "words that exist"):
        assert text in page.text and text in printed
    assert f"text_file {run[0].data_dir}, {trained['num_sequences']} sequences" in page.text and page.pictures == 2
    (better / "train.json").write_text(json.dumps(trained | {"known_words": 1.5}))
    with pytest.raises(UserError, match=r"known_words is 1.5, which no run writes"):
        compare([better], tmp_path)


@pytest.fixture(scope="module")
def exported(run):
    config, workdir, _ = run
    return workdir / "export", export_run(config, workdir, overrides={}, checkpoint="best")


@pytest.mark.long
def test_the_program_answers_by_the_block_that_owns_the_share(run, exported):
    """Any number of sequences, each with other symbols hidden, as each block alone answers."""
    folder, result = exported
    assert result["largest_difference_of_logits"] <= 1e-4
    program = export.deserialize(bytearray((folder / "uncover.stablehlo").read_bytes()))
    trained, rng = load_trained(folder), np.random.default_rng(3)
    tokens = rng.integers(0, 27, (9, 8), np.int32)
    is_hidden = rng.permuted(np.arange(8) < np.arange(9)[:, None], axis=1)  # none of the first, all of the last
    found = np.asarray(program.call(tokens, is_hidden))
    for number, owner in enumerate([1, 1, 1, 1, 1, 0, 0, 0, 0]):
        level = np.full(1, number / 8, np.float32)
        asked = [jnp.asarray(each) for each in (tokens[number][None], is_hidden[number][None], level)]
        expected, other = (run_block(*trained.together(block), *asked)[0] for block in (owner, 1 - owner))
        np.testing.assert_allclose(found[number], expected, rtol=0, atol=1e-4)
        assert np.abs(found[number] - other).max() > 1e-2
    elsewhere = np.where(is_hidden, (tokens + 1) % 27, tokens)  # is not looked at
    np.testing.assert_array_equal(program.call(elsewhere, is_hidden), found)


def test_an_exported_masked_model_is_loaded_and_described(run, exported):
    folder, _ = exported
    config, workdir, trained = run
    again, before = load_trained(folder), load_trained(workdir)
    jax.tree.map(np.testing.assert_array_equal, again.params, before.params)
    assert again.entry.name == "mask" and again.card == before.card and again.config.data_dir == ""
    text = (folder / "README.md").read_text()
    assert f"| bits per character | {trained['bits']:.4f} at most, ± {trained['bits_error']:.4f}" in text
    assert "a text of one's own" in text and "- block 1: 0.5 .. 0 of the tokens hidden" in text
    [code] = re.findall(r"```python\n(import numpy.*?)```", text, re.S)
    known: dict = {
        "program": (folder / "uncover.stablehlo").read_bytes(),
        "config": (folder / "config.json").read_text(),
    }
    for reading, name in (
        ('open("uncover.stablehlo", "rb").read()', "program"),
        ('open("config.json").read()', "config"),
    ):
        assert reading in code
        code = code.replace(reading, name)
    exec(code, known)
    assert known["tokens"].shape == (1, 8) and not known["is_hidden"].any()
    assert known["tokens"][0, [0, 2]].tolist() == [20, 5]  # "t" and "e", which were given
    for path in folder.iterdir():
        assert config.data_dir.encode() not in path.read_bytes()


def test_a_text_is_scored_at_least_as_dear_as_by_every_order(run, tmp_path):
    """The bound of a text of two symbols, in closed form: both hidden, and either one beside the other."""
    config, workdir, _ = run
    found = predict_text(config, workdir, "ca", overrides={"bound_draws": 2}, checkpoint="best")
    trained = load_trained(workdir)
    tokens = np.array([[3, 1, 0, 0, 0, 0, 0, 0]], np.int32)

    def cost(hidden: list[int]) -> float:
        """Nats of the first two symbols where hidden, mean."""
        is_hidden = np.array([[i >= 2 or i in hidden for i in range(8)]])
        level = is_hidden.mean(axis=1).astype(np.float32)
        logits = np.asarray(run_block(*trained.together(0), *map(jnp.asarray, (tokens, is_hidden, level))), np.float64)[
            0
        ]
        nats = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(8), tokens[0]]
        return float(np.mean([nats[i] for i in hidden]))

    one = sorted([cost([0]), cost([1])])
    low, high = ((2 * (cost([0, 1]) + each) / 2) / np.log(2) / 2 for each in one)
    assert low - 1e-6 <= found["bits"] <= high + 1e-6 and found["characters"] == 2
    assert found["bits_error"] <= high - low and json.loads((workdir / "predictions.json").read_text())["text"] == "ca"


def test_the_surest_blank_is_filled_in_first_and_then_the_others_anew():
    """A model made up for the purpose: the middle is surely "b", and beside a "b" the ends are "c"."""
    card = TextCard(letters(), 5)

    def ask(tokens: np.ndarray, is_hidden: np.ndarray) -> np.ndarray:
        share = np.full((5, 27), 0.1 / 26)
        share[:, 1] = 0.5
        if is_hidden[1]:
            share[1, 2] = 0.9
        else:
            share[:, 3] = 0.7
        return np.log(share)

    tokens, blanks = fill_by(ask, read_text("___", card))
    assert [(blank.place, blank.token, round(blank.probability, 6)) for blank in blanks] == [
        (1, 2, 0.9), (0, 3, 0.7), (2, 3, 0.7),
    ]  # fmt: skip
    assert letters().decode(tokens[:3]) == "cbc" and [token for token, _ in blanks[0].likeliest[:2]] == [2, 1]


def test_blanks_are_filled_in_with_what_the_owner_of_their_share_believes(run, capsys):
    """Three of eight symbols are unknown, and one is asked for: the share is that of block 1."""
    config, workdir, _ = run
    found = predict_text(config, workdir, "c_t do", overrides={}, checkpoint="best")
    tokens = np.array([[3, 0, 20, 0, 4, 15, 0, 0]], np.int32)
    is_hidden = np.array([[0, 1, 0, 0, 0, 0, 1, 1]], bool)
    asked = map(jnp.asarray, (tokens, is_hidden, np.full(1, 3 / 8, np.float32)))
    logits = run_block(*load_trained(workdir).together(1), *asked)
    believed = np.asarray(jax.nn.softmax(logits[0, 1]), np.float64)
    [blank] = found["blanks"]
    assert blank["place"] == 1 and blank["symbol"] == letters().symbols[int(np.argmax(believed))]
    assert found["probability"] == blank["probability"] == pytest.approx(believed.max(), abs=1e-5)
    assert [each["probability"] for each in blank["top5"]] == pytest.approx(np.sort(believed)[::-1][:5], abs=1e-5)
    assert found["filled"] == f"c{blank['symbol']}t do" and f"{believed.max():.1%}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the text is empty"),
        ("more than eight", "the text has 15 symbols, of which the model sees 8: shorten it"),
    ],
)
def test_texts_that_cannot_be_read_are_one_line(run, text, message):
    with pytest.raises(UserError, match=message):
        predict_text(run[0], run[1], text, overrides={}, checkpoint="best")


def test_in_python_what_is_given_stays_and_a_text_has_the_bits_that_are_printed(run):
    trained = load_trained(run[1])
    for text in write_texts(trained, 3, "c_t do"):
        assert re.fullmatch("c[a-z ]t do", text)
    assert (
        score_text(trained, "cat do").items()
        <= predict_text(*run[:2], "cat do", overrides={}, checkpoint="best").items()
    )
    with pytest.raises(UserError, match="the text has blanks"):
        score_text(trained, "c_t do")
    with pytest.raises(UserError, match="has nothing to fill in"):
        write_texts(trained, 1, "cat do")


def test_a_model_of_pixels_reads_no_text(drawn):
    with pytest.raises(UserError, match="a model of the task mask on digits knows no text"):
        score_text(load_trained(drawn[1]), "a text")
    with pytest.raises(UserError, match="was trained on images, of which it makes more"):
        predict_text(*drawn, "a text", overrides={}, checkpoint="best")

"""Names that strangers chose reach terminals, logs, cards and pictures escaped."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
from absl.testing import flagsaver
from ml_collections import ConfigDict

import launch
from configs import dblock_digits
from dblocks_jax.data.datasets import Card
from dblocks_jax.models.blueprint import Blueprint
from dblocks_jax.modes.export import model_card
from dblocks_jax.modes.load import Trained
from dblocks_jax.modes.sample import find_classes, sample
from dblocks_jax.pages import charts
from dblocks_jax.pages.findings import DataShown
from dblocks_jax.pages.template import render
from dblocks_jax.run.errors import UserError, brief
from dblocks_jax.run.naming import shown, shown_lines, split_names
from dblocks_jax.tasks.classify.task import CLASSIFY

EVIL = "\x1b]0;title\x07\x1b[2J\r\n| evil \u202e\x9b1m"
SAFE = r"\x1b]0;title\x07\x1b[2J\r\n| evil \u202e\x9b1m"


def test_what_does_not_print_is_shown_as_its_escape():
    assert shown(EVIL) == SAFE
    assert shown_lines(EVIL) == SAFE.replace(r"\n", "\n")
    assert shown("caf\udce9") == r"caf\xe9"  # a byte that is no text
    assert shown("\ud800") == r"\ud800" and shown("\0\u2028\U000e0001") == r"\x00\u2028\U000e0001"
    for name in ("", "a b", "naïve/日本語 🐈.png", "$x$ <b> [red] %s {}"):
        assert shown(name) == shown_lines(name) == name


def test_errors_are_safe_to_print():
    assert str(UserError(f"no {EVIL}")) == shown_lines(f"no {EVIL}")
    assert brief(ValueError("\x1b[1mbold\x1b[0m\n\tand more")) == r"ValueError: \x1b[1mbold\x1b[0m and more"
    cut = brief(ValueError("word " * 100))
    assert cut.endswith("word ...") and len(cut) <= 200


def test_a_model_card_shows_names_escaped():
    config = dblock_digits.get_config()
    card = Card((EVIL, "b"), (8, 8, 1), (0.5,), (0.5,))
    trained = Trained(CLASSIFY, config, card, 1, CLASSIFY.make(config, card), Blueprint({}), {})
    expected = SAFE.replace("|", "&#124;")
    text = model_card(trained, {"top1": 0.5}, imported=EVIL)
    assert f"| classes | 2: {expected}, b |" in text and f"imported from {expected} |" in text
    config.dataset = EVIL
    text = model_card(trained, {"top1": 0.5})
    assert f", trained on {SAFE}\n" in text
    assert text.isascii() and not {"\x1b", "\r", "\x07"} & set(text)


def test_a_chart_shows_names_escaped():
    svg = charts.confusion(np.eye(2, dtype=int), ("\x1b[2J\n", "b"))
    assert r"\x1b[2J\n" in svg and "\x1b" not in svg


def test_a_page_shows_names_escaped():
    values = {
        "name": EVIL,
        "data": DataShown("", {"train": {"images": 2}}, {}, {EVIL: ["data:,"]}, 0, ""),
        "table": "two\nlines",
        "parameters": {"model": 1},
        "shares": {},
        "one_example": "one image",
        "charts": {},
        "length": SimpleNamespace(steps=1, steps_per_epoch=1),
    }
    page = render("inspect.html", values)
    assert f"<th>{shown_lines(EVIL)}</th>" in page and "<pre>two\nlines</pre>" in page
    assert not {"\x1b", "\r", "\x07", "\u202e", "\x9b"} & set(page)


def test_a_name_with_commas_is_one_where_it_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.jpg", "c.jpg", "d", "d,e,f"):
        (tmp_path / name).touch()
    assert split_names("a,b.jpg") == ["a,b.jpg"]
    assert split_names("c.jpg,a,b.jpg,none") == ["c.jpg", "a,b.jpg", "none"]
    assert split_names("d,e,f,c.jpg") == ["d,e,f", "c.jpg"]
    assert split_names("x,y,,") == ["x", "y"] and split_names("") == []


def test_flags_take_names_with_commas_and_several_times(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b.jpg").touch()
    for flag in (launch.IMAGES, launch.RUNS, launch.PARTS):
        with flagsaver.as_parsed((flag, ["a,b.jpg,c", "d"])):
            assert launch._names(flag) == ["a,b.jpg", "c", "d"]
        assert launch._names(flag) == []


def test_what_the_program_says_and_logs_is_escaped(capsys):
    launch._complain(f"no {EVIL}", code=1)
    assert capsys.readouterr().err == f"launch.py: no {shown_lines(EVIL)}\n"
    record = logging.LogRecord("absl", logging.INFO, "x.py", 1, "reading %s", (EVIL,), None)
    assert launch._Safe("%(message)s").format(record) == f"reading {shown_lines(EVIL)}"


def test_classes_are_found_by_name_before_number_and_nonsense_is_refused():
    names = ("2", "cat", "dog")
    assert find_classes([], names) == [0, 1, 2]
    assert find_classes(["dog", "2", "1"], names) == [2, 0, 1]
    for nonsense in ("3", "-1", "", "\N{SUPERSCRIPT TWO}", "1" * 5000):
        with pytest.raises(UserError, match="there is no class"):
            find_classes([nonsense], names)


@pytest.mark.parametrize("count", [-1, 0, 10**9])
def test_a_number_of_images_that_cannot_be_made_is_refused_before_the_run_is_read(tmp_path, count):
    with pytest.raises(UserError, match=r"--count must lie in \[1, 1,000,000\], not"):
        sample(ConfigDict(), tmp_path, classes=[], count=count, cfg_scale=None, overrides={}, checkpoint="best")

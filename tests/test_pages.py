"""Pages about runs: what they say is what was measured, and they need nothing but themselves."""

import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import dblock_digits, vit_digits
from dblocks_jax.modes.compare import compare
from dblocks_jax.modes.evaluate import evaluate_run
from dblocks_jax.modes.inspect import inspect
from dblocks_jax.modes.load import load_classifier
from dblocks_jax.modes.memory import Memory
from dblocks_jax.modes.report import read_starts, report
from dblocks_jax.modes.train import train
from dblocks_jax.pages import charts
from dblocks_jax.pages.figures import Figure
from dblocks_jax.pages.template import render
from dblocks_jax.run.errors import UserError
from dblocks_jax.run.workdir import logged, scores
from dblocks_jax.tasks.classify.report import choose, confusion_matrix, worst_classes
from dblocks_jax.tasks.images import find_dataset

TINY = {
    "num_layers": 2, "hidden_size": 12, "num_heads": 2, "intermediate_size": 16, "num_blocks": 2, "batch_size": 600,
    "num_epochs": 2, "num_warmup_steps": 0, "log_every_n_steps": 1,
}  # fmt: skip
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """A page's text, and what it would load from elsewhere.

    A tag that is not closed in its turn is an error, and so is a table that a narrow screen would cut.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.classes: list[str] = []  # of the open tags
        self.text, self.loaded, self.pictures = "", [], 0
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
            self.classes.append(dict(attrs).get("class", ""))
        assert tag != "table" or "scroll" in self.classes
        self.pictures += tag == "svg"
        self.look_at(attrs)

    def look_at(self, attrs):
        for name, value in attrs:
            if "url(" in (value or ""):
                assert "url(#" in value, value
            if name in ("src", "href", "xlink:href", "data") and not (value or "").startswith(("#", "data:image/png")):
                self.loaded.append(value)

    def handle_startendtag(self, tag, attrs):
        self.look_at(attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.classes.pop()

    def handle_data(self, data):
        self.text += data


def needed_without_compiling(monkeypatch) -> list[ConfigDict]:
    """A report's chart of memory compiles two steps; here it is of made-up numbers. Returns the configs it asks for."""
    asked = []

    def needed(entry, config, card, devices):
        assert len(devices) == 1
        asked.append(config)
        averages = 4 if config.ema_decay else 0
        return Memory(
            parameters=4, optimizer=8, gradients=4, activations=9, averages=averages, total=25 + averages, idle=0
        )  # fmt: skip

    monkeypatch.setattr("dblocks_jax.modes.report.step_memory", needed)
    return asked


@pytest.fixture(
    scope="module", params=[dblock_digits, pytest.param(vit_digits, marks=pytest.mark.long)], ids=["dblock", "vit"]
)
def run(request, tmp_path_factory):
    config = request.param.get_config()
    config.update(TINY)
    workdir = tmp_path_factory.mktemp("run")
    train(config, workdir, command=["launch.py", "--config.x=<b>"], overrides={})
    return config, workdir, report(config, workdir, overrides={}, checkpoint="best")


def test_a_report_says_what_evaluation_measures(run):
    config, workdir, result = run
    scored = evaluate_run(config, workdir, overrides={}, checkpoint="best")
    assert {key: result[key] for key in scored if key not in ("mode", "sampler")} == {
        key: value for key, value in scored.items() if key not in ("mode", "sampler")
    }
    page = Page(workdir / "report.html")
    assert page.loaded == []
    assert f"{scored['top1']:.1%}" in page.text
    assert "launch.py --config.x=<b>" in page.text  # escaped, or it would be a tag
    is_dblock = config.model_type == "dblock"
    assert page.pictures == (8 if is_dblock else 5)
    assert ("What each block learns" in page.text) == is_dblock
    counts = result["accuracy_by_num_steps"]
    assert list(counts) == ([1, 2, 3, 4, 6, 8, 12, 16] if is_dblock else [])
    if is_dblock:
        assert counts[2] == scored["top1"]
        another = evaluate_run(config, workdir, overrides={"num_inference_steps": 4}, checkpoint="best")
        assert counts[4] == another["top1"]


def test_the_page_shows_what_the_classifier_believes_of_an_image(run):
    """The first picture among those classified rightly is found again in the data, with the same beliefs."""
    config, workdir, _ = run
    text = (workdir / "report.html").read_text()
    index = int(re.findall(r"<div>image (\d+)<br>", text.split("Right, picked evenly")[1])[0])
    images = find_dataset(config).split("test").images(np.arange(360))
    logits = np.asarray(load_classifier(workdir).by_step(images))[:, index].astype(np.float64)
    believed = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    shown = text.split(f"<div>image {index}<br>")[1].split("</div>\n")[0]
    assert re.findall(r"--p: ([\d.]+)%", text.split(f"<div>image {index}<br>")[1])[: len(logits)] == [
        f"{row.max():.1%}"[:-1] for row in believed
    ]
    assert f"is <b>{np.argmax(believed[-1])}</b>" in shown


def test_the_surest_mistakes_come_first():
    logits = np.log(np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7], [0.5, 0.5]]))
    answered, labels = np.argmax(logits, axis=1), np.array([0, 1, 0, 0, 0])
    right, wrong = choose(answered, logits, labels)
    assert (list(right), list(wrong)) == ([0, 4], [2, 3, 1])


def test_confusion_and_the_hardest_classes():
    matrix = confusion_matrix(np.array([0, 0, 0, 1, 1, 2]), np.array([0, 2, 2, 1, 0, 2]), 3)
    assert matrix.tolist() == [[1, 0, 2], [1, 1, 0], [0, 0, 1]]
    worst = worst_classes(matrix, ("ant", "bee", "cat"))
    assert [tuple(row) for row in worst] == [("ant", 3, 1 / 3, "cat", 2), ("bee", 2, 0.5, "ant", 1)]


def test_names_are_shown_as_they_are():
    """Neither the page's nor the pictures' language takes part of a class's name for its own."""
    svg = charts.confusion(np.eye(2, dtype=int), ["<i>a</i> & $b$", "c_d"])
    assert "&lt;i&gt;a&lt;/i" in svg and "$b$" in svg
    table = {"title": "<b>", "figures": [Figure("top1", "accuracy")], "groups": [], "rows": [], "cells": []}
    page = {"tables": [table | {"about": "", "about_curve": ""}], "charts": {"curve 0": svg}, "confidence": "95%"}
    text = render("compare.html", page)
    assert "&lt;b&gt;" in text and "<b>" not in text and "&lt;i&gt;a&lt;/i" in text


def test_inspection_counts_what_training_makes(run, tmp_path, capsys):
    config, workdir, _ = run
    result = inspect(config, tmp_path)
    params = load_classifier(workdir).params
    sizes = {name: sum(leaf.size for leaf in leaves(part)) for name, part in params.items()}
    assert result["parameters"] == sizes
    assert result["images"] == {"train": 1437, "test": 360} and result["classes"] == 10
    assert result["steps"] == load_classifier(workdir).step
    page, printed = Page(tmp_path / "inspect.html"), capsys.readouterr().out
    assert page.loaded == [] and "mlp" in printed and "attention" in page.text
    data = (tmp_path / "inspect.html").read_text()
    assert data.count("data:image/png") == 10 * 6


def leaves(tree) -> list[np.ndarray]:
    return [leaf for value in tree.values() for leaf in (leaves(value) if isinstance(value, dict) else [value])]


def finished(folder: Path, top1: float, result: dict | None = None, **config) -> Path:
    """What a finished run leaves, made up; `result` changes what its train.json says."""
    folder.mkdir()
    settings = dblock_digits.get_config().to_dict() | config
    (folder / "config.json").write_text(json.dumps(settings))
    scored = {"mode": "train", "top1": top1, "macro_f1": top1 / 2, "cross_entropy": 1 - top1}
    found = scored | {"step": 10, "checkpoint": 10} | (result or {})
    (folder / "train.json").write_text(json.dumps(found))
    lines = [{"step": step, "blocks": {"0": {"ce": 1 / step}, "1": {"ce": 3 / step}}} for step in (1, 2, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("field", ["num_blocks", "num_layers"])
def test_a_number_of_blocks_that_is_no_number_is_named(tmp_path, field):
    with pytest.raises(UserError, match=r"the files in .*a are not what a run writes \(Type"):
        compare([finished(tmp_path / "a", 0.5, **{field: "x"})], tmp_path / "out")


def test_runs_that_differ_in_their_seed_are_one_setting(tmp_path, capsys):
    runs = [
        finished(tmp_path / "a", 0.5, seed=1, num_blocks=2),
        finished(tmp_path / "b", 0.75, seed=1, num_blocks=3, postfix="_b"),
        finished(tmp_path / "c", 0.7, seed=2, num_blocks=2, idle_blocks="host"),
    ]
    (runs[1] / "report.json").write_text(json.dumps({"checkpoint": 10, "accuracy_by_num_steps": {"1": 0.5, "3": 0.75}}))
    best, other = compare([*runs, runs[0]], tmp_path / "out")["groups"]  # named twice, counted once
    assert (best["fields"], best["seeds"], best["accuracy"]) == ({"num_blocks": 3}, [1], "75.0 %")
    assert (other["fields"], other["seeds"]) == ({"num_blocks": 2}, [1, 2])
    assert other["top1_mean"] == pytest.approx(0.6) and other["top1_std"] == pytest.approx(0.2 / 2**0.5)
    assert other["accuracy"] == "60.0 ± 14.1 %" and other["cross_entropy_mean"] == pytest.approx(0.4)
    page = Page(tmp_path / "out" / "compare.html")
    assert page.loaded == [] and page.pictures == 3
    printed = capsys.readouterr().out
    assert all(text in printed and text in page.text for text in ("75.0 %", "60.0 ± 14.1 %", "0.400"))


FIELDS = {
    "num_blocks": 3,
    "num_epochs": 33,
    "lr": 1e-4,
    "weighting": "per_sample",
    "scheduler_type": "cosine_with_min_lr",
}


def test_what_tells_runs_apart_comes_first(tmp_path):
    """However many fields it is: setting and accuracy are the first columns of the one table of settings."""
    runs = [finished(tmp_path / "a", 0.5), finished(tmp_path / "b", 0.75, **FIELDS)]
    compare(runs, tmp_path)
    heads = re.findall("<th[^>]*>(.*?)</th>", (tmp_path / "compare.html").read_text().split("</table>")[0])
    assert heads[:3] == ["#", "setting", "accuracy"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_a_telephone_shows_what_decides(tmp_path):
    """At 420 pixels the page is no wider than the screen, and the accuracy lies on it."""
    runs = [finished(tmp_path / "a", 0.5), finished(tmp_path / ("b" * 60), 0.75, **FIELDS)]
    compare(runs, tmp_path)
    measure = "parent.document.title = [innerWidth, document.documentElement.scrollWidth, ...Array.from("
    measure += "document.querySelectorAll('tr > :nth-child(3)'), e => Math.ceil(e.getBoundingClientRect().right))]"
    page = (tmp_path / "compare.html").read_text().replace("</body>", f"<script>{measure}</script></body>")
    frame = tmp_path / "telephone.html"  # for a browser's own window has a least width
    frame.write_text(f'<iframe style="width: 420px; height: 900px; border: 0" srcdoc="{escape(page)}"></iframe>')
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    shown = subprocess.run([*browser, frame.as_uri()], capture_output=True, text=True, timeout=60, check=True).stdout
    screen, *edges = map(int, re.findall(r"<title>([\d,]+)</title>", shown)[0].split(","))
    assert screen == 420 and len(edges) == 7 and max(edges) <= screen


def test_runs_of_other_images_are_another_table(tmp_path, capsys):
    """And a run without a log, as a merged one is, can be compared."""
    runs = [
        finished(tmp_path / name, top1, dataset=dataset, data_dir=data_dir, num_blocks=num_blocks)
        for name, top1, dataset, data_dir, num_blocks in [
            ("a", 0.4, "folder", "cats", 1), ("b", 0.9, "digits", "cats", 3), ("c", 0.6, "folder", "dogs", 1),
            ("d", 0.5, "folder", "cats", 3),
        ]
    ]  # fmt: skip
    (runs[0] / "metrics.jsonl").unlink()
    groups = compare(runs, tmp_path / "out")["groups"]
    assert [(group["dataset"], group["fields"], group["top1_mean"]) for group in groups] == [
        ("folder cats", {"num_blocks": 3}, 0.5), ("folder cats", {"num_blocks": 1}, 0.4), ("digits", {}, 0.9),
        ("folder dogs", {}, 0.6),
    ]  # fmt: skip
    printed, page = capsys.readouterr().out, Page(tmp_path / "out" / "compare.html")
    for dataset in ("folder cats", "digits", "folder dogs"):
        assert dataset in printed and dataset in page.text
    assert page.pictures == 6


def test_results_on_other_numbers_of_images_are_not_ranked_together(tmp_path):
    """Somebody has added test images to the folder meanwhile."""
    runs = [finished(tmp_path / name, 0.5, {"num_images": count}) for name, count in (("a", 360), ("b", 1361))]
    groups = compare(runs, tmp_path / "out")["groups"]
    assert [group["dataset"] for group in groups] == ["digits, 360 images", "digits, 1,361 images"]


def test_one_seed_is_said_to_be_one(tmp_path, capsys):
    """Two runs of it are no sample of seeds: they have no deviation, and weigh as much as one run of another."""
    twice = [finished(tmp_path / name, top1, seed=1) for name, top1 in (("a", 0.5), ("b", 0.75))]
    [group] = compare(twice, tmp_path / "out")["groups"]
    assert (group["accuracy"], group["top1_std"], group["seeds"], len(group["runs"])) == ("62.5 %", None, [1], 2)
    assert "1, 2 runs" in capsys.readouterr().out and "1 (2 runs)" in Page(tmp_path / "out" / "compare.html").text
    [group] = compare([*twice, finished(tmp_path / "c", 0.875, seed=2)], tmp_path / "out")["groups"]
    assert group["seeds"] == [1, 2] and group["top1_mean"] == pytest.approx((0.625 + 0.875) / 2)
    assert group["top1_std"] == pytest.approx(0.25 / 2**0.5)


def test_runs_that_diverged_are_listed_and_the_others_ranked(tmp_path, capsys):
    """One says so by a field of its own, one as older ones did, and neither counts in a mean."""
    none = {"cross_entropy": None, "top1": 0.1}
    runs = [
        finished(tmp_path / "a", 0.0, none | {"diverged": True}, lr=1e25),
        finished(tmp_path / "b", 0.5, seed=1),
        finished(tmp_path / "c", 0.1, none, seed=2),
        finished(tmp_path / "d", 0.75, num_blocks=1),
    ]
    best, second, last = compare(runs, tmp_path / "out")["groups"]
    assert (best["top1_mean"], best["diverged"]) == (0.75, [])
    assert (second["top1_mean"], second["seeds"], second["diverged"]) == (0.5, [1], [str(runs[2])])
    assert (last["accuracy"], last["top1_mean"], last["runs"], last["diverged"]) == (
        "diverged", None, [], [str(runs[0])],
    )  # fmt: skip
    printed, page = capsys.readouterr().out, Page(tmp_path / "out" / "compare.html")
    assert "1, 1 diverged" in printed and "diverged" in page.text and page.pictures == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train.json", '{"mode": "train", "top1": "0.9"}', r"a/train.json: top1 is '0.9', which no run writes"),
        ("train.json", '{"mode": "train", "top1": 90}', "a/train.json: top1 is 90, which no run writes"),
        ("train.json", '{"top1": 0.5, "cross_entropy": NaN}', "cross_entropy is nan, which no run writes"),
        ("train.json", '{"top1": 0.5, "sampler": [1]}', r"sampler is \[1\], which no run writes"),
        ("train.json", '{"mode": "train", "top1": 0.9}', r"the files in .*a are not what a run writes \(KeyError"),
        ("train.json", '["top1"]', "a/train.json cannot be read .*it holds a list"),
        ("train.json", "[" * 100_000, "a/train.json cannot be read .*RecursionError"),
        ("config.json", '{"a":' * 100_000, "a/config.json cannot be read .*RecursionError"),
        ("config.json", "{}", r"the files in .*a are not what a run writes \(KeyError: 'dataset'"),
        ("data.json", '{"images": "many", "class_names": []}', "a/data.json cannot be read .*lacks"),
        ("report.json", '{"accuracy_by_num_steps": {"x": 1}}', "a/report.json: accuracy_by_num_steps is .*no run"),
        ("metrics.jsonl", '{"step": 1, "blocks": {"0": 7}}', r"the files in .*a are not what a run writes"),
    ],
)
def test_what_no_run_writes_is_named(tmp_path, name, text, message):
    """A stranger's folder beside a sound one: one line says which file it is."""
    run = finished(tmp_path / "a", 0.5)
    (run / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        compare([finished(tmp_path / "b", 0.6), run], tmp_path / "out")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_lines_that_no_run_writes_are_left_out(tmp_path):
    run = finished(tmp_path / "a", 0.5)
    deep = '{"step": 3, "blocks": ' + "[" * 100_000
    (run / "metrics.jsonl").write_text(f'{deep}\n{{"step": {10**400}}}\n[1]\n{{"step": 2, "blocks": {{}}}}\n')
    assert [line["step"] for line in logged(run)] == [2]
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "split": "val", "top1": "a"}\n{"step": 2, "split": "val", "top1": 1}'
    )
    assert scores(run, "val", "top1") == {2: 1.0}
    (run / "starts.jsonl").write_text(f'{deep}\n{{"time": 1}}\n3\n')
    assert read_starts(run) == []


def test_what_cannot_be_compared_is_named(tmp_path):
    with pytest.raises(UserError, match="none holds no run"):
        compare([tmp_path / "none"], tmp_path)
    run = finished(tmp_path / "a", 0.5)
    (run / "train.json").unlink()
    with pytest.raises(UserError, match="a is not finished: it has no train"):
        compare([run], tmp_path)
    (run / "eval.json").write_text(json.dumps({"mode": "eval", "top1": 0.1, "sampler": {"num_inference_steps": 1}}))
    with pytest.raises(UserError, match="a was scored with another sampler"):
        compare([run], tmp_path)
    longer = finished(tmp_path / "b", 0.5)
    (longer / "data.json").write_text(json.dumps({"images": 1437, "class_names": []}))
    with pytest.raises(UserError, match="b is not finished: its result is of step 10 of 3300"):
        compare([longer], tmp_path)


def test_curves_leave_out_what_is_missing():
    """A window in which all steps were skipped has no mean; the line goes on behind it."""
    svg = charts.over_steps({"block 0": ([1, 2, 3], [1.0, None, 0.5])}, ["black"], "loss")
    assert "nan" not in svg.lower().replace("dominant", "")

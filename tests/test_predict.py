"""A trained model in use: from a batch of images, and from files."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from playing import frames, mistake, pixels_of, png, send, served
from rich.cells import cell_len
from scipy.special import log_softmax, softmax
from test_pages import Page

from configs import dblock_digits
from dblocks_jax.modes import demo
from dblocks_jax.modes.evaluate import evaluate_run
from dblocks_jax.modes.load import load_classifier, load_trained
from dblocks_jax.modes.predict import describe, find_images, predict, print_table
from dblocks_jax.modes.train import train
from dblocks_jax.run.errors import NOT_FINITE, UserError
from dblocks_jax.tasks.classify.classifier import make_classifier
from dblocks_jax.tasks.classify.denoiser import join
from dblocks_jax.tasks.images import find_dataset

TINY = {
    "num_layers": 2, "hidden_size": 12, "num_heads": 2, "intermediate_size": 16, "num_blocks": 2, "batch_size": 600,
    "num_epochs": 2, "num_warmup_steps": 0, "init_noise_scale": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = dblock_digits.get_config()
    config.update(TINY)
    workdir = tmp_path_factory.mktemp("run")
    return config, workdir, train(config, workdir, command=[], overrides={})


@pytest.fixture(scope="module")
def test_split(run):
    return find_dataset(run[0]).split("test")


def save_as_png(folder: Path, images: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(folder / f"{i:03d}.png")


def test_a_loaded_classifier_scores_as_the_run_was_scored(run, test_split):
    """Without the data set, in any number of batches that begin at the first image."""
    _, workdir, result = run
    classifier = load_classifier(workdir)
    images = test_split.images(np.arange(len(test_split)))
    logits = np.asarray(classifier(images))
    assert logits.shape == (360, 10) and classifier.card.class_names == tuple("0123456789")
    assert np.mean(np.argmax(logits, axis=-1) == test_split.labels) == result["top1"]
    by_step = np.asarray(classifier.by_step(images[:50]))
    assert len(by_step) == len(result["accuracy_by_step"])
    np.testing.assert_allclose(by_step[-1], logits[:50], rtol=0, atol=1e-5)


def test_joined_answers_begin_as_the_sampler_without_noise_does(run, test_split):
    """Its first step asks block 0 at z = 0 and the most noise, and so does the first of the answers that are joined."""
    trained = load_trained(run[1])

    def answered(answer: str) -> np.ndarray:
        config = ConfigDict({**trained.config.to_dict(), "init_noise_scale": 0.0, "answer": answer})
        classify = make_classifier(config, trained.blueprint, trained.card)
        return np.asarray(classify(trained.params, test_split.images(np.arange(20)), np.arange(20)))

    without_noise, joined = answered("sampler"), answered("joined")
    assert without_noise.shape == joined.shape == (2, 20, 10)
    np.testing.assert_allclose(joined[0], log_softmax(without_noise[0], axis=-1), rtol=0, atol=1e-5)
    assert np.abs(joined[1] - log_softmax(without_noise[1], axis=-1)).max() > 1e-3  # which hears the first one's guess


def test_joined_answers_are_mean_log_probabilities_in_whatever_order():
    logits = jax.random.normal(jax.random.key(0), (3, 4, 5))
    joined = np.asarray(join(logits))
    np.testing.assert_allclose(joined[0], log_softmax(logits[0], axis=-1), atol=1e-6)
    np.testing.assert_allclose(joined[-1], log_softmax(logits, axis=-1).mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(joined[-1], join(logits[::-1] + 7)[-1], atol=1e-5)


def test_images_of_another_shape_are_refused(run):
    with pytest.raises(UserError, match=r"images must be uint8 \[b, 8, 8, 1\], not uint8 \[1, 9, 8, 1\]"):
        load_classifier(run[1])(np.zeros((1, 9, 8, 1), np.uint8))


def test_files_are_classified_as_the_arrays_they_were_made_of(run, test_split, tmp_path):
    """PNG keeps every pixel. A batch that is not full changes nothing."""
    config, workdir, _ = run
    images = test_split.images(np.arange(7))
    save_as_png(tmp_path / "some" / "deeper", images)
    result = predict(
        config, workdir, [str(tmp_path / "some")], overrides={"eval_batch_size": 4}, checkpoint="last"
    )  # fmt: skip
    records = json.loads(Path(result["predictions"]).read_text())
    assert result["num_images"] == len(records) == 7
    logits = np.asarray(load_classifier(workdir).by_step(images), np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    for i, record in enumerate(records):
        assert record["image"].endswith(f"deeper/{i:03d}.png")
        answer = int(np.argmax(expected[-1, i]))
        assert record["top5"][0]["label"] == str(answer)
        found = [step["probability_of_answer"] for step in record["by_step"]]
        np.testing.assert_allclose(found, expected[:, i, answer], rtol=0, atol=1e-5)
    assert [step["block"] for step in records[0]["by_step"]] == [0, 1]


def test_describe_ranks_classes_and_follows_the_answer():
    believed = np.array([[0.7, 0.1, 0.2, 0.0, 0.0, 0.0], [0.1, 0.3, 0.25, 0.2, 0.1, 0.05]], np.float32)
    described = describe("x.png", believed, "abcdef", [{"block": 0}, {"block": 1}])
    assert [entry["label"] for entry in described["top5"]] == ["b", "c", "d", "a", "e"]
    assert [step["label"] for step in described["by_step"]] == ["a", "b"]
    assert [step["probability_of_answer"] for step in described["by_step"]] == pytest.approx([0.1, 0.3])
    assert [step["probability"] for step in described["by_step"]] == pytest.approx([0.7, 0.3])


def test_colour_images_of_any_size_reach_a_grey_model(run, tmp_path):
    """A grey picture, saved in colour at five times the size, is the same picture."""
    config, workdir, _ = run
    grey = np.zeros((40, 40, 3), np.uint8)
    grey[:, 20:] = 255
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(np.repeat(grey[::5, ::5, :1], 1, axis=2)[..., 0]).save(tmp_path / "b.png")
    names = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    predict(config, workdir, names, overrides={"init_noise_scale": 0.0}, checkpoint="last")
    a, b = json.loads((workdir / "predictions.json").read_text())
    assert a["top5"][0]["label"] == b["top5"][0]["label"]
    assert a["top5"][0]["probability"] == pytest.approx(b["top5"][0]["probability"], abs=0.02)


def test_what_is_no_image_is_named(run, tmp_path):
    config, workdir, _ = run
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    for names, message in [
        ([str(tmp_path / "none.png")], "there is no image .*none.png"),
        ([str(tmp_path / "empty")], "empty holds no image"),
        ([], "needs --images"),
        (["x" * 5000], "there is no image"),
        ([str(tmp_path / "torn.png")], "cannot read the image .*torn.png"),
    ]:
        with pytest.raises(UserError, match=message):
            predict(config, workdir, names, overrides={}, checkpoint="last")


def test_images_are_found_in_the_order_of_their_paths(tmp_path):
    for name in ("b/2.png", "b/1.jpg", "a.JPEG", "notes.txt", "__MACOSX/._1.jpg", "b/.hidden.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "folder.png").mkdir()
    found = find_images([str(tmp_path), str(tmp_path / "notes.txt")])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.JPEG", "b/1.jpg", "b/2.png", "notes.txt"]


def a_record(name: str, label: str = "cat", steps: int = 1) -> dict:
    return describe(name, np.eye(2)[[0] * steps], (label, "b"), [{}] * steps)


def test_names_are_printed_as_they_are(capsys):
    """Brackets take no part in the table's own language; bytes that are no text and control characters are escaped."""
    print_table([a_record("set[/test]/caf\udce9[a].png", "[red]"), a_record("\x1b[2J\n", "\x1b[1m")])
    printed = capsys.readouterr().out
    assert r"set[/test]/caf\xe9[a].png" in printed and "[red]" in printed
    assert r"\x1b[2J\n" in printed and r"\x1b[1m" in printed and "\x1b" not in printed


def test_a_pipe_gets_whole_names_and_a_terminal_their_ends(capsys, monkeypatch):
    names = [f"{'some/deep folder/' * 20}{i:03d}.png" for i in range(3)] + ["日本語/" * 30 + "猫.png"]
    records = [a_record(name, "a class", steps=2) for name in names]
    monkeypatch.setenv("COLUMNS", "80")
    print_table(records)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split("  ")[0].strip() for line in lines] == names
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    print_table(records)
    printed = capsys.readouterr().out
    lines = re.sub(r"\x1b\[[0-9;]*m", "", printed).splitlines()
    assert len(lines) == 1 + len(names) and max(map(cell_len, lines)) <= 80
    for line, name in zip(lines[1:], names, strict=True):
        cut = line.strip().split("  ")[0]
        assert cut.startswith("…") and name.endswith(cut[1:]) and len(cut) > 8
        assert "a class" in line and "100.0% > 100.0%" in line
    monkeypatch.setenv("COLUMNS", "40")
    print_table(records)
    printed = capsys.readouterr().out
    assert all(f"{i:03d}.png" in printed for i in range(3))


def test_many_steps_are_told_by_three(capsys):
    print_table([a_record("a.png", steps=1000)])
    assert "100.0% > ... > 100.0% > ... > 100.0%" in capsys.readouterr().out.splitlines()[1]


def test_evaluation_and_the_loaded_classifier_agree_about_the_checkpoint(run):
    config, workdir, result = run
    scored = evaluate_run(config, workdir, overrides={}, checkpoint="best")
    assert scored["top1"] == result["top1"] and scored["checkpoint"] == load_classifier(workdir).step


@pytest.mark.long
def test_a_page_answers_as_the_classifier_does(run, test_split, tmp_path):
    """Its test images are of the split, and an image comes to the model as it is."""
    trained, image = load_trained(run[1]), test_split.images(np.array([7]))
    with served(demo.open_server(trained, "a <run>", 0)) as server:
        found = frames(server, {"image": png(image[0])})
        assert "neither a JPEG nor a PNG" in mistake(server, {"image": "aGVsbG8="})
        (tmp_path / "page.html").write_text(send(server, b"", method="GET", path="/")[1])
        trained.params.update(jax.tree.map(lambda array: jnp.full_like(array, jnp.nan), trained.params))
        assert mistake(server, {"image": png(image[0])}, 500) == NOT_FINITE
    expected = softmax(np.asarray(load_classifier(run[1]).by_step(image))[:, 0], axis=-1)
    assert [frame["block"] for frame in found] == [0, 1] and [frame["step"] for frame in found] == [1, 2]
    for frame, probabilities in zip(found, expected, strict=True):
        np.testing.assert_array_equal(pixels_of(frame["seen"]), image[0, ..., 0])
        assert [e["probability"] for e in frame["likeliest"]] == pytest.approx(np.sort(probabilities)[:-6:-1], rel=1e-5)
        assert all(probabilities[int(e["label"])] == pytest.approx(e["probability"]) for e in frame["likeliest"])
    page = Page(tmp_path / "page.html")
    assert page.loaded == [] and "a <run>" in page.text

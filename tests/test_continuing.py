"""A decoder, once trained: scores, what it writes, report, export and a text that it reads say one thing."""

import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import export
from ml_collections import ConfigDict
from playing import frames, mistake, send, served
from test_pages import Page, needed_without_compiling
from test_writing import text_of

from dblocks_jax.fields import next_token, recurrent
from dblocks_jax.modes import demo
from dblocks_jax.modes.continuing import continue_text, write_on
from dblocks_jax.modes.evaluate import evaluate_run
from dblocks_jax.modes.export import export_run
from dblocks_jax.modes.in_use import draw_images, score_text, write_texts
from dblocks_jax.modes.inspect import inspect
from dblocks_jax.modes.load import load_trained
from dblocks_jax.modes.reading import predict_text
from dblocks_jax.modes.report import report
from dblocks_jax.modes.train import train
from dblocks_jax.run.errors import UserError
from dblocks_jax.run.workdir import finish

TINY = {
    "dataset": "text_file", "text_length": 8, "num_layers": 2, "num_blocks": 2, "hidden_size": 8, "num_heads": 2,
    "intermediate_size": 16, "batch_size": 100, "num_epochs": 1, "lr": 1e-2, "log_every_n_steps": 1,
    "save_every_n_epochs": 1, "score_samples": 10, "temperature": 0.0,
}  # fmt: skip
OF_ONE_BLOCK = {"num_layers": 3, "num_blocks": 1, "prelude_layers": 1, "coda_layers": 1, "num_inference_steps": 3}
TASKS = [(next_token, {}), pytest.param((recurrent, OF_ONE_BLOCK), marks=pytest.mark.long)]
ANSWER = {"overrides": {}, "checkpoint": "best"}


@pytest.fixture(scope="module", params=TASKS, ids=["next_token", "recurrent"])
def run(request, tmp_path_factory) -> tuple[ConfigDict, Path, dict]:
    task, fields = request.param
    folder: Path = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(text_of(1000))
    config = task.get_config()
    config.update(TINY | fields | {"data_dir": str(folder / "text.txt")})
    trained = train(config, folder / "run", command=["launch.py"], overrides={})
    finish(folder / "run", trained)
    return config, folder / "run", trained


def test_training_evaluation_and_report_score_alike(run, monkeypatch):
    config, workdir, trained = run
    plain = {"next_token": "llama", "recurrent": "huginn"}[config.task]
    asked = needed_without_compiling(monkeypatch)
    scored, told = evaluate_run(config, workdir, **ANSWER), report(config, workdir, **ANSWER)
    names = {"bits", "num_sequences", "distinct_2", "repetition_data", "known_words"}
    for found in (scored, told):
        assert {name: found[name] for name in names} == {name: trained[name] for name in names}
    page = Page(workdir / "report.html")
    assert page.loaded == [] and page.pictures == 5  # noise, loss, cross-entropy, bits kept apart, memory
    assert [each.model_type for each in asked] == [plain, "dblock"] and "averages" not in page.text  # it keeps none
    assert f"{trained['bits']:.4f}" in page.text and f"{trained['known_words_data']:.1%}" in page.text
    written = (workdir / "samples.txt").read_text().splitlines()
    assert len(written) == 10 and written[0] in page.text.replace("\n", "")


def test_the_text_is_inspected(run, tmp_path):
    config, workdir, _ = run
    result = inspect(config, tmp_path)
    params = load_trained(workdir).params
    assert result["parameters"] == {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
    assert result["vocabulary"] == 27 and Page(tmp_path / "inspect.html").loaded == []


@pytest.mark.long
def test_a_page_goes_on_from_a_text(run, tmp_path):
    """Token by token, as `--mode=sample` does."""
    trained = load_trained(run[1])
    vocabulary = trained.card.vocabulary
    prompt = vocabulary.encode("hen")
    with served(demo.open_server(trained, "run", 0)) as server:
        found = frames(server, {"text": "hen", "number": 0})
        for text, told in (("", "the text is empty"), ("ant bees", "with what follows the model sees 8")):
            assert told in mistake(server, {"text": text, "number": 0})
        (tmp_path / "page.html").write_text(send(server, b"", method="GET", path="/")[1])
    written = vocabulary.decode(write_on(trained, prompt[None], 5)[0])
    assert [frame["text"] for frame in found] == [written[:i] for i in range(1, 6)]
    for frame in found:
        shares = [each["probability"] for each in frame["likeliest"]]
        assert len(shares) == 5 and shares == sorted(shares, reverse=True) and sum(shares) < 1
        assert frame["symbol"] == frame["likeliest"][0]["label"]  # at temperature 0
    assert Page(tmp_path / "page.html").loaded == []


def test_a_text_is_gone_on_from(run):
    """Greedily, so the samples are alike where a token's noise says nothing; what is given stays."""
    config, workdir, _ = run
    found = continue_text(config, workdir, text="ant", count=3, **ANSWER)
    assert len(found["texts"]) == 3 and all(len(text) == 8 and text.startswith("ant") for text in found["texts"])
    assert found["texts"] == continue_text(config, workdir, text="ant", count=3, **ANSWER)["texts"]
    for text, message in (("", "the text is empty"), ("ant bee ", "the text has 8 tokens")):
        with pytest.raises(UserError, match=message):
            continue_text(config, workdir, text=text, count=1, **ANSWER)


def test_what_is_written_is_likely_to_the_reader(run):
    """The likeliest of 27 letters has at least their mean probability, and the product of all is the bits.

    The reader takes several spaces for one.
    """
    trained = load_trained(run[1])
    [text] = write_texts(trained, 1, "ant")
    found = score_text(trained, text)
    each = [token["probability"] for token in found["tokens"]]
    assert "".join(token["symbol"] for token in found["tokens"]) == re.sub(" +", " ", text)[1:]
    assert each[2] >= 1 / 27  # the first that was written
    assert found["bits"] == pytest.approx(-sum(map(math.log2, each)) / len(each))
    with pytest.raises(UserError, match=r"a model of the task \w+ on text_file draws no images"):
        draw_images(trained, np.zeros(1, int))
    with pytest.raises(UserError, match=r"count must lie in \[1, 10,000\], not 0"):
        write_texts(trained, 0)


@pytest.mark.long
def test_what_is_exported_gives_the_probabilities_that_a_text_is_read_with(run):
    """The program on a padded text, against --mode=predict; their product is the bits."""
    config, workdir, _ = run
    export_run(config, workdir, **ANSWER)
    program = export.deserialize(bytearray((workdir / "export" / "decoder.stablehlo").read_bytes()))
    tokens = np.full((1, 8), 5, np.int32)
    tokens[0, :3] = [1, 14, 20]  # ant
    log_p = np.asarray(jax.nn.log_softmax(program.call(tokens)))[0]
    found = predict_text(config, workdir, "ant", **ANSWER)
    assert [each["symbol"] for each in found["tokens"]] == ["n", "t"]
    expected = [math.exp(log_p[0, 14]), math.exp(log_p[1, 20])]
    assert [each["probability"] for each in found["tokens"]] == pytest.approx(expected, rel=1e-4)
    assert found["bits"] == pytest.approx(-math.log2(expected[0] * expected[1]) / 2, rel=1e-4)
    assert "predictions" in found and load_trained(workdir / "export").step == found["checkpoint"]
    with pytest.raises(UserError, match="from 2 to 8"):
        predict_text(config, workdir, "a", **ANSWER)

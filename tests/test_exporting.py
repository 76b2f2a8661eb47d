"""What is handed on gives the same answers elsewhere."""

import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from ml_collections import ConfigDict
from runs import ROOT
from safetensors.numpy import load_file, save

from configs import dblock_digits, vit_digits
from dblocks_jax.modes import demo
from dblocks_jax.modes.export import PROGRAMS, export_run, largest_difference, on_record, write_weights
from dblocks_jax.modes.load import load_classifier, load_trained
from dblocks_jax.modes.train import train
from dblocks_jax.run.errors import UserError
from dblocks_jax.run.workdir import finish, write_json

TINY = {
    "num_layers": 2, "hidden_size": 12, "num_heads": 2, "intermediate_size": 16, "num_blocks": 2, "batch_size": 600,
    "num_epochs": 2, "num_warmup_steps": 0, "init_noise_scale": 1.0, "data_dir": "/home/somebody",
}  # fmt: skip

ELSEWHERE = """
import sys
import numpy as np
from jax import export
program, images, logits = sys.argv[1:]
classifier = export.deserialize(bytearray(open(program, "rb").read()))
images = np.load(images)
np.save(logits, np.concatenate([np.asarray(classifier.call(images[:n])) for n in (1, 5)]))
assert not any(name.startswith(("dblocks_jax", "flax", "orbax")) for name in sys.modules)
"""


@pytest.fixture(scope="module", params=[pytest.param("isolated", marks=pytest.mark.long), "vit"])
def exported(request, tmp_path_factory):
    config = (vit_digits if request.param == "vit" else dblock_digits).get_config()
    config.update(TINY)
    if request.param == "isolated":
        config.update(sharing="isolated", idle_blocks="host", block_schedule="chunked")
    workdir = tmp_path_factory.mktemp("run")
    trained = train(config, workdir, command=[], overrides={})
    finish(workdir, trained)
    return workdir, trained, export_run(config, workdir, overrides={}, checkpoint="best")


def images_of(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 8, 8, 1), np.uint8)


def test_the_program_alone_classifies_any_number_of_images(exported, tmp_path):
    """In a process that has imported jax and nothing of ours."""
    workdir, _, _ = exported
    np.save(tmp_path / "images.npy", images_of(5))
    program = str(workdir / "export" / "classifier.stablehlo")
    files = [program, str(tmp_path / "images.npy"), str(tmp_path / "logits.npy")]
    subprocess.run([sys.executable, "-I", "-c", ELSEWHERE, *files], cwd=tmp_path, check=True, timeout=120)
    classifier = load_classifier(workdir)
    expected = np.concatenate([np.asarray(classifier(images_of(5)[:count])) for count in (1, 5)])
    assert np.abs(expected).max() > 1e-3  # two steps have taught the head something
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, rtol=0, atol=1e-5)


def test_an_exported_folder_is_opened_to_be_played_with(exported):
    """Without a config; the command's fields of the sampler hold, and others may not differ."""
    workdir, trained, _ = exported
    opened = demo.load(None, workdir / "export", overrides={"init_noise_scale": 0.5}, checkpoint="best")
    assert opened.step == trained["checkpoint"] and opened.task.config.init_noise_scale == 0.5
    with pytest.raises(UserError, match="num_layers=5 contradicts the checkpoint"):
        demo.load(None, workdir / "export", overrides={"num_layers": 5}, checkpoint="best")


def test_the_weights_load_by_name_and_classify_alike(exported):
    workdir, trained, result = exported
    assert result["checkpoint"] == trained["checkpoint"] and result["largest_difference_of_logits"] <= 1e-5
    arrays = load_file(workdir / "export" / "model.safetensors")
    params = load_classifier(workdir).params
    assert len(arrays) > 20
    for name, array in arrays.items():
        leaf = params
        for key in name.split("."):
            leaf = leaf[int(key) if key.isdecimal() else key]
        np.testing.assert_array_equal(array, leaf)
    again = load_classifier(workdir / "export")
    np.testing.assert_allclose(again(images_of(3)), load_classifier(workdir)(images_of(3)), rtol=0, atol=1e-5)
    assert again.card == load_classifier(workdir).card and again.step == trained["checkpoint"]


def test_the_card_is_what_a_hub_reads(exported):
    workdir, trained, _ = exported
    text = (workdir / "export" / "README.md").read_text()
    facts = yaml.safe_load(text.split("---\n")[1])
    assert facts["pipeline_tag"] == "image-classification" and facts["metrics"] == ["accuracy"]
    [result] = facts["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": trained["top1"]}]
    assert f"{trained['top1']:.1%} on the test split" in text


def test_what_is_handed_on_tells_nothing_of_the_machine_and_is_for_everybody(exported):
    paths = list((exported[0] / "export").iterdir())
    assert len(paths) == 4
    for path in paths:
        content = path.read_bytes()
        for private in ("/home/somebody", str(ROOT), str(Path(sys.executable).parents[1]), str(exported[0].parent)):
            assert private.encode() not in content, path
    assert len({path.stat().st_mode for path in paths}) == 1  # the umask's, whichever library wrote it


def test_where_a_run_began_and_who_judged_it_is_not_handed_on(exported, tmp_path):
    trained = load_classifier(exported[0]).trained
    places = {"begin_from": "/home/somebody/run", "judge": "/home/somebody/judge"}
    write_weights(replace(trained, config=ConfigDict({**trained.config.to_dict(), **places})), tmp_path)
    assert all(b"somebody" not in path.read_bytes() for path in tmp_path.iterdir())


def test_an_export_whose_program_gives_no_numbers_is_noticed(exported, monkeypatch):
    trained = load_classifier(exported[0]).trained
    monkeypatch.setattr(PROGRAMS["classify"], "difference", lambda *_: float("nan"))
    with pytest.raises(RuntimeError, match="they differ by nan"):
        largest_difference(trained, exported[0] / "export")


def test_the_accuracy_is_that_of_the_sampler_which_is_exported(exported, tmp_path):
    workdir, result, _ = exported
    for name in ("config.json", "train.json"):
        shutil.copy(workdir / name, tmp_path)
    trained = load_trained(workdir)
    longer = replace(trained, config=ConfigDict({**trained.config.to_dict(), "num_inference_steps": 5}))
    assert on_record(tmp_path, trained)["top1"] == result["top1"]
    assert on_record(tmp_path, replace(trained, step=trained.step - 1)) == {}
    if trained.config.model_type == "vit":
        assert on_record(tmp_path, longer)["top1"] == result["top1"]  # it has no sampler
        return
    assert on_record(tmp_path, longer) == {}
    write_json(tmp_path / "eval.json", result | {"top1": 0.125, "sampler": {"num_inference_steps": 5}})
    assert on_record(tmp_path, longer)["top1"] == 0.125
    assert on_record(tmp_path, trained)["top1"] == result["top1"]


def test_an_export_takes_the_place_of_an_older_one(exported):
    workdir, _, _ = exported
    (workdir / "export" / "old").touch()
    config = load_classifier(workdir).config
    export_run(config, workdir, overrides={}, checkpoint="last")
    names = {path.name for path in (workdir / "export").iterdir()}
    assert names == {"README.md", "classifier.stablehlo", "config.json", "model.safetensors"}
    assert not list(workdir.glob(".export*"))


def folder_of(tmp_path: Path, weights: bytes, about: bytes) -> Path:
    place = tmp_path / str(len(list(tmp_path.iterdir())))
    place.mkdir()
    (place / "model.safetensors").write_bytes(weights)
    (place / "config.json").write_bytes(about)
    return place


def test_a_folder_that_is_damaged_is_refused_by_name(exported, tmp_path):
    source = exported[0] / "export"
    arrays = load_file(source / "model.safetensors")
    name = next(name for name in arrays if name.endswith("head.kernel"))
    config = (source / "config.json").read_bytes()

    def folder(change: dict[str, np.ndarray | None], about: bytes = config) -> Path:
        changed = {key: value for key, value in (arrays | change).items() if value is not None}
        return folder_of(tmp_path, save(changed), about)

    with pytest.raises(UserError, match=r"expected float32\[12, 10\], found float32\[12, 9\]"):
        load_classifier(folder({name: arrays[name][:, :9].copy()}))
    with pytest.raises(UserError, match="more: expected nothing, found float32"):
        load_classifier(folder({"more": np.zeros(1, np.float32)}))
    with pytest.raises(UserError, match=r"config.json is not the one that --mode=export writes"):
        load_classifier(folder({}, json.dumps({"format": "another"}).encode()))
    with pytest.raises(UserError, match=rf"{name}: expected float32\[12, 10\], found nothing"):
        load_classifier(folder({name: None}))
    about = json.loads(config)
    del about["config"]["gamma"]
    with pytest.raises(UserError, match=r"config.json: the config has no field gamma"):
        load_classifier(folder({}, json.dumps(about).encode()))
    torn = folder({})
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:-50])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        load_classifier(torn)


def deep(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


def test_a_hostile_config_is_one_line(exported, tmp_path):
    source = exported[0] / "export"
    weights, about = (source / "model.safetensors").read_bytes(), json.loads((source / "config.json").read_text())
    nested: dict = {}
    for _ in range(400):  # json reads this
        nested = {"a": nested}

    def changed(part: str, **fields: object) -> bytes:
        return json.dumps(about | {part: about[part] | fields}).encode()

    for content, message in [
        (deep(100_000), "config.json can"),
        (json.dumps(about | {"config": nested}).encode(), "config.json: the config has no field num_layers"),
        (json.dumps(about | {"data": nested}).encode(), "is no card"),
        (json.dumps(about | {"step": 1e400}).encode(), "config.json cannot be used"),
        (changed("config", num_layers="two"), "config.json: num_layers must be a whole number"),
        (changed("config", num_layers=2.5), "config.json: num_layers must be a whole number"),
        (changed("config", scheduler_specific_kwargs="[" * 100_000), "scheduler_specific_kwargs is not JSON"),
        (changed("config", scheduler_specific_kwargs=nested), "scheduler_specific_kwargs must be a text"),
        (changed("config", **{"\x1b[2J": 1e300}), r"\\x1b\[2J must be a finite number"),
        (changed("config", image_size=16), r"images of \(8, 8, 1\), but image_size=16"),
        (changed("data", class_names=[1] * 10), "class_names that are no names"),
        (changed("data", mean=[0.1, 0.2]), "a mean that is no number for each channel"),
        (changed("data", std=[10**400]), "a std that is no number for each channel"),
        (changed("data", std=[0]), "a std that is not greater than 0"),
        (changed("data", image_shape=[8, 8]), "an image_shape that is not height, width, channels"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            load_classifier(folder_of(tmp_path, weights, content))
        assert len(str(error.value)) < 1000 and "\n" not in str(error.value)


def test_hostile_weights_are_named(exported, tmp_path):
    source = exported[0] / "export"
    about = (source / "config.json").read_bytes()
    arrays = load_file(source / "model.safetensors")
    name = min(arrays)  # messages name the first
    size = arrays[name].size

    def with_header(header: bytes) -> bytes:
        return struct.pack("<Q", len(header)) + header + b"0" * size

    def as_dtype(dtype: str) -> bytes:
        return with_header(json.dumps({name: {"dtype": dtype, "shape": [size], "data_offsets": [0, size]}}).encode())

    for weights, message in [
        (as_dtype("F8_E4M3"), rf"{name}: expected float32\[.*\], found F8_E4M3\[{size}\]"),
        (as_dtype("BOOL"), rf"{name}: expected float32\[.*\], found BOOL\[{size}\]"),
        (as_dtype("F7"), "cannot be read"),
        (with_header(deep(100_000)), "cannot be read"),
        (save(arrays | {"\x1b[2J\n": np.zeros(1)}), r"\n  \\x1b\[2J\\n: expected nothing, found float64\[1\]$"),
        (save(arrays | {str(i): np.zeros(1) for i in range(1000)}), r"\n  and 980 more$"),
        (b"", "it is empty"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            load_classifier(folder_of(tmp_path, weights, about))
        assert len(str(error.value)) < 3000


def test_a_pipe_in_an_exported_folder_is_not_waited_for(exported, tmp_path):
    shutil.copytree(exported[0] / "export", tmp_path / "export")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "export" / name).unlink()
        os.mkfifo(tmp_path / "export" / name)
        with pytest.raises(UserError, match=rf"{name}: it is a pipe, not a file"):
            load_classifier(tmp_path / "export")
        (tmp_path / "export" / name).unlink()
        shutil.copy(exported[0] / "export" / name, tmp_path / "export")


def test_loading_in_python_is_silent(exported, caplog, capfd):
    load_classifier(exported[0])
    assert not caplog.records
    assert capfd.readouterr() == ("", "")

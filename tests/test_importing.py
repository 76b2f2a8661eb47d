"""Checkpoints of the released program become runs."""

import os
import sys
from functools import partial

import golden
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import dblock_folder
from dblocks_jax.diffusion.sampler import initial_z
from dblocks_jax.models.reference import LABELS, PATCH_WEIGHT, to_reference
from dblocks_jax.modes import importing
from dblocks_jax.modes.evaluate import evaluate_run
from dblocks_jax.modes.importing import Released, import_released, read_checkpoint
from dblocks_jax.modes.load import Classifier, load_classifier, load_run
from dblocks_jax.modes.train import train
from dblocks_jax.run.errors import UserError
from dblocks_jax.tasks.classify import classifier
from dblocks_jax.tasks.classify.parts import from_modules

FIELDS = ("image_size", "patch_size", "num_layers", "hidden_size", "num_heads", "intermediate_size", "num_blocks")


@pytest.fixture(scope="module", params=golden.files("dblock_tiny.npz"))
def released(request):
    """What the golden checkpoint holds: the model after its training steps."""
    arrays, shapes = golden.load(request.param)
    return Released(golden.under(arrays, "train/final/"), {"num_blocks": 3, "gamma": 0.05}, 12), shapes


@pytest.fixture
def config(released, tmp_path):
    """A config of the golden model's sizes, for a folder with an image of each of its classes."""
    shapes = released[1]
    for split in ("train", "test"):
        for label in range(10):
            folder = tmp_path / "images" / split / f"class {label}"
            folder.mkdir(parents=True)
            Image.fromarray(np.full((20, 20, 3), 25 * label, np.uint8)).save(folder / "a.png")
    config = dblock_folder.get_config()
    config.update({field: getattr(shapes, field) for field in FIELDS})
    config.update(data_dir=str(tmp_path / "images"), batch_size=2)
    return config


def start_import(config, workdir):
    return import_released(config, workdir, workdir / "last.ckpt", command=[], overrides={})


@pytest.mark.long
def test_an_imported_run_has_the_released_weights_and_is_scored(released, config, tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "read_checkpoint", lambda source: released[0])
    result = start_import(config, tmp_path / "run")
    weights = released[0].weights
    assert result["checkpoint"] == 12 and result["parameters"] == sum(value.size for value in weights.values())
    trained = load_classifier(tmp_path / "run")
    found = to_reference(from_modules(trained.trained.blueprint.modules(trained.params)))
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert evaluate_run(config, tmp_path / "run", overrides={}, checkpoint="best")["num_images"] == 10
    with pytest.raises(UserError, match=r"was imported from last.ckpt, without the optimizer's moments"):
        train(config, tmp_path / "run", command=[], overrides={})
    with pytest.raises(UserError, match="holds a run already"):
        start_import(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 9, "intermediate_size": 32}, "num_layers is 6, not 9; intermediate_size is 64, not 32"),
        ({"gamma": 0.1}, r"gamma is 0.05, not 0.1"),
        ({"num_blocks": 2}, "num_blocks is 3, not 2"),
        ({"model_type": "vit"}, "set --config.model_type=dblock"),
        ({"sharing": "isolated"}, "share embeddings and head"),
    ],
)
def test_another_model_than_the_configs_is_refused_by_field(released, config, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(importing, "read_checkpoint", lambda source: released[0])
    config.update(changes)
    with pytest.raises(UserError, match=message):
        start_import(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vit.pooler.dense.bias": np.zeros(24, np.float32)}, "does not have: vit.pooler.dense.bias"),
        ({"classifier.bias": None}, "lack classifier.bias"),
    ],
)
def test_a_parameter_too_many_or_too_few_is_refused_by_name(released, config, tmp_path, monkeypatch, change, message):
    weights = {name: value for name, value in (released[0].weights | change).items() if value is not None}
    monkeypatch.setattr(importing, "read_checkpoint", lambda source: released[0]._replace(weights=weights))
    with pytest.raises(UserError, match=message):
        start_import(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", golden.files("dblock_tiny.npz") + golden.files("vit_tiny.npz"))
def test_an_imported_model_gives_the_released_logits(path, config, tmp_path, monkeypatch):
    """The whole way from the file's weights through the sampler, on the golden images and noise; a ViT has no noise."""
    arrays, _ = golden.load(path)
    released = Released(golden.under(arrays, "param/"), {}, 1)
    monkeypatch.setattr(importing, "read_checkpoint", lambda source: released)
    config.update(model_type="dblock" if path.name.startswith("dblock") else "vit", matmul_precision="highest")
    start_import(config, tmp_path / "run")
    images = arrays["pixel_values_nchw"].transpose(0, 2, 3, 1)
    monkeypatch.setattr(classifier, "normalize", lambda *_: jnp.asarray(images))
    runs = sorted({name.split("/")[0] for name in arrays if name.startswith("sampler_")}) or [""]
    for run in runs:
        expected, overrides = (golden.under(arrays, f"{run}/"), {}) if run else (arrays, {})
        if run:
            steps, scale = run.removeprefix("sampler_steps").split("_cfg")
            overrides = {"num_inference_steps": int(steps), "cfg_scale": float(scale)}
            start = partial(initial_z, jnp.asarray(expected["unit_noise"]))
            monkeypatch.setattr(classifier, "initial_z", lambda _, *scales, start=start: start(*scales))
        trained, _ = load_run(tmp_path / "run", checkpoint="last", overrides=overrides)
        golden.assert_close(Classifier(trained)(np.zeros(images.shape, np.uint8)), expected["logits"], 1e-5, run)


def test_a_class_too_many_is_refused(released, config, tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "read_checkpoint", lambda source: released[0])
    folder = tmp_path / "images" / "train" / "one more"
    folder.mkdir()
    Image.new("RGB", (20, 20)).save(folder / "a.png")
    with pytest.raises(UserError, match="num_labels is 10, not 11"):
        start_import(config, tmp_path / "run")


def test_without_pytorch_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="uv sync --extra import"):
        read_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize("path", golden.files("dblock_tiny.ckpt"))
def test_a_lightning_checkpoint_is_read(path, released):
    pytest.importorskip("torch")
    found, expected = read_checkpoint(path), released[0]
    assert (found.fields, found.step) == (expected.fields, expected.step)
    assert found.weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        np.testing.assert_array_equal(found.weights[name], value, err_msg=name)


def test_what_is_no_checkpoint_is_named_and_runs_nothing(tmp_path):
    torch = pytest.importorskip("torch")
    import pickle

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "it ran"), "w"))

    (tmp_path / "text.ckpt").write_text("no checkpoint")
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"state_dict": Payload()}))
    (tmp_path / "old.ckpt").write_bytes(pickle.dumps({"state_dict": Payload()}, protocol=2))
    torch.save({"state_dict": Payload()}, tmp_path / "zip.ckpt")
    (tmp_path / "empty.ckpt").touch()
    os.mkfifo(tmp_path / "pipe.ckpt")
    torch.save({"weights": {}}, tmp_path / "other.ckpt")
    torch.save({"state_dict": {"model.classifier.bias": "a word"}}, tmp_path / "words.ckpt")
    for name, message in [
        ("none.ckpt", "cannot read the checkpoint .*: there is no such file"),
        ("text.ckpt", "cannot read the checkpoint .*: it is no checkpoint of PyTorch$"),
        ("evil.ckpt", "the file holds code, which is never run$"),
        ("old.ckpt", r"the file holds code \(_?io.open\), which is never run$"),
        ("zip.ckpt", r"the file holds code \(_?io.open\), which is never run$"),
        ("empty.ckpt", "it is empty$"),
        ("pipe.ckpt", "it is a pipe, not a file$"),
        ("other.ckpt", "it has no state_dict"),
        ("words.ckpt", "it has no state_dict of tensors"),
    ]:
        with pytest.raises(UserError, match=message):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "it ran").exists()


def test_a_malformed_checkpoint_is_one_line(tmp_path):
    torch = pytest.importorskip("torch")
    ones = torch.ones(3)
    sparse = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (2,), check_invariants=True)
    for number, (content, message) in enumerate(
        [
            ({"state_dict": {}}, "its state_dict is empty$"),
            ({"state_dict": {1: ones}}, "its state_dict has 1 where a name should be$"),
            ({"state_dict": {"a": sparse}}, "a is no dense array of floating-point numbers$"),
            ({"state_dict": {"a": ones.to(torch.int32)}}, "a is no dense array"),
            ({"state_dict": {"a": ones.to(torch.complex64)}}, "a is no dense array"),
            ({"state_dict": {"a": torch.ones(1).expand(10**6, 10**7)}}, "a is no dense array"),  # 40 TB
            ({"state_dict": {"\x1b[2J\n": ones * torch.nan}}, r": \\x1b\[2J\\n holds numbers that are not finite$"),
            ({"state_dict": {"a": ones}, "hyper_parameters": [1]}, "its hyper_parameters are no table"),
            (
                {"state_dict": {"a": ones}, "hyper_parameters": {"gamma": ones}},
                "hyper-parameter gamma is no number",
            ),
            ({"state_dict": {"a": ones}, "global_step": "1"}, "its global_step is no number of steps"),
            ({"state_dict": {"a": ones}, "global_step": 2**40}, "its global_step is no number of steps"),
            ([], "it has no state_dict"),
        ]
    ):
        path = tmp_path / f"{number}.ckpt"
        torch.save(content, path)
        with pytest.raises(UserError, match=message) as error:
            read_checkpoint(path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({PATCH_WEIGHT: np.zeros((24, 3), np.float32)}, r"of shape \(24, 3\): it must have 4 dimensions"),
        (
            {"vit.embeddings.position_embeddings": np.zeros(3, np.float32)},
            r"shape \(3,\): it must have 3 dimensions",
        ),
        ({"vit.encoder.layer.x.weight": np.zeros(3, np.float32)}, "does not have: vit.encoder.layer.x.weight"),
        ({"\x1b]0;hi\x07": np.zeros(3, np.float32)}, r"does not have: \\x1b\]0;hi\\x07$"),
        ({"vit.encoder.layer.0.attention.attention.key.bias": np.float32(1)}, "key.bias .* do not fit"),
        ({LABELS: None}, f"holds no model of the released program: neither {LABELS} nor"),
    ],
)
def test_weights_of_no_such_model_are_named(released, config, tmp_path, monkeypatch, change, message):
    weights = {name: value for name, value in (released[0].weights | change).items() if value is not None}
    monkeypatch.setattr(importing, "read_checkpoint", lambda source: released[0]._replace(weights=weights))
    with pytest.raises(UserError, match=message):
        start_import(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()

"""A generator, once trained: samples, scores, report, comparison, export and inspection say one thing."""

import json
import re
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from jax import export
from ml_collections import ConfigDict
from PIL import Image
from playing import frames, mistake, pixels_of, send, served
from runs import files_of_at_most
from test_pages import Page, needed_without_compiling

from configs import dit_digits
from dblocks_jax.data.datasets import ArraySource
from dblocks_jax.modes import demo, generation, judge
from dblocks_jax.modes.compare import compare
from dblocks_jax.modes.evaluate import evaluate_run
from dblocks_jax.modes.export import export_run
from dblocks_jax.modes.generation import sample_and_score
from dblocks_jax.modes.in_use import draw_images
from dblocks_jax.modes.inspect import inspect
from dblocks_jax.modes.load import load_classifier, load_run, load_trained
from dblocks_jax.modes.report import report
from dblocks_jax.modes.sample import make_images, sample, share_out
from dblocks_jax.modes.train import train
from dblocks_jax.modes.usefulness import accuracy_after_training, check_trains_on_samples, train_on_samples
from dblocks_jax.pages.findings import held_out_curves
from dblocks_jax.run.errors import Diverged, Unsaved, UserError
from dblocks_jax.run.workdir import claim, finish
from dblocks_jax.tasks.classify.task import CLASSIFY
from dblocks_jax.tasks.generate.pictures import grid
from dblocks_jax.tasks.generate.report import after_each_block, first_of_each
from dblocks_jax.tasks.generate.sampler import make_sampler, sampler_plan
from dblocks_jax.tasks.generate.task import GENERATE
from dblocks_jax.tasks.images import find_dataset
from dblocks_jax.training.config import check_config

TINY = {
    "num_layers": 2, "num_blocks": 2, "hidden_size": 12, "num_heads": 2, "intermediate_size": 16, "batch_size": 600,
    "num_epochs": 1, "num_warmup_steps": 0, "log_every_n_steps": 1, "save_every_n_epochs": 1, "grow_at": (),
    "num_inference_steps": 3, "score_samples": 100, "lr": 1e-2, "data_dir": "/home/somebody",
}  # fmt: skip
TINY_JUDGE = {"num_layers": 1, "hidden_size": 12, "num_heads": 2, "intermediate_size": 16, "num_warmup_steps": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = dit_digits.get_config()
    config.update(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "FIELDS", judge.FIELDS | TINY_JUDGE)
        patch.setattr(judge, "STEPS", 1)
        patch.setattr(judge, "FEWEST_EPOCHS", 1)
        patch.setattr(generation, "kernel_distance", partial(generation.kernel_distance, num_subsets=2))
        workdir = tmp_path_factory.mktemp("runs") / "run"
        trained = train(config, workdir, command=["launch.py"], overrides={})
        finish(workdir, trained)
        yield config, workdir, trained


def make(run, tmp_path, classes=("3", "7"), count=5, cfg_scale=2.0, **overrides):
    """`--mode=sample`, and the array that it left."""
    config, workdir, _ = run
    wanted = {"classes": classes, "count": count, "cfg_scale": cfg_scale}
    result = sample(config, workdir, **wanted, overrides=overrides, checkpoint="best")
    return result, np.load(workdir / "samples" / "samples.npz")["arr_0"]


def test_samples_are_a_function_of_the_seed_whatever_the_batch(run, tmp_path):
    _, whole = make(run, tmp_path, count=7)
    _, in_parts = make(run, tmp_path, count=7, eval_batch_size=3)
    np.testing.assert_array_equal(in_parts, whole)
    assert len(np.unique(whole.reshape(7, -1), axis=0)) == 7  # each has noise of its own
    trained = load_trained(run[1])
    labels = np.array([3, 7], np.int32)
    again = make_images(trained, labels, 2.0, positions=np.array([0, 6], np.int32))
    np.testing.assert_array_equal(np.broadcast_to(again, (2, 8, 8, 3)), whole[[0, 6]])
    other = ConfigDict({**trained.config.to_dict(), "seed": 7})
    assert (make_images(replace(trained, config=other), labels, 2.0) != again).any()


def test_a_page_draws_what_is_sampled(run, tmp_path, monkeypatch, caplog):
    """Step by step, from any seed, for which nothing is compiled anew; in the last frame no noise is left."""
    monkeypatch.setattr(demo, "FRAMES_COMPILED", 0)  # a program without guidance, which nobody asks for here
    trained = load_trained(run[1])
    wanted = {"classes": [3, 7], "count": 5, "seed": trained.config.seed, "cfg_scale": 2.0}
    with served(demo.open_server(trained, "run", 0)) as server:
        found = frames(server, wanted)
        with jax.log_compiles(), caplog.at_level("WARNING", "jax"):
            other = frames(server, wanted | {"seed": 2**32 - 1})
        assert "Compiling" not in caplog.text
        assert mistake(server, wanted | {"count": 17}) == "count must be a whole number in [1, 16]"
        (tmp_path / "page.html").write_text(send(server, b"", method="GET", path="/")[1])
    assert [(frame["step"], frame["of"]) for frame in found] == [(1, 3), (2, 3), (3, 3)]
    assert [frame["block"] for frame in found] == sampler_plan(trained.config)[1]
    for seed, drawn in ((trained.config.seed, found), (2**32 - 1, other)):
        of_seed = replace(trained, config=ConfigDict({**trained.config.to_dict(), "seed": seed}))
        places = np.minimum(np.arange(16, dtype=np.int32), 4)  # the page's program
        images = make_images(of_seed, share_out([3, 7], 5)[places], 2.0, positions=places)[:5]
        np.testing.assert_array_equal(pixels_of(drawn[-1]["picture"]), grid(images)[..., 0])
    assert Page(tmp_path / "page.html").loaded == []


def test_samples_are_written_for_people_and_for_programs(run, tmp_path):
    result, array = make(run, tmp_path, classes=("7", "3"), count=5)
    folder = run[1] / "samples"
    assert result["classes"] == ["7", "3"] and result["num_images"] == 5 and result["cfg_scale"] == 2
    assert array.dtype == np.uint8 and array.shape == (5, 8, 8, 3)
    assert (array[..., :1] == array).all()  # grey, in three channels
    singles = sorted(path.name for path in folder.glob("0*.png"))
    assert singles == [f"{i:06d}.png" for i in range(5)]
    for name, pixels in zip(singles, array, strict=True):
        with Image.open(folder / name) as single:
            np.testing.assert_array_equal(np.asarray(single), pixels[..., 0])
    with Image.open(folder / "samples.png") as grid:
        assert grid.size == (3 * 66 + 2, 2 * 66 + 2)  # 5 in rows of 3, enlarged to 64
    make(run, tmp_path, count=2)
    assert len(list(folder.glob("0*.png"))) == 2  # those of before are gone


def test_in_python_an_image_is_that_of_its_class_and_place(run, tmp_path):
    _, array = make(run, tmp_path, classes=("3", "7"), count=5)
    trained = load_trained(run[1])
    images = draw_images(trained, np.array([3, 3, 3, 7, 7]), 2.0)
    np.testing.assert_array_equal(np.broadcast_to(images, array.shape), array)
    for labels, message in (
        ([3, 10], r"labels must lie in \[0, 9\], not in \[3, 10\]"),
        ([], "labels must be numbers of classes, one for each image"),
    ):
        with pytest.raises(UserError, match=message):
            draw_images(trained, labels)


@pytest.mark.filterwarnings("ignore:Error writing persistent compilation cache")
def test_samples_for_which_there_is_no_room_cost_none_of_those_before(run, tmp_path):
    make(run, tmp_path, count=3)
    there = {path: path.read_bytes() for path in (run[1] / "samples").iterdir()}
    with files_of_at_most(500), pytest.raises(Unsaved, match="File too large"):
        make(run, tmp_path, count=2)
    assert {path: path.read_bytes() for path in (run[1] / "samples").iterdir()} == there and len(there) == 5


def test_guidance_that_was_not_trained_for_is_told(run, tmp_path, monkeypatch, caplog):
    """As `--cfg_scale` has it, whatever the config's."""
    load = load_run

    def never_without_class(*args, **kwargs):
        trained, about = load(*args, **kwargs)
        return trained, about | {"config": about["config"] | {"class_dropout_prob": 0.0}}

    monkeypatch.setattr("dblocks_jax.modes.sample.load_run", never_without_class)
    for scale, told in ((1.0, 0), (2.0, 1)):
        make(run, tmp_path, count=2, cfg_scale=scale)
        assert sum("class_dropout_prob was 0" in record.message for record in caplog.records) == told


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"count": 0}, r"--count must lie in \[1, 1,000,000\], not 0"),
        ({"classes": ["10"]}, "there is no class 10: name some of 0, 1, .*, 9, or numbers from 0 to 9"),
        ({"classes": ["-1"]}, "there is no class -1"),
        ({"classes": ["\x1b[2J"]}, r"there is no class \\x1b\[2J"),
        ({"cfg_scale": float("nan")}, r"cfg_scale must lie in \[0, 1000\], 1 is no guidance: not nan"),
        ({"cfg_scale": -1.0}, "cfg_scale must lie in .* not -1"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, wanted, message):
    with pytest.raises(UserError, match=message) as error:
        make(run, tmp_path, **wanted)
    assert "\n" not in str(error.value)


def test_a_classifier_makes_no_images_and_a_generator_classifies_none(run):
    with pytest.raises(UserError, match="holds a model of the task generate, not of classify"):
        load_classifier(run[1])
    with pytest.raises(UserError, match="holds a model of the task classify, not of generate"):
        sample(run[0], judge_of(run), classes=[], count=1, cfg_scale=1.0, overrides={}, checkpoint="best")


def judge_of(run):
    return run[1].parent / "judge_digits_8"


def test_training_evaluation_and_report_score_alike(run, monkeypatch):
    config, workdir, trained = run
    asked = needed_without_compiling(monkeypatch)
    scored = evaluate_run(config, workdir, overrides={}, checkpoint="best")
    reported = report(config, workdir, overrides={}, checkpoint="best")
    names = {"loss", "loss_by_block", "accuracy_of_samples", "frechet_judge", "kid_pixels", "nearest_ratio", "judge"}
    for result in (scored, reported):
        assert {name: result[name] for name in names} == {name: trained[name] for name in names}
    assert np.mean(scored["loss_by_block"]) == pytest.approx(scored["loss"])  # two blocks, 12 of 24 levels each
    page, text = Page(workdir / "report.html"), (workdir / "report.html").read_text()
    assert page.loaded == [] and page.pictures == 5  # noise, loss, error, the loss kept apart, memory
    for expected in (f"{trained['loss']:.4f}", f"{trained['frechet_pixels_ceiling']:.4g}", trained["judge"]["sha256"]):
        assert expected in page.text
    assert [(each.num_blocks, each.ema_decay) for each in asked] == [(1, 0.999), (2, 0.999)]
    assert "averages" in text  # they are in a step's memory
    assert text.count("a sample of class") == 10 * 10 + 2 * 8  # of each class; and 8 after each of two blocks
    assert text.count('alt="a training image"') == 8


def test_the_pairs_are_the_closest_there_are(run):
    """Computed anew from what is on the page: the images beside the samples are those of the named indices."""
    config, workdir, _ = run
    text = (workdir / "report.html").read_text()
    pairs = re.findall(r"training image (\d+): <b>(\d)</b><br>distance ([\d.]+)", text)
    source = find_dataset(config).split("train")
    real = source.images(np.arange(len(source))).reshape(len(source), -1).astype(float)
    labels = np.arange(100, dtype=np.int32) // 10
    made = make_images(load_trained(workdir), labels, config.cfg_scale).reshape(100, -1).astype(float)
    distances = np.sqrt(((made[:, None] - real[None]) ** 2).sum(axis=-1))
    nearest = distances.min(axis=1)
    assert len(pairs) == 8
    for (index, label, shown), sample_ in zip(pairs, np.argsort(nearest, kind="stable"), strict=False):
        assert float(shown) == pytest.approx(nearest[sample_], rel=1e-3)
        assert int(index) == np.argmin(distances[sample_]) and int(label) == source.labels[int(index)]


def test_what_the_last_block_leaves_is_the_sample(run):
    trained = load_trained(run[1])
    sampler = make_sampler(trained.config, trained.blueprint, trained.card)
    labels, positions = np.array([1, 4], np.int32), np.array([3, 5], np.int32)
    stages = after_each_block(trained.task, sampler, trained.params, positions, labels)
    sigmas, owners = sampler_plan(trained.config)
    assert [stage.block for stage in stages] == [0, 1] and sum(stage.levels for stage in stages) == len(owners)
    assert [stage.sigma for stage in stages] == [sigmas[owners.count(0) - 1], sigmas[-1]]
    *_, (_, z) = sampler(trained.params, positions, labels, trained.config.cfg_scale)
    np.testing.assert_array_equal(stages[-1].denoised, z)
    assert (stages[0].denoised != stages[1].denoised).any()


def test_the_first_sample_of_each_class_is_followed():
    assert first_of_each(np.array([4, 4, 0, 0, 2]), 8).tolist() == [0, 2, 4]
    assert first_of_each(np.array([1, 1, 0]), 1).tolist() == [0] or first_of_each(np.array([1, 1, 0]), 1).tolist() == [
        2
    ]


def test_the_curve_is_that_of_the_splits_on_record():
    lines = [{"step": 1, "blocks": {}}, {"step": 2, "split": "test", "loss": 0.5}, {"step": 3, "split": "val"}]
    assert held_out_curves([*lines, {"step": 4, "split": "test", "loss": None}], "loss") == {"test split": ([2], [0.5])}


@pytest.mark.long
def test_images_that_are_not_finite_have_no_score(run, tmp_path):
    trained = load_trained(run[1])
    broken = replace(trained, params=jax.tree.map(lambda leaf: leaf * np.nan, trained.params))
    assert sample_and_score(broken, find_dataset(run[0]), tmp_path).figures == {"diverged": True}
    with pytest.raises(Diverged, match="the images are not finite"):
        make_images(broken, np.zeros(1, np.int32), 1.0)


@pytest.mark.long
def test_a_classifier_learns_from_samples_what_they_show(run, monkeypatch):
    """Samples that are the training images are as good as these; from such that show one class it learns that class."""
    monkeypatch.setattr(judge, "STEPS", 12)
    data = find_dataset(run[0])
    train_, test = data.split("train"), data.split("test")
    few = replace(data, load={"train": ArraySource(train_.pixels[:256], train_.labels[:256]), "test": test}.get)
    found = train_on_samples(run[0], few, train_.pixels[:256], train_.labels[:256])
    assert found["num_trained_on"] == 256 and found["accuracy_trained_on_samples"] == found["accuracy_trained_on_real"]
    of_one_class = ArraySource(train_.pixels[:256], np.full(256, 3, np.int32))
    learned = accuracy_after_training(run[0], few, of_one_class)
    assert learned == np.mean(test.labels == 3) != found["accuracy_trained_on_real"]


def test_training_on_samples_that_there_will_not_be_is_one_line(run):
    with pytest.raises(UserError, match="--train_on_samples is for runs that generate images"):
        check_trains_on_samples(CLASSIFY, run[0])
    with pytest.raises(UserError, match="--train_on_samples needs samples: set score_samples"):
        check_trains_on_samples(GENERATE, ConfigDict({**run[0].to_dict(), "score_samples": 0}))


def test_a_judge_that_cannot_judge_is_noticed_before_training(run, tmp_path):
    for judge_, changes, message in (
        (run[1], {}, "holds a model of the task generate, not of classify"),
        (judge_of(run), {"image_size": 4}, r"must be a plain classifier \(model_type=vit\) of images of \(4, 4\)"),
        (tmp_path, {}, "holds no run"),
    ):
        config = ConfigDict({**run[0].to_dict(), "judge": str(judge_), **changes})
        with pytest.raises(UserError, match=message):
            train(config, tmp_path / "new", command=[], overrides={})
        assert not (tmp_path / "new").exists()


def test_a_judge_that_another_run_trains_is_waited_for(run, monkeypatch):
    """Its result comes while that run holds the folder, and is taken as it is."""
    folder = judge_of(run)
    result = (folder / "train.json").read_text()
    (folder / "train.json").unlink()
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        (folder / "train.json").write_text(result)

    monkeypatch.setattr(judge.time, "sleep", sleep)
    trained = load_trained(run[1])
    with claim(folder):
        found = judge.find_judge(trained.config, trained.card, 1437, run[1].parent)
    assert len(waited) == 1 and found.describe() == run[2]["judge"]


def test_blocks_without_noise_are_refused():
    """Equal widths of ln sigma put the last of twelve blocks 13 deviations below the median: 1e-40 of the draws."""
    config = dit_digits.get_config()
    config.update(num_layers=12, num_blocks=12, partition="log", p_mean=1.0, p_std=1.0, sigma_min=1e-6, grow_at=())
    with pytest.raises(UserError, match="put no noise into the share of block 11: take fewer blocks"):
        check_config(GENERATE, config)


def test_too_few_real_images_to_score_samples_by_are_noticed_before_training(tmp_path):
    for split, count in (("train", 2), ("test", 1)):
        for name in "ab":
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("L", (8, 8), i).save(tmp_path / "images" / split / name / f"{i}.png")
    config = dit_digits.get_config()
    config.update(TINY | {"dataset": "folder", "data_dir": str(tmp_path / "images"), "batch_size": 2})
    with pytest.raises(UserError, match="scores of samples need 4 training and test images: set score_samples=0"):
        train(config, tmp_path / "new", command=[], overrides={})
    assert not (tmp_path / "new").exists()


def test_generators_are_ranked_by_loss_beside_classifiers(run, tmp_path, capsys):
    _, workdir, trained = run
    better = tmp_path / "better"
    better.mkdir()
    for name, change in (("config.json", {"num_blocks": 1}), ("train.json", {"loss": 1e-3, "kid_judge": -0.5})):
        (better / name).write_text(json.dumps(json.loads((workdir / name).read_text()) | change))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((workdir / "config.json").read_text())
    ended = {"mode": "train", "step": 1, "checkpoint": None, "diverged": True}
    (broken / "train.json").write_text(json.dumps(ended))
    first, second, other = compare([workdir, better, broken, judge_of(run)], tmp_path)["groups"]
    assert (first["fields"], first["loss_mean"], first["loss"]) == ({"num_blocks": 1}, 1e-3, "0.0010")
    assert first["kid_judge_mean"] == -0.5  # an unbiased estimate may be below 0
    assert second["loss_mean"] == trained["loss"] and second["diverged"] == [str(broken)]
    assert second["accuracy_of_samples_mean"] == trained["accuracy_of_samples"] and "top1_mean" not in second
    assert other["top1_mean"] == trained["judge"]["top1"] and "loss_mean" not in other
    page, printed = Page(tmp_path / "compare.html"), capsys.readouterr().out
    for text in ("generate: digits, 360 images", "classify: digits, 360 images", "Fréchet, judge", "accuracy"):
        assert text in page.text and text in printed
    assert page.pictures == 4


@pytest.fixture(scope="module")
def exported(run):
    config, workdir, _ = run
    return workdir / "export", export_run(config, workdir, overrides={}, checkpoint="best")


@pytest.mark.long
def test_the_program_makes_the_samplers_images(run, exported):
    """Any number of them, with any guidance; a grey level may differ where a value lies between two."""
    folder, result = exported
    assert result["largest_difference_of_images"] <= 1e-3
    assert result["bytes"]["sampler.stablehlo"] < 2 * result["bytes"]["model.safetensors"] + 300_000
    program = export.deserialize(bytearray((folder / "sampler.stablehlo").read_bytes()))
    trained, labels = load_trained(run[1]), np.array([2, 9, 2, 0], np.int32)
    positions = np.array([4, 1, 0, 11], np.int32)
    for guidance, count in ((1.0, 4), (3.0, 2)):
        found = np.asarray(program.call(labels[:count], positions[:count], np.float32(guidance)))
        expected = make_images(trained, labels[:count], guidance, positions[:count])
        assert found.dtype == np.uint8 and np.abs(found.astype(int) - expected).max() <= 1
        assert np.mean(found == expected) > 0.95


def test_an_exported_generator_is_loaded_and_described(run, exported):
    folder, _ = exported
    again, trained = load_trained(folder), load_trained(run[1])
    assert again.entry.name == "generate" and again.step == trained.step and again.card == trained.card
    labels = np.array([5, 6], np.int32)
    np.testing.assert_array_equal(make_images(again, labels, 2.0), make_images(trained, labels, 2.0))
    text = (folder / "README.md").read_text()
    assert f"| loss on test images | {run[2]['loss']:.4f} |" in text and "pipeline_tag" in text
    [code] = re.findall(r"```python\n(import numpy.*?)```", text, re.S)
    place: dict = {}
    assert 'open("sampler.stablehlo", "rb").read()' in code
    place["written"] = (folder / "sampler.stablehlo").read_bytes()
    exec(code.replace('open("sampler.stablehlo", "rb").read()', "written"), place)
    assert place["images"].shape == (2, 8, 8, 1) and place["images"].dtype == np.uint8
    for path in folder.iterdir():
        assert b"/home/somebody" not in path.read_bytes() and str(run[1].parent).encode() not in path.read_bytes()


@pytest.mark.long
def test_a_generator_is_inspected(run, tmp_path, capsys):
    result = inspect(run[0], tmp_path)
    params = load_trained(run[1]).params
    assert result["parameters"] == {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
    page = Page(tmp_path / "inspect.html")
    assert page.loaded == [] and page.pictures == 1 and "Pixels are scaled to -1..1." in page.text
    assert "block 0: sigma 80" in capsys.readouterr().out


def test_kernel_distances_are_of_all_classes_where_images_come_sorted_by_class(monkeypatch):
    """Two classes of 12,000, one after the other: the same images the other way round are no distance away."""
    monkeypatch.setattr(generation, "kernel_distance", partial(generation.kernel_distance, num_subsets=4))
    images = np.random.default_rng(0).standard_normal((24_000, 2)) + np.repeat([0.0, 4.0], 12_000)[:, None]
    found = generation.distances("judge", images[::-1], images, images[:12_000], images[:12_000])
    assert abs(found["kid_judge"]) < found["kid_judge_floor"] / 20  # the floor is here that of one class to both

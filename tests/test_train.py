"""Whole runs on tiny models: train, resume, refuse, evaluate."""

import json
from pathlib import Path

import numpy as np
import pytest
from saved import state_of

from configs import dblock_digits, mask_text, vit_digits
from dblocks_jax.modes.evaluate import evaluate_run
from dblocks_jax.modes.train import train
from dblocks_jax.run import workdir as run_folder
from dblocks_jax.run.checkpoint import Checkpoints
from dblocks_jax.run.errors import UserError
from dblocks_jax.tasks.classify.scores import metrics
from dblocks_jax.tasks.classify.task import CLASSIFY
from dblocks_jax.tasks.table import TASKS, entry_of
from dblocks_jax.training import loop as trainer
from dblocks_jax.training.config import check_config, check_resumable, complete, for_evaluation

TINY = {
    "num_layers": 2, "hidden_size": 12, "num_heads": 2, "intermediate_size": 16, "num_blocks": 2, "batch_size": 600,
    "num_epochs": 2, "save_every_n_epochs": 1, "log_every_n_steps": 1, "num_warmup_steps": 0, "dropout": 0.1,
}  # fmt: skip

CARD = {"class_names": list("0123456789"), "images": 1437}


def tiny(module, **changes):
    config = module.get_config()
    config.update(TINY | changes)
    return config


def run(config, workdir: Path):
    return train(config, workdir, command=["launch.py"], overrides={})


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


def kill_at(monkeypatch, step: int):
    """Make the training step of update `step` (from 0) fail, as if the process died there."""
    build = trainer.make_step

    def make(*args, **kwargs):
        real = build(*args, **kwargs)

        def train_step(parts, data, steps):
            if steps.position <= step < steps.position + steps.count:
                raise Killed
            return real(parts, data, steps)

        return train_step

    monkeypatch.setattr(trainer, "make_step", make)


@pytest.mark.long
def test_an_interrupted_run_ends_in_the_same_bits(tmp_path, monkeypatch):
    config = tiny(dblock_digits)
    result = run(config, tmp_path / "whole")
    assert (
        result["step"] == 2 * 2 * 2
    )  # epochs x blocks x steps: every layer sees as many updates as in the plain model
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            run(config, tmp_path / "cut")
    with Checkpoints(tmp_path / "cut", read_only=True) as checkpoints:
        assert checkpoints.find("last") == 4
    resumed = run(config, tmp_path / "cut")
    assert resumed["steps_run"] == 4
    whole, cut = state_of(tmp_path / "whole", 8), state_of(tmp_path / "cut", 8)
    assert whole.keys() == cut.keys() and len(whole) > 50
    for path, value in whole.items():
        np.testing.assert_array_equal(cut[path], value, err_msg=path)
    scores = ("top1", "top5", "macro_f1", "cross_entropy", "accuracy_by_step", "num_images")
    assert {name: resumed[name] for name in scores} == {name: result[name] for name in scores}

    # The log has every step once, and each start is on record.
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "blocks" in line] == list(range(1, 9))
    starts = (tmp_path / "cut" / "starts.jsonl").read_text().splitlines()
    assert len(starts) == 2 and json.loads(starts[0]).keys() >= {"command", "overrides", "versions", "devices", "git"}

    # The same command once more has nothing to do, and says the same.
    again = run(config, tmp_path / "cut")
    assert again["steps_run"] == 0 and again["top1"] == result["top1"]


@pytest.mark.long
def test_a_longer_run_under_a_constant_rate_is_the_same_run_continued(tmp_path):
    short = tiny(vit_digits, scheduler_type="constant_with_warmup")
    longer = tiny(vit_digits, scheduler_type="constant_with_warmup", num_epochs=4)
    run(short, tmp_path / "two_and_two")
    run(longer, tmp_path / "two_and_two")
    run(longer, tmp_path / "four")
    expected = state_of(tmp_path / "four", 8)
    for path, value in state_of(tmp_path / "two_and_two", 8).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


@pytest.mark.long
def test_evaluation_takes_the_architecture_from_the_checkpoint(tmp_path):
    config = tiny(dblock_digits, num_epochs=1)
    trained = run(config, tmp_path)
    other = dblock_digits.get_config()  # 6 layers, 3 blocks: not what is in the checkpoint
    scored = evaluate_run(other, tmp_path, overrides={}, checkpoint="best")
    assert scored["num_images"] == 360
    assert scored["cross_entropy"] == pytest.approx(trained["cross_entropy"], rel=1e-6)
    more = evaluate_run(other, tmp_path, overrides={"num_inference_steps": 5, "eval_batch_size": 7}, checkpoint="last")
    assert len(more["accuracy_by_step"]) == 5 and more["num_images"] == 360
    with pytest.raises(UserError, match=r"num_blocks=3 contradicts .* 2"):
        evaluate_run(other, tmp_path, overrides={"num_blocks": 3}, checkpoint="best")
    with pytest.raises(UserError, match="no checkpoint '7'"):
        evaluate_run(other, tmp_path, overrides={}, checkpoint="7")


def test_scores_do_not_depend_on_the_batch_size(tmp_path):
    """With starting noise: each image has its own, by its place in the split."""
    config = tiny(dblock_digits, num_epochs=1, init_noise_scale=1.0)
    assert "steps_skipped" not in run(config, tmp_path)
    assert "skipped" not in (tmp_path / "metrics.jsonl").read_text()
    scores = [
        evaluate_run(config, tmp_path, overrides={"eval_batch_size": size}, checkpoint="best") for size in (360, 101)
    ]
    assert scores[0]["accuracy_by_step"] == scores[1]["accuracy_by_step"]
    assert scores[0]["cross_entropy"] == pytest.approx(scores[1]["cross_entropy"], rel=1e-5)


PLAIN = {"num_epochs": 3, "val_fraction": 0.2, "batch_size": 500, "save_top_k": 1}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(folder, result, lines of its log) of a plain run."""
    workdir = tmp_path_factory.mktemp("plain")
    result = run(tiny(vit_digits, **PLAIN), workdir)
    return workdir, result, [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_the_best_by_validation_is_scored(plain):
    _, result, lines = plain
    watched = {line["step"]: line["top1"] for line in lines if line.get("split") == "val"}
    assert len(watched) == 3
    assert watched[result["checkpoint"]] == max(watched.values())


def test_a_sound_run_counts_no_skipped_steps(plain):
    _, result, lines = plain
    assert "steps_skipped" not in result and not any("skipped" in line for line in lines)


def test_a_workdir_of_another_run_is_refused_by_field(plain):
    with pytest.raises(UserError) as error:
        run(tiny(vit_digits, **PLAIN, lr=0.5, hidden_size=14), plain[0])
    assert "hidden_size was 12, is 14; lr was 0.003, is 0.5" in str(error.value)


@pytest.mark.parametrize("scheduler", ["constant_with_warmup", "cosine"])
def test_when_more_epochs_are_the_same_run(scheduler):
    saved = tiny(vit_digits, scheduler_type=scheduler).to_dict()
    longer = tiny(vit_digits, scheduler_type=scheduler, num_epochs=9)
    if scheduler == "cosine":
        with pytest.raises(UserError, match="num_epochs was 2, is 9"):
            check_resumable(saved, longer, "runs")
    else:
        check_resumable(saved, longer, "runs")
        with pytest.raises(UserError, match="num_epochs was 2, is 1"):
            check_resumable(saved, tiny(vit_digits, scheduler_type=scheduler, num_epochs=1), "runs")


def test_evaluation_keeps_the_saved_fields_and_takes_the_samplers():
    saved = tiny(dblock_digits)
    config = for_evaluation(CLASSIFY, saved.to_dict(), {"cfg_scale": 1.5}, dblock_digits.get_config())
    assert config.cfg_scale == 1.5 and config.num_layers == 2


def test_runs_of_earlier_versions_are_complete_and_go_on():
    """What they lack they did as a default has it now; a field of classification is of classification alone."""
    for config in (tiny(dblock_digits), mask_text.get_config()):
        now = config.to_dict()
        of_old = {name: value for name, value in now.items() if name not in ("answer", "shard_parameters", "ema_decay")}
        assert complete(of_old) | {"ema_decay": now["ema_decay"]} == now
        check_resumable(of_old | {"ema_decay": now["ema_decay"]}, config, "runs")
    without_task = {name: value for name, value in tiny(dblock_digits).to_dict().items() if name != "task"}
    assert complete(without_task) == tiny(dblock_digits).to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "digit"}, "did you mean 'digits'"),
        ({"num_blocks": 4, "num_layers": 6}, "num_blocks=4 must divide num_layers=6"),
        ({"patch_size": 3}, "patch_size=3 must divide image_size=8"),
        ({"num_heads": 5}, "num_heads=5 must divide hidden_size=12"),
        ({"sigma_min": -1.0}, "sigma_min must be greater than 0"),
        ({"sigma_max": 1e20}, r"sigma_max must lie in \[1e-06"),
        ({"cfg_scale": 1e300}, "cfg_scale must be a finite number of at most 1e\\+30"),
        ({"scheduler_type": "cosine", "scheduler_specific_kwargs": '{"num_cycles": 1e999}'}, "numbers from 0"),
        ({"sigma_min": 90.0}, "sigma_min=90.0 must be below sigma_max=80.0"),
        ({"gamma": 0.6}, r"gamma must lie in \[0, 0.5\]"),
        ({"gamma": -0.1}, r"gamma must lie in \[0, 0.5\]"),
        ({"lr": float("nan")}, "lr must be a finite number"),
        ({"weighting": "mean"}, "batch_mean, per_sample, none"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"batch_size": 1438}, "a batch of 1438 examples is larger than the training set of 1437"),
        ({"batch_size": 0}, "batch_size must be greater than 0"),
        ({"p_mean": -40.0}, "almost no noise between"),
        ({"p_std": 0.03125}, "almost no noise between"),
        ({"p_std": 0.25}, "almost no noise between"),
        ({"scheduler_type": "step"}, "constant_with_warmup, linear"),
        ({"image_size": 16, "patch_size": 4}, "digits"),
        (
            {"answer": "joined", "init_noise_scale": 1.0},
            "set num_inference_steps=0 and init_noise_scale=0, not 0 and 1.0",
        ),
    ],
)
def test_mistakes_are_named_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run(tiny(dblock_digits, **changes), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def write_folder(root: Path, classes: tuple[str, ...], count: int) -> None:
    """A folder data set of random images."""
    from PIL import Image

    rng = np.random.default_rng(len(classes))
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(root / split / name / f"{index}.png")


@pytest.mark.long
def test_other_images_under_the_same_config_are_refused(tmp_path):
    write_folder(tmp_path / "a", ("cat", "dog"), 4)
    write_folder(tmp_path / "b", ("cat", "eel"), 4)
    write_folder(tmp_path / "c", ("cat", "dog"), 5)
    folder = {"dataset": "folder", "batch_size": 4, "num_epochs": 1}
    first = tiny(dblock_digits, **folder, data_dir=str(tmp_path / "a"))
    result = run(first, tmp_path / "run")
    assert result["num_images"] == 8
    with pytest.raises(UserError, match=r"other classes: missing are \['dog'\], new are \['eel'\]"):
        run(tiny(dblock_digits, **folder, data_dir=str(tmp_path / "b")), tmp_path / "run")
    with pytest.raises(UserError, match="trained on 8 examples, but now there are 10"):
        run(tiny(dblock_digits, **folder, data_dir=str(tmp_path / "c")), tmp_path / "run")
    with pytest.raises(UserError, match="other classes"):
        evaluate_run(first, tmp_path / "run", overrides={"data_dir": str(tmp_path / "b")}, checkpoint="best")
    moved = evaluate_run(first, tmp_path / "run", overrides={"data_dir": str(tmp_path / "c")}, checkpoint="best")
    assert moved["num_images"] == 10


def test_a_log_cut_short_is_mended(tmp_path):
    """Killed before the first checkpoint and in the middle of a line: the log begins anew, whole."""
    config = tiny(vit_digits, num_epochs=1)
    run_folder.open_run(tmp_path, config.to_dict(), CARD, was=None, command=[], overrides={})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "blocks": {}}\n{"step": 2, "bl')
    run(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "blocks" in line] == [1, 2]


def test_a_run_that_came_in_between_is_not_overwritten(tmp_path):
    """Between comparing the workdir's config and claiming the workdir another run may have begun there, and ended."""
    first, second = ({"lr": rate} for rate in (0.1, 0.2))
    run_folder.open_run(tmp_path, first, CARD, was=None, command=[], overrides={})
    with pytest.raises(UserError, match="another run has begun"):
        run_folder.open_run(tmp_path, second, CARD, was=None, command=[], overrides={})
    assert run_folder.read_saved(tmp_path, run_folder.CONFIG) == first


def test_evaluating_nothing_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="holds no run: train it first"):
        evaluate_run(dblock_digits.get_config(), tmp_path, overrides={}, checkpoint="best")


def test_every_shipped_config_is_sound_and_says_how_to_run_it():
    import importlib

    names = sorted(
        path.stem
        for path in Path(trainer.__file__).parents[2].glob("configs/*.py")
        if path.stem not in ("common", *TASKS)
    )
    assert len(names) >= 13
    for name in names:
        module = importlib.import_module(f"configs.{name}")
        check_config(entry_of(module.get_config()), module.get_config())
        for word in (f"COMMAND: python launch.py --config=configs/{name}.py", "TIME:", "ACCURACY:"):
            assert word in module.__doc__, name


def test_metrics_against_scikit_learn():
    from sklearn.metrics import accuracy_score, f1_score, log_loss, top_k_accuracy_score

    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, 7)).astype(np.float32)
    labels = rng.integers(0, 7, 50)
    believed = np.stack([rng.integers(0, 7, 50), logits.argmax(1)])
    scores = metrics(believed, logits, labels)
    probs = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(1, keepdims=True)
    assert scores["top1"] == pytest.approx(accuracy_score(labels, believed[1]))
    assert scores["top5"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5, labels=range(7)))
    assert scores["cross_entropy"] == pytest.approx(log_loss(labels, probs, labels=range(7)))
    assert scores["accuracy_by_step"][0] == pytest.approx(accuracy_score(labels, believed[0]))
    for some in (slice(None), slice(5)):  # with every class, and with classes of which there is nothing
        expected = f1_score(labels[some], believed[1, some], labels=range(7), average="macro", zero_division=0)
        assert metrics(believed[:, some], logits[some], labels[some])["macro_f1"] == pytest.approx(expected)


def test_calibration_error_in_closed_form():
    """Two bins: of 3 images that are held to be 0.8 sure 2 are right, the one of 0.6 is wrong."""
    logits = np.log([[0.8, 0.2], [0.8, 0.2], [0.2, 0.8], [0.4, 0.6]])
    found = metrics(logits.argmax(1)[None], logits, np.array([0, 0, 0, 0]))
    assert found["calibration_error"] == pytest.approx(3 / 4 * abs(2 / 3 - 0.8) + 1 / 4 * abs(0 - 0.6))
    everyone = metrics(np.zeros((1, 6), int), np.zeros((6, 3)), np.array([0, 0, 0, 0, 1, 2]))
    assert everyone["calibration_error"] == pytest.approx(4 / 6 - 1 / 3)

"""The command line as a user meets it: output, exit codes, one line for a mistake."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import pytest
from absl.testing import flagsaver
from runs import started

from configs import dblock_digits
from dblocks_jax.data.datasets import Card
from dblocks_jax.run.logs import Logs
from dblocks_jax.run.workdir import finish
from dblocks_jax.tasks.classify.task import Classify
from dblocks_jax.training.display import Display
from dblocks_jax.training.health import Health
from dblocks_jax.training.progress import Progress

ROOT = Path(__file__).parents[1]
TINY = [
    "--config=configs/dblock_digits.py", "--config.num_layers=3", "--config.hidden_size=12", "--config.num_heads=2",
    "--config.intermediate_size=16", "--config.batch_size=704", "--config.num_epochs=1", "--config.num_warmup_steps=0",
    "--config.log_every_n_steps=1",
]  # fmt: skip


def launch(*args: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "launch.py", *args],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict, str]:
    """A finished run: (its folder, its result, what it told on the way)."""
    workdir = tmp_path_factory.mktemp("run")
    done = launch(*TINY, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir, json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_training_leaves_a_result_and_its_config(trained):
    workdir, result, _ = trained
    assert result["mode"] == "train" and result["num_images"] == 360
    assert json.loads((workdir / "train.json").read_text()) == result
    assert json.loads((workdir / "config.json").read_text())["hidden_size"] == 12


def test_without_a_terminal_lines_are_plain_and_few(trained):
    """A screen at the start, lines every few seconds; the last step has one, and so has each evaluation."""
    _, result, told = trained
    assert "\x1b" not in told
    for text in ("from the start", "DiffusionBlocks, 3 blocks", "block 2: ", "6 steps to do of 6, 2 an epoch"):
        assert text in told
    windows = [line for line in told.splitlines() if " loss " in line]
    assert 1 <= len(windows) <= 3 and " step 6/6 " in windows[-1]
    assert f"step 6: test top1 {result['top1']:.4f}" in told.splitlines()[-1]


@pytest.mark.long
def test_runs_are_compared_without_a_config(trained, tmp_path):
    done = launch("--mode=compare", f"--workdir={tmp_path}", "--runs", str(trained[0]), str(trained[0]))
    assert done.returncode == 0, done.stderr
    [group] = json.loads(done.stdout.splitlines()[-1])["groups"]
    assert group["top1_mean"] == trained[1]["top1"] and len(group["runs"]) == 1  # named twice, counted once
    assert (tmp_path / "compare.html").exists() and json.loads((tmp_path / "compare.json").read_text())


def test_evaluation_of_a_finished_run(trained):
    workdir, *_ = trained
    scored = launch(*TINY, f"--workdir={workdir}", "--mode=eval", "--config.num_inference_steps=1")
    assert scored.returncode == 0, scored.stderr
    result = json.loads(scored.stdout.splitlines()[-1])
    assert result["mode"] == "eval" and len(result["accuracy_by_step"]) == 1
    assert json.loads((workdir / "eval.json").read_text()) == result


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_page_is_served_until_a_signal_and_nothing_is_written(trained, number):
    """Of a folder alone, without its config; the line that says where is all that is printed."""
    files = sorted(trained[0].rglob("*"))
    with started(sys.executable, "launch.py", "--mode=demo", f"--workdir={trained[0]}") as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        [address] = re.findall(r"http://127\.0\.0\.1:\d+/", line)
        with urlopen(address, timeout=10) as page:
            assert trained[0].name in page.read().decode()
        process.send_signal(number)
        assert process.wait(timeout=30) == 0
        assert process.stdout.read() == ""
        assert [line for line in process.stderr.read().splitlines() if "compiling" not in line] == []
    assert sorted(trained[0].rglob("*")) == files


@pytest.mark.long
def test_a_damaged_checkpoint_is_named(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    step = trained[1]["checkpoint"]
    for file in (tmp_path / "state" / str(step) / "params").rglob("*"):
        if file.is_file() and "metadata" not in file.name.lower():
            file.write_bytes(b"")
    done = launch(*TINY, f"--workdir={tmp_path}", "--mode=eval")
    assert done.returncode == 1 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and f"state/{step} is damaged" in done.stderr
    assert f"--checkpoint chooses another; there are [{step}]" in done.stderr


@pytest.mark.long
def test_eight_devices_train_as_one(trained, tmp_path):
    done = launch(
        *TINY, f"--workdir={tmp_path}", XLA_FLAGS=os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "starts.jsonl").read_text())["devices"]) == 8

    def logged(workdir: Path) -> list[dict]:
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["blocks"] for line in lines if "blocks" in line]

    one, eight = logged(trained[0]), logged(tmp_path)
    assert len(one) == len(eight) == 6
    for step_of_one, step_of_eight in zip(one, eight, strict=True):
        for block, means in step_of_one.items():
            assert step_of_eight[block] == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "--config is missing"),
        (["--mode=demo", "--config=configs/vit_digits.py"], 1, "holds no run: train it first"),
        (["--config=configs/none.py"], 2, "there is no config file configs/none.py"),
        (["--config=configs/vit_digits.py", "--config.num_bloks=2"], 2, 'Did you mean "num_blocks"'),
        (
            ["--config=configs/vit_digits.py", "--config.num_blocks=1.5"],
            2,
            "--config.num_blocks must be a whole number",
        ),
        (["--config=configs/vit_digits.py", "--mode=fly"], 2, "value should be one of <train|eval|predict"),
        (["--config=configs/vit_digits.py", "train"], 2, "unexpected argument 'train'"),
        (["--config=configs/vit_digits.py", "--checkpoint=last"], 2, "--checkpoint is for --mode=eval or predict or"),
        (["--config=configs/vit_digits.py", "--mode=predict"], 2, "--mode=predict needs --images"),
        (["--config=configs/vit_digits.py", "--config.patch_size=3"], 1, "patch_size=3 must divide image_size=8"),
        (["--config=configs/vit_digits.py", "--distributed"], 1, "set JAX_COORDINATOR_ADDRESS=HOST:PORT"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(tmp_path, args, code, message):
    done = launch(*args, f"--workdir={tmp_path / 'new'}")
    assert done.returncode == code
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout
    assert not (tmp_path / "new").exists()


@pytest.mark.filterwarnings("ignore:the load_module")  # by which ml_collections reads a config
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config.flip=maybe"], "--config.flip must be True or False, not 'maybe'"),
        (["--distributed=2"], "--distributed must be True or False, not '2'"),
        (["--config.num_blocks=1.5"], "--config.num_blocks must be a whole number, not '1.5'"),
        (["--config.lr="], "--config.lr must be a number, not ''"),
        (["--config.lr.high=1"], "unknown config field lr.high: fields have no parts"),
        (["--mode=memory", "--gib=much"], "--gib must be a number, not 'much'"),
        (["--mode=memory", "--gib=nan"], "--gib must be a finite number greater than 0, not nan"),
        (["--mode=memory", "--gib=inf"], "--gib must be a finite number greater than 0, not inf"),
        (["--mode=memory", "--gib=-1"], "--gib must be a finite number greater than 0, not -1.0"),
        (
            ["--mode=predict", "--text=a"],
            "--text is for models of the task mask or next_token or recurrent, not for classify",
        ),
        (["--mode=predict", "--config=configs/mask_text.py"], "--mode=predict needs --text"),
        (["--mode=predict", "--config=configs/mask_text.py", "--text="], "--mode=predict needs --text"),
        (
            ["--mode=predict", "--config=configs/mask_text.py", "--text=a", "--images=b.png"],
            "--images is for models of the task classify, not for mask",
        ),
        (
            ["--mode=predict", "--config=configs/mask_text.py", "--text=a", "b"],
            "unexpected argument 'b': flags start with --",
        ),
        (["--mode=predict", "--config=configs/dit_digits.py"], "--mode=predict is not for models of the task generate"),
        (["--mode=memory", "--gib=0"], "--gib must be a finite number greater than 0, not 0.0"),
        (["--port=80"], "--port is for --mode=demo, not for train"),
        (["--mode=demo", "--port=65536"], "--port must lie in [0, 65535], not 65536"),
        (["--mode=demo", "--port=-1"], "--port must lie in [0, 65535], not -1"),
    ],
)
def test_values_that_do_not_parse_are_named_in_plain_words(capsys, monkeypatch, args, message):
    """In this process, with flags of its own."""
    import launch as launcher

    argv = ["launch.py", "--config=configs/vit_digits.py", *args]
    monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for the fields that are set
    monkeypatch.chdir(ROOT)
    saved = flagsaver.save_flag_values()
    try:
        with pytest.raises(SystemExit) as end:
            launcher.parse_flags(argv)
    finally:
        flagsaver.restore_flag_values(saved)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"launch.py: {message}\n"


def test_a_workdir_that_leads_nowhere_is_named_in_every_mode(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    done = launch(*TINY, f"--workdir={tmp_path / 'run'}", "--mode=eval")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert f"{tmp_path / 'run'} is a link to {tmp_path / 'gone'}, which is not there" in done.stderr


def test_long_lists_are_shown_by_three_of_their_numbers(tmp_path, capsys):
    """And kept whole."""
    result = {"mode": "eval", "accuracy_by_step": [i / 1000 for i in range(1, 1001)], "few": [1, 2, 3]}
    finish(tmp_path, result)
    shown = capsys.readouterr().out
    assert json.loads(shown) == result | {"accuracy_by_step": {"1": 0.001, "500": 0.5, "1000": 1.0}}
    assert len(shown) < 200 and json.loads((tmp_path / "eval.json").read_text()) == result


@pytest.mark.parametrize(
    ("count", "told"),
    [
        (2, "(after each denoising step: 0.5000, 1.0000)"),
        (1000, "(after denoising steps 1, 500, 1000: 0.0010, 0.5000, 1.0000)"),
    ],
)
def test_a_line_about_many_denoising_steps_is_short(tmp_path, caplog, count, told):
    logs = Logs(tmp_path, start=0, wandb=False, config={})
    display = Display(total_steps=1, start=0)
    progress = Progress(logs, display, steps_per_epoch=1, log_every=1, examples_per_step=1, health=Health(1, {}))
    found = {"top1": 1.0, "accuracy_by_step": [i / count for i in range(1, count + 1)]}
    task = Classify(dblock_digits.get_config(), Card(tuple("0123456789"), (8, 8, 1), (0.5,), (0.5,)))
    with caplog.at_level("INFO"):
        progress.evaluated(7, "test", found, task.tell(found))
    logs.close()
    assert caplog.messages == [f"step 7: test top1 1.0000 {told}"]
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(json.loads(line)["accuracy_by_step"]) == count


def test_long_scoring_tells_how_far_it_is(caplog, monkeypatch):
    """Where there is no terminal: a line every five seconds, none for what is done sooner."""
    now = iter([100.0, 104.0, 105.5, 106.0, 111.0])  # the start, and each batch
    monkeypatch.setattr("dblocks_jax.training.display.time", SimpleNamespace(monotonic=lambda: next(now)))
    with caplog.at_level("INFO"):
        at_each_batch = Display(total_steps=1, start=0).doing("scoring the test split")
        for _ in range(4):
            at_each_batch()
    assert caplog.messages == [f"scoring the test split: batch {i}, after 0:00:{s:02d}" for i, s in ((2, 6), (4, 11))]

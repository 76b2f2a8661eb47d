"""The command line as a user meets it: output, exit codes, one line for a mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = [
    "--config=configs/dblock_digits.py", "--config.num_layers=3", "--config.hidden_size=12", "--config.num_heads=2",
    "--config.intermediate_size=16", "--config.batch_size=700", "--config.num_epochs=1", "--config.num_warmup_steps=0",
]  # fmt: skip


def launch(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "launch.py", *args], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def test_train_then_evaluate(tmp_path):
    trained = launch(*TINY, f"--workdir={tmp_path}")
    assert trained.returncode == 0, trained.stderr
    result = json.loads(trained.stdout.splitlines()[-1])
    assert result["mode"] == "train" and result["num_images"] == 360
    assert json.loads((tmp_path / "train.json").read_text()) == result
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 12

    scored = launch(*TINY, f"--workdir={tmp_path}", "--mode=eval", "--config.num_inference_steps=1")
    assert scored.returncode == 0, scored.stderr
    result = json.loads(scored.stdout.splitlines()[-1])
    assert result["mode"] == "eval" and len(result["accuracy_by_step"]) == 1
    assert json.loads((tmp_path / "eval.json").read_text()) == result


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "--config is missing"),
        (["--config=configs/none.py"], 2, "there is no config file configs/none.py"),
        (["--config=configs/vit_digits.py", "--config.num_bloks=2"], 2, 'Did you mean "num_blocks"'),
        (["--config=configs/vit_digits.py", "--config.num_blocks=1.5"], 2, "invalid literal for int()"),
        (["--config=configs/vit_digits.py", "--mode=fly"], 2, "<train|eval>"),
        (["--config=configs/vit_digits.py", "train"], 2, "unexpected argument 'train'"),
        (["--config=configs/vit_digits.py", "--config.patch_size=3"], 1, "patch_size=3 must divide image_size=8"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(tmp_path, args, code, message):
    done = launch(*args, f"--workdir={tmp_path / 'new'}")
    assert done.returncode == code
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout
    assert not (tmp_path / "new").exists()

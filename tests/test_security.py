"""What a stranger's file can make the program do, and what the program tells of its user: nothing."""

import ast
from pathlib import Path

import pytest
from runs import ROOT, command, finish

from configs import dblock_digits
from dblocks_jax.data import tfds_builders
from dblocks_jax.data.datasets import Card
from dblocks_jax.models.blueprint import Blueprint
from dblocks_jax.modes.evaluate import find_data
from dblocks_jax.modes.load import Trained
from dblocks_jax.run.checkpoint import Checkpoints
from dblocks_jax.run.errors import UserError
from dblocks_jax.tasks.classify.task import CLASSIFY
from dblocks_jax.training.optimizer import new_part

UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def sources() -> list[Path]:
    return [*ROOT.glob("dblocks_jax/**/*.py"), *ROOT.glob("configs/*.py"), ROOT / "launch.py"]


def test_nothing_that_could_run_what_it_loads_is_used():
    """No pickle, no torch.load, no numpy pickles, no eval or exec, no archive is unpacked onto the disk."""
    assert len(sources()) > 40
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            roots = {name.split(".")[0] for name in imported}
            assert not roots & UNSAFE, path
            assert "torch" not in roots or path.name == "importing.py", path
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == "torch.load":
                    assert "weights_only=True" in ast.unparse(node), path
                if ast.unparse(node.func) == "Image.open":  # some of Pillow's formats are programs
                    assert "formats" in {keyword.arg for keyword in node.keywords}, (path, node.lineno)
                assert name not in {"eval", "exec", "extract", "extractall", "unpack_archive"}, (path, node.lineno)
                assert "allow_pickle" not in {keyword.arg for keyword in node.keywords}, (path, node.lineno)


@pytest.mark.long
def test_secrets_of_the_environment_reach_neither_files_nor_output(tmp_path):
    secrets = {"WANDB_API_KEY": "s3cret-of-wandb", "HF_TOKEN": "s3cret-of-hf", "AWS_SECRET_ACCESS_KEY": "s3cret-of-aws"}
    done = finish(*command(tmp_path / "run", max_steps=2), **secrets)
    assert done.returncode == 0, done.stderr
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 10
    everything = [path.read_bytes() for path in written]
    everything += [done.stdout.encode(), done.stderr.encode()]
    for content in everything:
        assert b"s3cret" not in content


def test_a_checkpoint_cannot_make_evaluation_write_where_it_says(tmp_path, monkeypatch):
    """Its config names a folder for data: that is looked into, but only a folder that the user named is written."""
    config = dblock_digits.get_config()
    config.update(dataset="cifar10", image_size=32, patch_size=4, data_dir=str(tmp_path / "elsewhere"))
    card = Card(tuple("0123456789"), (32, 32, 3), (0.5,) * 3, (0.5,) * 3)
    trained = Trained(CLASSIFY, config, card, 1, CLASSIFY.make(config, card), Blueprint({}), {})
    run = {"config": config.to_dict(), "data": card.to_dict()}
    monkeypatch.setattr(tfds_builders, "_check_reachable", lambda url: pytest.fail("it tried to download"))
    with pytest.raises(UserError, match=r"there is no prepared cifar10 in .*elsewhere.*set --config.data_dir"):
        find_data(trained, run, named=dblock_digits.get_config(), where="run")
    assert not (tmp_path / "elsewhere").exists()


def test_a_step_that_is_a_link_is_not_followed_when_it_is_removed(tmp_path):
    """Old checkpoints are deleted: a link in their place must not lead the deletion elsewhere."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("keep")
    parts = {"shared": new_part({"w": 1.0})}
    with Checkpoints(tmp_path / "run") as checkpoints:
        (tmp_path / "run" / "state" / "1").symlink_to(outside)
    with Checkpoints(tmp_path / "run") as checkpoints:
        for step in (2, 3, 4):
            checkpoints.save(step, parts, {})
    assert (outside / "precious").read_text() == "keep"

"""Runs of masked diffusion are runs as any other: grown, killed, trained apart and merged."""

from pathlib import Path

import numpy as np
import pytest
from saved import state_of
from test_growing import killed, run, steps  # noqa: F401 (the fixture by which runs share a compiled step)
from test_writing import TINY as OF_TEXT
from test_writing import text_of

from dblocks_jax.fields import mask
from dblocks_jax.modes.evaluate import evaluate_run
from dblocks_jax.modes.merge import merge
from dblocks_jax.run.errors import UserError

# Two steps to an epoch and to a checkpoint; two blocks make four steps.
TINY = OF_TEXT | {"score_samples": 0, "bound_draws": 1, "ema_decay": 0.9, "batch_size": 200, "gamma": 0.1}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text_of(1000))
    return path


def tiny(text: Path, **changes):
    config = mask.get_config()
    config.update(TINY | {"data_dir": str(text)} | changes)
    return config


def assert_same_state(found: Path, expected: Path, step: int) -> None:
    """Every parameter, moment and average, bit for bit."""
    found_state, expected_state = state_of(found, step), state_of(expected, step)
    assert found_state.keys() == expected_state.keys() and len(found_state) > 50
    for path, value in expected_state.items():
        np.testing.assert_array_equal(found_state[path], value, err_msg=path)


@pytest.mark.long
def test_a_run_killed_around_its_division_ends_in_the_same_bits(text, tmp_path):
    config = tiny(text, grow_at=(0.5,))
    whole = run(config, tmp_path / "whole")
    killed(config, tmp_path / "killed", 3)  # it goes on from step 2, where its one block becomes two
    resumed = run(config, tmp_path / "killed")
    assert resumed["bits"] == whole["bits"] and whole["step"] == 4 and resumed["steps_run"] == 2
    assert_same_state(tmp_path / "killed", tmp_path / "whole", 4)


@pytest.mark.long
def test_blocks_trained_apart_and_merged_are_those_trained_together(text, tmp_path):
    isolated = {"sharing": "isolated"}
    together = run(tiny(text, **isolated, block_schedule="sequential"), tmp_path / "together")
    parts = [tmp_path / "0", tmp_path / "1"]
    for block, part in enumerate(parts):
        assert "bits" not in run(tiny(text, **isolated, train_blocks=(block,)), part)
    merged = merge(parts, tmp_path / "merged", command=[])
    assert merged["checkpoint"] == together["step"] == 4
    assert_same_state(tmp_path / "merged", tmp_path / "together", 4)
    scored = evaluate_run(tiny(text), tmp_path / "merged", overrides={}, checkpoint="best")
    assert scored["bits_by_block"] == pytest.approx(together["bits_by_block"], rel=1e-6)
    text.write_text(text_of(1001))
    with pytest.raises(UserError, match="was trained on another text than that of text_file which is here now"):
        evaluate_run(tiny(text), tmp_path / "merged", overrides={}, checkpoint="best")

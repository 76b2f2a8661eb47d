"""Names of arms, and what is told apart."""

import json

import pytest

from dblocks_jax.modes.arms import Arm, difference, names_of_arms
from dblocks_jax.modes.compare import compare
from tests.test_pages import Page, finished

TWO_FREEDOMS = 4.30265  # Student's table, two degrees of freedom, 2.5 % above it


def plain(num_layers, steps, **others):
    return Arm(num_layers, 1, steps, is_plain=True, is_grown=False, others=others)


def blocks(num_layers, num_blocks, steps, *, is_grown=False, **others):
    return Arm(num_layers, num_blocks, steps, is_plain=False, is_grown=is_grown, others=others)


def test_arms_are_named_as_in_the_tables():
    """Of six layers in three blocks, trained for 300 steps."""
    arms = {
        "plain": plain(6, 100),
        "short": plain(2, 100),
        "short-long": plain(2, 300),
        "DiffusionBlocks": blocks(6, 3, 300),
        "grown": blocks(6, 3, 300, is_grown=True),
    }
    assert names_of_arms(list(arms.values())) == list(arms)


def test_who_is_nobodys_baseline_has_no_name():
    """Of another length or width, or a denoiser of one block; or where there are no blocks to be compared with."""
    strange = [plain(6, 300), plain(3, 100), plain(2, 200), plain(2, 300, width=512), blocks(2, 1, 300)]
    assert names_of_arms([blocks(6, 3, 300), *strange]) == ["DiffusionBlocks", "", "", "", "", ""]
    assert names_of_arms([plain(6, 100), plain(2, 100)]) == ["", ""]


def test_the_interval_is_welchs():
    """Two pairs, each of variance 2: an error of sqrt 2, and two degrees of freedom. One that is constant adds none."""
    half = TWO_FREEDOMS * 2**0.5
    assert difference([0.0, 2.0], [10.0, 12.0], 2) == pytest.approx((-10, -10 - half, -10 + half), rel=1e-5)
    of_one = 12.7062 * 1.0  # one degree of freedom, and an error of sqrt(2 / 2 + 0)
    assert difference([0.0, 2.0], [5.0, 5.0], 2) == pytest.approx((-4, -4 - of_one, -4 + of_one), rel=1e-5)
    assert difference([1.0], [1.0, 2.0], 2) is None
    assert difference([1.0, 1.0], [3.0, 3.0], 2) == (-2, -2, -2)


def test_differences_too_small_to_be_squared_have_an_interval():
    large, tiny = (difference([1 * unit, 3 * unit], [2 * unit, 5 * unit], 2) for unit in (1.0, 1e-85))
    assert tiny == pytest.approx(tuple(1e-85 * each for each in large), rel=1e-12, abs=0)


def test_of_more_arms_less_is_told_apart():
    """Three make three pairs, each of which may be wrong in a third of 5 %: 7.6488 in Student's table."""
    _, low, high = difference([0.0, 2.0], [10.0, 12.0], 3) or (0, 0, 0)
    assert (high - low) / 2 == pytest.approx(7.6488 * 2**0.5, rel=1e-4)


def test_a_comparison_says_what_is_told_apart(tmp_path, capsys):
    """Beside the best setting; where there is one seed nothing is said."""
    runs = [
        finished(tmp_path / f"{name}{seed}", top1, {"step": steps}, seed=seed, **fields)
        for name, steps, fields, of_seeds in [
            ("grown", 30, {"num_layers": 6, "num_blocks": 3, "grow_at": [0.5]}, (0.60, 0.62)),
            ("far", 10, {"num_layers": 6, "model_type": "vit"}, (0.20, 0.22)),
            ("near", 30, {"num_layers": 2, "model_type": "vit", "num_epochs": 300}, (0.59, 0.61)),
            ("once", 10, {"num_layers": 2, "model_type": "vit"}, (0.1,)),
        ]
        for seed, top1 in enumerate(of_seeds)
    ]
    rows = compare(runs, tmp_path / "out")["groups"]
    assert [row["arm"] for row in rows] == ["grown", "short-long", "plain", "short"]
    assert rows[0]["from_best"] is None and rows[3]["from_best"] is None
    near, far = rows[1]["from_best"], rows[2]["from_best"]
    assert near[0] == pytest.approx(-0.01) and near[1] < 0 < near[2] and far[0] == pytest.approx(-0.4) and far[2] < 0
    words = [row["from_best_words"] for row in rows]
    assert words[1].endswith("points, not told apart") and words[2].endswith("points, told apart")
    printed, page = capsys.readouterr().out, Page(tmp_path / "out" / "compare.html").text
    assert all(each in printed and each in page for each in ("grown", "short-long", words[1], words[2]))
    assert json.loads(json.dumps(rows)) == rows

"""Names of arms, and what is told apart."""

import json

import pytest

from dblocks_jax.modes.arms import Arm, difference, names_of_arms
from dblocks_jax.modes.compare import compare
from tests.test_pages import Page, finished


def test_arms_are_named_as_in_the_tables():
    """Of six layers in three blocks, trained for 300 steps; a network that is nobody's baseline has no name."""
    arms = {
        "plain": Arm(6, 1, 100, False),
        "short": Arm(2, 1, 100, False),
        "short-long": Arm(2, 1, 300, False),
        "DiffusionBlocks": Arm(6, 3, 300, False),
        "grown": Arm(6, 3, 300, True),
    }
    assert names_of_arms(list(arms.values())) == list(arms)
    strange = [Arm(6, 1, 300, False), Arm(3, 1, 100, False), Arm(2, 1, 200, False)]
    assert names_of_arms([arms["grown"], *strange]) == ["grown", "", "", ""]
    assert names_of_arms([arms["plain"], arms["short"]]) == ["", ""]


def test_the_interval_is_welchs():
    """Two pairs, each of variance 2: an error of sqrt 2, and two degrees of freedom: 4.303 in Student's table."""
    apart = difference([0.0, 2.0], [10.0, 12.0])
    assert apart is not None and apart == pytest.approx((-10, -10 - 4.30265 * 2**0.5, -10 + 4.30265 * 2**0.5), rel=1e-5)
    assert difference([1.0], [1.0, 2.0]) is None
    assert difference([1.0, 1.0], [3.0, 3.0]) == (-2, -2, -2)


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
    margin = 4.30265 * 0.01 * 2**0.5
    assert rows[1]["from_best"] == pytest.approx([-0.01, -0.01 - margin, -0.01 + margin], rel=1e-4)
    words = [row["from_best_words"] for row in rows]
    assert words == [
        "",
        "-1.0 [-7.1, +5.1] points, not told apart",
        "-40.0 [-46.1, -33.9] points, told apart",
        "",
    ]
    printed, page = capsys.readouterr().out, Page(tmp_path / "out" / "compare.html").text
    assert all(each in printed and each in page for each in ("grown", "short-long", words[1], words[2]))
    assert json.loads(json.dumps(rows)) == rows

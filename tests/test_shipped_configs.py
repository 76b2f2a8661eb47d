"""What each shipped config comes to, field by field, so that a changed default is seen in review.

After a change that is meant: uv run python -m tests.test_shipped_configs
"""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "configs"
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def resolved(name: str) -> str:
    """Every field of a config as a line `field = value`, sorted."""
    config = importlib.import_module(f"configs.{name}").get_config()
    return "".join(f"{field} = {value!r}\n" for field, value in sorted(config.to_dict().items()))


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_config_is_what_it_was(name):
    """Where this is meant: uv run python -m tests.test_shipped_configs"""
    assert resolved(name) == (GOLDEN / f"{name}.txt").read_text()


def test_every_text_is_of_a_config_that_is_shipped():
    assert sorted(path.stem for path in GOLDEN.glob("*.txt")) == NAMES


if __name__ == "__main__":
    for path in GOLDEN.glob("*.txt"):
        path.unlink()
    for name in NAMES:
        (GOLDEN / f"{name}.txt").write_text(resolved(name))

"""Where the values computed with the released program lie, and how close to them we have to be."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(os.environ.get("DBLOCKS_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))


class Config:
    """A golden file's shapes, plus the pooling that files without the field were made with."""

    pool = "cls"

    def __init__(self, text: str):
        vars(self).update(json.loads(text))


def files(pattern: str) -> list:
    """Golden files matching `pattern`, as pytest parameters; one skipped parameter where there are none."""
    found = sorted(FOLDER.glob(pattern))
    if not found:
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"no golden values ({pattern}) in {FOLDER.name}"))]
    return [pytest.param(path, id=path.stem) for path in found]


def load(path: Path) -> tuple[dict[str, np.ndarray], Config]:
    """All arrays of one file, and its config."""
    arrays = dict(np.load(path))
    return arrays, Config(str(arrays.pop("config")))


def under(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def assert_close(actual, expected: np.ndarray, tolerance: float, what: str = "") -> None:
    """Every entry within `tolerance` of the expected array's largest entry."""
    actual = np.asarray(actual)
    assert actual.shape == expected.shape, what
    error = np.max(np.abs(actual.astype(np.float64) - expected.astype(np.float64)), initial=0.0)
    assert error <= tolerance * np.max(np.abs(expected)), f"{what}: off by {error}"

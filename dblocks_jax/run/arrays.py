"""Trees of arrays as a file knows them: their checksums, types and shapes, and in what two of them differ."""

import json
import zlib
from typing import Any

import jax
import numpy as np


def checksum(tree: Any) -> int:
    """CRC-32 of a tree's arrays in the order of their paths, bit for bit. Waits for them."""
    leaves = sorted((jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree))
    crc = 0
    for _, leaf in leaves:
        crc = zlib.crc32(np.ascontiguousarray(leaf).data, crc)
    return crc


def checksums_of(trees: dict[str, Any]) -> dict[str, int]:
    """That of each part."""
    return {name: checksum(tree) for name, tree in trees.items()}


def checksum_of_json(value: Any) -> int:
    """CRC-32 of what JSON can hold, whatever the order of its keys."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def shapes_by_path(tree: Any) -> dict[str, str]:
    """Path of each leaf -> its dtype and shape. Orbax turns list indices and integer keys into strings: so do we."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): describe(leaf) for path, leaf in leaves}


def describe(array: Any) -> str:
    """Type and shape in words."""
    return f"{np.dtype(array.dtype).name}{list(array.shape)}"


def differences(*, expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """One line for each parameter that is missing, unexpected, or of another shape or type."""
    return [
        f"{path}: expected {expected.get(path, 'nothing')}, found {found.get(path, 'nothing')}"
        for path in sorted(expected.keys() | found.keys())
        if expected.get(path) != found.get(path)
    ]

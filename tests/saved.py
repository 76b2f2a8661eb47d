"""What a checkpoint holds, read without the code under test."""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp


def state_of(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by path."""
    folder = workdir.absolute() / "state" / str(step)
    with ocp.StandardCheckpointer() as checkpointer:
        items = [item for item in ("params", "adam", "average") if (folder / item).exists()]
        trees = {item: checkpointer.restore(folder / item) for item in items}
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(trees)}

"""Where arrays live: the batch is split over all devices, everything else is on each of them."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dblocks_jax.errors import UserError


def make_mesh() -> Mesh:
    """One axis, "data", over every device."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of every array on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Arrays split along their first axis, which the number of devices must divide."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


def check_batch_size(field: str, batch_size: int, mesh: Mesh) -> None:
    """Refuse a batch that cannot be split evenly.

    Raises:
      UserError: naming the field.
    """
    if batch_size % mesh.size:
        raise UserError(f"{field}={batch_size} cannot be split evenly over {mesh.size} devices")

"""Where arrays live: the batch is split over all devices of all processes, everything else is on each of them."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dblocks_jax.errors import UserError


def make_mesh() -> Mesh:
    """One axis, "data", over every device of every process."""
    # In this order process i holds the i-th part of a batch. `jax.make_mesh` may choose another.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of every array on every device. Each process brings the same values."""
    # Not `device_put`: with several processes it compares the values of each array over the network.
    return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec()), tree)


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Arrays split along their first axis: process i brings the i-th part, to be split evenly over its devices."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("data")), batch)


def gather(tree: Any, mesh: Mesh) -> Any:
    """Bring what is spread over devices to every device, where every process can fetch it. Does not wait."""
    return jax.jit(lambda arrays: arrays, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree)


def check_batch_size(field: str, batch_size: int, mesh: Mesh) -> None:
    """Refuse a batch that cannot be split evenly.

    Raises:
      UserError: naming the field.
    """
    if batch_size % mesh.size:
        raise UserError(f"{field}={batch_size} cannot be split evenly over {mesh.size} devices{_of_processes()}")


def _of_processes() -> str:
    return f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""

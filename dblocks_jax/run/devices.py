"""Where arrays live: batches are split over devices, parameters are on each, and idle blocks may rest elsewhere."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dblocks_jax.run.errors import UserError, brief
from dblocks_jax.run.spilled import InFile

DATA, BLOCK = "data", "block"  # the mesh's axes


def make_mesh(groups: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Every device of every process, or these, in `groups` along "block" and the rest along "data".

    Raises:
      UserError: the devices cannot be shared out among the groups.
    """
    # In this order process i holds the i-th part of a batch. `jax.make_mesh` may choose another.
    devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    of_process = min(Counter(device.process_index for device in devices).values())
    if of_process % groups:
        raise UserError(
            f"block_parallel needs a multiple of num_blocks={groups} devices in each process, "
            f"but there are {of_process}"
        )
    return Mesh(np.array(devices).reshape(-1, groups), (DATA, BLOCK), axis_types=(AxisType.Auto, AxisType.Auto))


def on_cpu() -> AbstractContextManager[Any]:
    """Arrays that are made in this context live in host memory: a whole model may not fit on a device."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])


@contextmanager
def naming_lack_of_memory() -> Iterator[None]:
    """Say what can be done where a device has too little memory.

    Raises:
      UserError: instead of XLA's error, which is many lines long.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "a device has too little memory: try a smaller batch_size with more accumulate_grad_batches, "
            "gradient_checkpointing, dtype=bfloat16, or idle_blocks=host (or disk) with block_schedule=chunked; "
            f"--mode=memory tells what fits ({brief(error)})"
        ) from error


def replicate(tree: Any, mesh: Mesh, memory: str = "device") -> Any:
    """A copy of every array on every device, or in "pinned_host" memory. Each process brings the same values."""
    # Not `device_put`: with several processes it compares the values of each array over the network.
    return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec(), memory_kind=memory), tree)


def spread(shapes: Any, mesh: Mesh, memory: str = "device") -> Any:
    """Where arrays lie that "data" shares out: each along the largest of its axes that can be cut evenly, if any."""
    count = mesh.shape[DATA]

    def place(leaf: Any) -> NamedSharding:
        even = [axis for axis, size in enumerate(leaf.shape) if size % count == 0]
        axis = max(even, key=lambda axis: leaf.shape[axis], default=None)
        spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, DATA)
        return NamedSharding(mesh, spec, memory_kind=memory)

    return jax.tree.map(place, shapes)


def replicated(shapes: Any, mesh: Mesh, memory: str = "device") -> Any:
    """Shapes of arrays that are to be placed as `replicate` places them. Nothing is allocated."""
    sharding = NamedSharding(mesh, PartitionSpec(), memory_kind=memory)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def stack_over_blocks(trees: Sequence[Any], mesh: Mesh) -> Any:
    """Trees of equal shapes, one for each block, as one whose arrays are split by block: [blocks, ...]."""
    sharding = NamedSharding(mesh, PartitionSpec(BLOCK))

    def stack(*leaves: Any) -> jax.Array:
        on_host = [np.asarray(leaf) for leaf in leaves]

        def part(index: Any) -> np.ndarray:
            return np.stack(on_host[index[0]])

        return jax.make_array_from_callback((len(leaves), *on_host[0].shape), sharding, part)

    return jax.tree.map(stack, *trees)


def unstack(tree: Any, mesh: Mesh) -> list[Any]:
    """The inverse of `stack_over_blocks`, in host memory."""

    def fetch(block: int, leaf: jax.Array) -> np.ndarray:
        # Every process has a device of every block.
        mine = next(shard for shard in leaf.addressable_shards if shard.index[0].indices(mesh.shape[BLOCK])[0] == block)
        return np.asarray(mine.data).reshape(leaf.shape[1:])

    on_host = [jax.tree.map(partial(fetch, block), tree) for block in range(mesh.shape[BLOCK])]
    return [replicate(part, mesh, "pinned_host") for part in on_host]


def shard(tree: Any, mesh: Mesh, axis: int = 0) -> Any:
    """Arrays split along `axis` over "data": process i brings the i-th part, to be split evenly over its devices."""
    spec = PartitionSpec(*[None] * axis, DATA)
    return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), tree)


def to_host(tree: Any) -> Any:
    """Move arrays from their devices' memory to the memory of their hosts, from where a device fetches fastest."""
    return _move(tree, "pinned_host")


def to_device(tree: Any) -> Any:
    """Bring arrays back that `to_host` moved, or that wait in a file; others stay as they are."""
    return _move(from_file(tree, jax.device_put), "device")


def from_file(tree: Any, place: Callable[[Any], Any]) -> Any:
    """Arrays that wait in a file as `place` places them; others stay as they are.

    On a CPU `jax.device_put` takes the pages of the file for the array's memory.
    """
    return jax.tree.map(lambda leaf: place(leaf) if isinstance(leaf, InFile) else leaf, tree)


def _move(tree: Any, memory: str) -> Any:
    if all(leaf.sharding.memory_kind == memory for leaf in jax.tree.leaves(tree)):
        return tree
    return jax.device_put(tree, jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind(memory), tree))


def gather(tree: Any, mesh: Mesh) -> Any:
    """Bring what is spread over devices to every device, where every process can fetch it. Does not wait."""
    return jax.jit(lambda arrays: arrays, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree)


def check_batch_size(field: str, batch_size: int, mesh: Mesh) -> None:
    """Refuse a batch that cannot be split evenly.

    Raises:
      UserError: naming the field.
    """
    count = mesh.shape[DATA]
    if batch_size % count:
        raise UserError(f"{field}={batch_size} cannot be split evenly over {count} devices{_of_processes()}")


def _of_processes() -> str:
    return f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""

"""How batches reach the step: a small training set lives on the device, a larger one is read while the device works."""

import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from dblocks_jax.data.batches import batch_indices, train_batches
from dblocks_jax.data.source import Source
from dblocks_jax.run.devices import replicate, shard

RESIDENT_BYTES = 256 * 2**20  # a training set up to this size lives on the device; CIFAR's take 150 MB


class Resident(NamedTuple):
    """A training set that lives on the device, and which of its examples each of the next steps takes."""

    examples: Any  # a pytree of arrays [n, ...]
    indices: Int[Array, "k b"]


class Streamed(NamedTuple):
    """The batch of one step, brought from the host."""

    batch: Any  # a pytree of arrays [b, ...]


def make_feed(source: Source, *, batch_size: int, seed: int, most: int, mesh: Mesh):
    """The feed that suits the size of `source`. A batch has `batch_size` examples over all processes.

    Raises:
      UserError: the batch is larger than the data set, or cannot be shared out among the processes.
    """
    one = source.take(np.arange(1))
    if len(source) * sum(array.nbytes for array in jax.tree.leaves(one)) <= RESIDENT_BYTES:
        return DeviceFeed(source, batch_size=batch_size, seed=seed, most=most, mesh=mesh)
    return HostFeed(source, batch_size=batch_size, seed=seed, mesh=mesh)


class DeviceFeed:
    """All examples on every device; a call of the step is told which to take: up to `most` batches at a time."""

    def __init__(self, source: Source, *, batch_size: int, seed: int, most: int, mesh: Mesh):
        self.most = most
        self.waited = 0.0  # seconds spent waiting for examples
        self._indices = batch_indices(len(source), batch_size=batch_size, seed=seed)
        share = batch_size // jax.process_count()
        self._mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        self._share = share
        self._mesh = mesh
        self._examples = replicate(source.take(np.arange(len(source))), mesh)

    def take(self, position: int, count: int) -> Resident:
        """The batches of steps position, position + 1, ..., of which there are `count`."""
        indices = np.zeros((self.most, self._share), np.int32)
        for i in range(count):
            indices[i] = self._indices(position + i)[self._mine]
        return Resident(self._examples, shard(indices, self._mesh, axis=1))


class HostFeed:
    """Examples read ahead by Grain, one batch at a time."""

    def __init__(self, source: Source, *, batch_size: int, seed: int, mesh: Mesh):
        self.most = 1
        self.waited = 0.0  # seconds spent waiting for examples
        processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        self._batches = train_batches(source, batch_size=batch_size, seed=seed, **processes)
        self._mesh = mesh
        self._next = 0

    def take(self, position: int, count: int) -> Streamed:
        """The batch of step `position`; steps asked for in order are read ahead."""
        assert count == 1
        if position != self._next:
            self._batches.set_state({"next_index": position})
        self._next = position + 1
        began = time.perf_counter()
        batch = next(self._batches)
        self.waited += time.perf_counter() - began
        return Streamed(shard(batch, self._mesh))

"""How batches reach the step: a small training set lives on the device, a larger one is read while the device works."""

import time

import jax
import numpy as np
from jax.sharding import Mesh

from dblocks_jax.data.batches import batch_indices, train_batches
from dblocks_jax.data.datasets import Source
from dblocks_jax.run.devices import replicate, shard
from dblocks_jax.training.step import Resident, Streamed

RESIDENT_BYTES = 256 * 2**20  # training images up to this size live on the device; CIFAR's take 150 MB


def make_feed(source: Source, *, image_shape: tuple[int, int, int], batch_size: int, seed: int, most: int, mesh: Mesh):
    """The feed that suits the size of `source`. A batch has `batch_size` images over all processes.

    Raises:
      UserError: the batch is larger than the data set, or cannot be shared out among the processes.
    """
    if len(source) * int(np.prod(image_shape)) <= RESIDENT_BYTES:
        return DeviceFeed(source, batch_size=batch_size, seed=seed, most=most, mesh=mesh)
    return HostFeed(source, batch_size=batch_size, seed=seed, mesh=mesh)


class DeviceFeed:
    """All images on every device; a call of the step is told which to take. It takes up to `most` batches at a time."""

    def __init__(self, source: Source, *, batch_size: int, seed: int, most: int, mesh: Mesh):
        self.most = most
        self.waited = 0.0  # seconds spent waiting for images
        self._indices = batch_indices(len(source), batch_size=batch_size, seed=seed)
        share = batch_size // jax.process_count()
        self._mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        self._share = share
        self._mesh = mesh
        self._images = replicate(source.images(np.arange(len(source))), mesh)
        self._labels = replicate(source.labels, mesh)

    def take(self, position: int, count: int) -> Resident:
        """The batches of steps position, position + 1, ..., of which there are `count`."""
        indices = np.zeros((self.most, self._share), np.int32)
        for i in range(count):
            indices[i] = self._indices(position + i)[self._mine]
        return Resident(self._images, self._labels, shard(indices, self._mesh, axis=1))


class HostFeed:
    """Images read ahead by Grain, one batch at a time."""

    def __init__(self, source: Source, *, batch_size: int, seed: int, mesh: Mesh):
        self.most = 1
        self.waited = 0.0  # seconds spent waiting for images
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
        return Streamed(*(shard(batch[name], self._mesh) for name in ("image", "label")))

"""Batches for training and evaluation: Grain over indices, so that a whole batch is gathered in one call."""

import sys
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from jaxtyping import Int

from dblocks_jax.data.source import Source
from dblocks_jax.run.errors import UserError

# Enough to hide a batch of decoding behind a step. Grain's own 16 threads and 500 batches would fill the memory at 224
# pixels, and at 32 pixels the threads' struggle for the interpreter halves the throughput.
READ_THREADS, READ_AHEAD = 2, 4


@runtime_checkable
class Batches(Protocol):
    """An endless iterator of batches whose position can be read and set."""

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]: ...
    def __next__(self) -> dict[str, np.ndarray]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Full batches in one pass.

    Raises:
      UserError: not even one is there.
    """
    if batch_size > num_examples:
        raise UserError(f"a batch of {batch_size} examples is larger than the training set of {num_examples}")
    return num_examples // batch_size


def batch_indices(num_examples: int, *, batch_size: int, seed: int) -> Callable[[int], Int[np.ndarray, " b"]]:
    """Step -> the images of its batch, a function of the seed.

    Every epoch has its own order, visits an image at most once, and drops what does not fill a batch.

    Raises:
      UserError: the batch is larger than the data set.
    """
    steps = steps_per_epoch(num_examples, batch_size)

    @lru_cache(maxsize=2)  # threads that read ahead are at most one epoch apart
    def order(epoch: int) -> Int[np.ndarray, " n"]:
        return np.random.default_rng([zlib.crc32(b"order"), seed, epoch]).permutation(num_examples)

    def indices(step: int) -> Int[np.ndarray, " b"]:
        epoch, position = divmod(int(step), steps)
        return order(epoch)[position * batch_size : (position + 1) * batch_size]

    return indices


def train_batches(
    source: Source, *, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> Batches:
    """Endless batches of b = batch_size / process_count examples.

    The batches are those of `batch_indices`; process i gets the i-th part of each.

    Raises:
      UserError: the batch is larger than the data set, or cannot be shared out among the processes.
    """
    import grain

    indices = batch_indices(len(source), batch_size=batch_size, seed=seed)
    if batch_size % process_count:
        raise UserError(f"batch_size={batch_size} must be a multiple of the {process_count} processes")
    share = batch_size // process_count

    def batch(step: int) -> dict[str, np.ndarray]:
        return source.take(indices(step)[process_index * share : (process_index + 1) * share])

    # Not MapDataset.shuffle: it draws one index at a time, which takes longer than gathering the examples.
    return cast(Batches, iter(grain.MapDataset.range(sys.maxsize).map(batch).to_iter_dataset(_read_options())))


def eval_batches(
    source: Source, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Each example once, in order, as a dict, and position: int32 [b], mask: bool [b] beside what the source gives.

    The last batch is filled with repetitions of the last example, where mask is False: all batches have one shape.
    Process i gets the i-th part of each batch: b = batch_size / process_count.
    """
    import grain

    share = batch_size // process_count

    def batch(start: int) -> dict[str, np.ndarray]:
        positions = start + process_index * share + np.arange(share)
        indices = np.minimum(positions, len(source) - 1)
        where = {"position": positions.astype(np.int32), "mask": positions < len(source)}
        return source.take(indices) | where

    return iter(grain.MapDataset.range(0, len(source), batch_size).map(batch).to_iter_dataset(_read_options()))


def _read_options():
    import grain

    return grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=READ_AHEAD)

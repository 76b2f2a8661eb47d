"""Batches: every image as often as it should be, the same after a restore, and shared out without loss."""

from itertools import islice

import numpy as np
import orbax.checkpoint as ocp
import pytest
from grain.checkpoint import CheckpointRestore, CheckpointSave

from dblocks_jax.data.batches import eval_batches, steps_per_epoch, train_batches
from dblocks_jax.data.datasets import ArraySource, FileSource, stamp
from dblocks_jax.run.errors import UserError


def numbered(count: int) -> ArraySource:
    """Image i is filled with i, and so is its label."""
    numbers = np.arange(count)
    pixels = np.broadcast_to(numbers.astype(np.uint8)[:, None, None, None], (count, 2, 3, 1))
    return ArraySource(pixels, numbers.astype(np.int32))


def labels_of(batches, count: int) -> np.ndarray:
    return np.stack([batch["label"] for batch in islice(batches, count)])


def test_batches_hold_matching_images_and_labels():
    batch = next(train_batches(numbered(10), batch_size=4, seed=0))
    assert set(batch) == {"image", "label"}
    assert (batch["image"].shape, batch["image"].dtype) == ((4, 2, 3, 1), np.uint8)
    assert (batch["label"].shape, batch["label"].dtype) == ((4,), np.int32)
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])


def test_each_epoch_visits_an_image_at_most_once_in_an_order_of_its_own():
    source = numbered(50)
    assert steps_per_epoch(len(source), 8) == 6
    epochs = labels_of(train_batches(source, batch_size=8, seed=3), 4 * 6).reshape(4, 48)
    for epoch in epochs:
        assert len(np.unique(epoch)) == 48
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({tuple(sorted(epoch)) for epoch in epochs}) > 1  # it is not always the same two that are dropped


def test_the_seed_decides_the_order():
    first, same, other = (labels_of(train_batches(numbered(50), batch_size=8, seed=s), 13) for s in (3, 3, 4))
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("done", [0, 1, 5, 6, 7, 20])  # six batches are an epoch
def test_a_restored_iterator_goes_on_where_the_saved_one_was(done):
    batches = train_batches(numbered(50), batch_size=8, seed=2**32 - 1)
    labels_of(islice(batches, done), done) if done else None
    state = batches.get_state()
    expected = labels_of(batches, 15)
    fresh = train_batches(numbered(50), batch_size=8, seed=2**32 - 1)
    next(fresh)
    fresh.set_state(state)
    np.testing.assert_array_equal(labels_of(fresh, 15), expected)


def test_its_position_is_saved_by_orbax(tmp_path):
    batches = train_batches(numbered(50), batch_size=8, seed=1)
    labels_of(batches, 4)
    with ocp.CheckpointManager(tmp_path, item_names=("data",)) as manager:
        manager.save(4, args=ocp.args.Composite(data=CheckpointSave(batches)))
        expected = labels_of(batches, 9)
        fresh = train_batches(numbered(50), batch_size=8, seed=1)
        manager.restore(4, args=ocp.args.Composite(data=CheckpointRestore(fresh)))
    np.testing.assert_array_equal(labels_of(fresh, 9), expected)


@pytest.mark.parametrize("processes", [2, 4])
def test_the_parts_of_all_processes_are_the_batch(processes):
    whole = labels_of(train_batches(numbered(50), batch_size=8, seed=5), 10)
    parts = [
        labels_of(train_batches(numbered(50), batch_size=8, seed=5, process_index=i, process_count=processes), 10)
        for i in range(processes)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_impossible_batches_are_refused():
    with pytest.raises(UserError, match="batch of 51 examples is larger than the training set of 50"):
        train_batches(numbered(50), batch_size=51, seed=0)
    with pytest.raises(UserError, match="batch_size=9 must be a multiple of the 2 processes"):
        train_batches(numbered(50), batch_size=9, seed=0, process_count=2)


@pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (1, 4), (10, 1), (10, 5), (11, 5), (9, 5), (10, 16)])
def test_evaluation_sees_every_image_once_in_batches_of_one_shape(count, batch_size):
    batches = list(eval_batches(numbered(count), batch_size=batch_size))
    assert {batch["image"].shape for batch in batches} == {(batch_size, 2, 3, 1)}
    assert all(batch["mask"].dtype == np.bool_ and batch["label"].dtype == np.int32 for batch in batches)
    for name in ("image", "label"):
        seen = np.concatenate([batch[name][batch["mask"]] for batch in batches])
        np.testing.assert_array_equal(seen.reshape(count, -1)[:, 0], np.arange(count))
    assert not np.concatenate([batch["mask"] for batch in batches])[count:].any()
    assert len(batches) == -(-count // batch_size)


def test_an_unreadable_image_is_named_through_the_reading_threads(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    source = FileSource((broken,), np.zeros(1, np.int32), 4, np.array([stamp(broken)]))
    with pytest.raises(UserError, match=r"broken\.png"):
        next(train_batches(source, batch_size=1, seed=0))
    with pytest.raises(UserError, match=r"broken\.png"):
        next(eval_batches(source, batch_size=1))


class Broken:
    """A source that fails at its tenth image."""

    labels = np.zeros(50, np.int32)

    def __init__(self, error: BaseException):
        self._error = error

    def __len__(self) -> int:
        return 50

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": self.images(indices), "label": self.labels[indices]}

    def images(self, indices: np.ndarray) -> np.ndarray:
        if (indices >= 10).any():
            raise self._error
        return np.zeros((len(indices), 2, 3, 1), np.uint8)


@pytest.mark.parametrize("error", [OSError("the disk is gone"), MemoryError(), SystemExit(3)])
def test_a_reading_thread_that_fails_is_reported_and_not_waited_for(error):
    """Whatever it fails of: a thread cannot die and leave the loop waiting."""
    for batches in (
        train_batches(Broken(error), batch_size=8, seed=0),
        eval_batches(Broken(error), batch_size=8),
    ):
        with pytest.raises(type(error)):
            for _ in range(7):
                next(batches)

"""Which block when: fairness, repeatability, and blocks that do not depend on one another."""

import numpy as np
import pytest

from dblocks_jax.training.curriculum import Curriculum


def curriculum(schedule: str, *, seed: int = 0, blocks=(0, 1, 2), num_blocks: int = 3, chunk: int = 5, steps: int = 60):
    return Curriculum(seed, schedule, chunk, num_blocks, tuple(blocks), steps)


def turns(plan: Curriculum) -> list[tuple[int, int]]:
    return [plan.at(step) for step in range(plan.total_steps)]


def test_random_draws_are_uniform_and_repeatable():
    drawn = [block for block, _ in turns(curriculum("random", steps=3000))]
    counts = np.bincount(drawn, minlength=3)  # standard deviation 26
    assert np.all(np.abs(counts - 1000) < 110)
    assert drawn == [block for block, _ in turns(curriculum("random", steps=3000))]
    assert drawn != [block for block, _ in turns(curriculum("random", steps=3000, seed=1))]
    assert [position for _, position in turns(curriculum("random"))] == list(range(60))


@pytest.mark.parametrize("schedule", ["chunked", "sequential"])
def test_each_block_makes_the_same_steps_together_or_apart(schedule):
    together = turns(curriculum(schedule))
    for block in range(3):
        positions = [position for b, position in together if b == block]
        assert positions == list(range(20))
        alone = turns(curriculum(schedule, blocks=(block,), steps=20))
        assert alone == [(block, position) for position in range(20)]
    rates = [curriculum(schedule).rate_step(position) for position in range(20)]
    assert rates == list(range(0, 60, 3))


def test_a_run_of_some_blocks_goes_through_the_whole_learning_rate():
    """Drawn at random or not: a part trained apart ends where the schedule ends."""
    for blocks, steps in (((1,), 20), ((0, 2), 40), ((0, 1, 2), 60)):
        plan = curriculum("random", blocks=blocks, steps=steps)
        rates = [plan.rate_step(position) for position in range(steps)]
        assert rates[0] == 0 and np.ptp(np.diff(rates)) <= 1 and 60 - 3 <= rates[-1] < 60


@pytest.mark.parametrize("steps", [1, 2, 14, 17, 29, 60])
@pytest.mark.parametrize("schedule", ["chunked", "sequential"])
def test_a_length_that_does_not_divide_is_shared_out_evenly(schedule, steps):
    """Blocks differ by a step at most, no position is left out, and no learning rate lies beyond the schedule's end."""
    plan = curriculum(schedule, steps=steps)
    positions = [[position for b, position in turns(plan) if b == block] for block in range(3)]
    assert all(own == list(range(len(own))) for own in positions)
    assert max(map(len, positions)) - min(map(len, positions)) <= 1
    assert all(plan.rate_step(position) < steps for own in positions for position in own)


def test_chunks_take_turns_in_rounds():
    blocks = [block for block, _ in turns(curriculum("chunked"))]
    chunks = [blocks[i : i + 5] for i in range(0, 60, 5)]
    assert all(len(set(chunk)) == 1 for chunk in chunks)
    orders = [tuple(chunk[0] for chunk in chunks[i : i + 3]) for i in range(0, 12, 3)]
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    assert len(set(orders)) > 1


def test_sequential_goes_from_the_noisiest_block_to_the_quietest():
    blocks = [block for block, _ in turns(curriculum("sequential"))]
    assert blocks == [0] * 20 + [1] * 20 + [2] * 20


@pytest.mark.parametrize("schedule", ["random", "chunked", "sequential"])
@pytest.mark.parametrize("most", [1, 4, 100])
def test_a_run_of_steps_stays_with_its_block(schedule, most):
    """Runs tile the steps, hold one block at consecutive positions, and end only where they must."""
    plan, step = curriculum(schedule), 0
    expected = turns(plan)
    while step < 50:
        count = plan.run(step, most)
        assert 1 <= count <= most
        block, position = expected[step]
        assert expected[step : step + count] == [(block, position + i) for i in range(count)]
        if count < most and step + count < 60:
            assert expected[step + count] != (block, position + count)
        step += count


def test_the_plain_model_is_one_block():
    plan = curriculum("random", blocks=(0,), num_blocks=1)
    assert turns(plan) == [(0, step) for step in range(60)]
    assert plan.run(0, 25) == 25 and plan.rate_step(7) == 7

"""What each training step trains: which block, at which point of the block's own data, noise and learning rate."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

BLOCK_SCHEDULES = ("random", "chunked", "sequential")


class Turn(NamedTuple):
    """One training step: the block it trains, and the position at which data and random numbers are taken."""

    block: int
    position: int


@dataclass(frozen=True)
class Curriculum:
    """The order in which `blocks` are trained over `total_steps` steps. The plain model is one block.

    "random": a block is drawn for each step (paper, Algorithm 1), and step t uses the t-th batch whatever the block.
    "chunked": blocks take turns of `chunk_steps` steps, in a new random order each round. A last, shorter round is
    shared out evenly.
    "sequential": each block is trained to its end before the next.

    In the last two each block goes through data, random numbers and learning rates by itself: position n is its n-th
    step. So nothing about a block depends on when, or where, the others are trained.
    """

    seed: int
    schedule: str
    chunk_steps: int
    num_blocks: int
    blocks: tuple[int, ...]
    total_steps: int

    def at(self, step: int) -> Turn:
        """The turn of a step (from 0)."""
        count = len(self.blocks)
        if self.num_blocks == 1:
            return Turn(0, step)
        if self.schedule == "random":
            return Turn(self.blocks[_draw(self.seed, step, count)], step)
        if self.schedule == "sequential":
            index, position = _in_turn(step, self.total_steps, count)
            return Turn(self.blocks[index], position)
        steps_of_round = self.chunk_steps * count
        round_, offset = divmod(step, steps_of_round)
        # The last round may be shorter.
        index, position = _in_turn(offset, min(steps_of_round, self.total_steps - round_ * steps_of_round), count)
        return Turn(self.blocks[_shuffle(self.seed, round_, count)[index]], round_ * self.chunk_steps + position)

    def run(self, step: int, most: int) -> int:
        """How many steps from `step` on, at most `most`, train the same block at consecutive positions."""
        block, position = self.at(step)
        most = min(most, self.total_steps - step)
        count = 1
        while count < most and self.at(step + count) == (block, position + count):
            count += 1
        return count

    def rate_step(self, position: int) -> int:
        """The step of the learning rate's schedule that belongs to a position.

        The schedule spans the updates of all blocks, trained here or elsewhere. Positions that count the steps of one
        block sample it evenly, and so do those of a run that trains only some blocks.
        """
        counted_together = len(self.blocks) if self.schedule == "random" else 1
        return position * self.num_blocks // counted_together


def _in_turn(step: int, steps: int, count: int) -> tuple[int, int]:
    """(whose turn, which of its steps) when `steps` are shared out evenly among `count`, one after another."""
    index = step * count // steps
    return index, step - -(-index * steps // count)


def _draw(seed: int, step: int, count: int) -> int:
    return int(np.random.Generator(np.random.Philox(key=seed, counter=step)).integers(count))


@lru_cache(maxsize=4)
def _shuffle(seed: int, round_: int, count: int) -> tuple[int, ...]:
    return tuple(map(int, np.random.Generator(np.random.Philox(key=seed, counter=round_)).permutation(count)))

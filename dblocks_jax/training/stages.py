"""Growing: one block first, on the whole corruption; then copies of it, each on its share; and so on."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ml_collections import ConfigDict

from dblocks_jax.run.errors import UserError
from dblocks_jax.tasks.task import Entry
from dblocks_jax.training.curriculum import Curriculum, Turn


@dataclass(frozen=True)
class Stage:
    """The steps start + 1 to end, in which the number of blocks stays. `config` is that of a run of so many blocks.

    Blocks have one depth in all stages. Positions, at which data and random numbers are taken, go on from stage to
    stage, and so does the learning rate's schedule.
    """

    config: ConfigDict
    start: int
    end: int
    curriculum: Curriculum

    def at(self, step: int) -> Turn:
        """The turn of a step (from 0)."""
        block, position = self.curriculum.at(step - self.start)
        return Turn(block, self.start + position)

    def run(self, step: int, most: int) -> int:
        """How many steps from `step` on, at most `most`, train the same block at consecutive positions."""
        return self.curriculum.run(step - self.start, most)

    def rate_step(self, position: int) -> int:
        """The step of the learning rate's schedule that belongs to a position."""
        return self.start + self.curriculum.rate_step(position - self.start)


def block_counts(config: ConfigDict, num_blocks: int) -> list[int]:
    """How many blocks each stage has: they grow by one factor, from 1 to all; without `grow_at` there is one stage.

    Raises:
      UserError: `grow_at` is not such a list, or does not lead to `num_blocks`.
    """
    shares = list(config.grow_at)
    if not shares:
        return [num_blocks]
    ascending = all(type(share) in (int, float) for share in shares) and shares == sorted(set(shares))
    if not (ascending and shares[0] > 0 and shares[-1] < 1):
        raise UserError(f"grow_at must be ascending shares of the steps between 0 and 1, not {config.grow_at}")
    factor = round(num_blocks ** (1 / len(shares)))
    counts = [factor**i for i in range(len(shares) + 1)]
    if counts[-1] != num_blocks or factor == 1:
        raise UserError(
            f"grow_at={config.grow_at} divides {len(shares)} times, always by the same factor: "
            f"num_blocks={num_blocks} cannot be reached so"
        )
    return counts


def stage_config(config: ConfigDict, num_blocks: int) -> ConfigDict:
    """The config of a run of `num_blocks` blocks of the same depth."""
    if num_blocks == config.num_blocks or not config.grow_at:
        return config
    depth = config.num_layers // config.num_blocks
    return ConfigDict({**config.to_dict(), "num_blocks": num_blocks, "num_layers": depth * num_blocks, "grow_at": ()})


def make_stages(entry: Entry, config: ConfigDict, curriculum_of: Any, total_steps: int) -> list[Stage]:
    """The stages of a run of `total_steps`. `curriculum_of(config, steps)` tells which block when within a stage.

    Raises:
      UserError: see `block_counts`; or a stage has no step.
    """
    counts = block_counts(config, entry.num_blocks(config))
    edges = [0, *(round(share * total_steps) for share in config.grow_at), total_steps]
    if any(start >= end for start, end in pairwise(edges)) and config.grow_at:
        raise UserError(f"grow_at={config.grow_at}: {total_steps} steps are too few for so many stages")
    stages = []
    for count, start, end in zip(counts, edges[:-1], edges[1:], strict=True):
        of_stage = stage_config(config, count)
        stages.append(Stage(of_stage, start, end, curriculum_of(of_stage, end - start)))
    return stages


def divide(parts: Iterable[str], names: Iterable[str], *, before: int, after: int) -> dict[str, str]:
    """For each of the parts `names`, of a model of `after` blocks, the one of `parts` whose copy it begins as.

    `parts` are of a model of `before` blocks. Block j begins as block j * before // after, whose share of the
    corruption holds its own. What all blocks share stays what it is; where it is every block's own, that of the block
    is copied.

    Raises:
      UserError: the numbers of blocks do not fit, or the smaller model has no such part.
    """
    if after % before:
        raise UserError(f"{before} blocks cannot be divided into {after}")
    origin = {}
    for name in names:
        kind, _, number = name.partition("_")
        of = int(number) * before // after if number else 0
        candidates = (f"{kind}_{of}", kind) if number or before == 1 else (kind,)
        found = [candidate for candidate in candidates if candidate in parts]
        if not found:
            raise UserError(f"there is nothing that {name} could begin as: only {', '.join(sorted(parts))}")
        origin[name] = found[0]
    return origin

"""What a table of runs compares: the name of each arm, and whether it is told apart from the best one by its seeds."""

from collections.abc import Sequence
from typing import NamedTuple

from scipy.stats import ttest_ind

CONFIDENCE = 0.95


class Arm(NamedTuple):
    """What an arm is made of. `steps` are those of training, of all blocks together."""

    num_layers: int  # of all blocks together
    num_blocks: int
    steps: int
    is_grown: bool


class Interval(NamedTuple):
    """A difference of two means, and where it lies with CONFIDENCE."""

    difference: float
    low: float
    high: float


def names_of_arms(arms: Sequence[Arm]) -> list[str]:
    """The name of each, by its kin among the others; nothing for a plain network that is no DiffusionBlocks' baseline.

    Beside DiffusionBlocks of L layers in B blocks and S steps, "plain" has L layers and S / B steps, "short" L / B
    layers and S / B steps, "short-long" L / B layers and S steps.
    """
    of_blocks = [arm for arm in arms if arm.num_blocks > 1]

    def name(arm: Arm) -> str:
        if arm.num_blocks > 1:
            return "grown" if arm.is_grown else "DiffusionBlocks"
        for other in of_blocks:
            is_short = arm.num_layers * other.num_blocks == other.num_layers
            if arm.steps == other.steps and is_short:
                return "short-long"
            if arm.steps * other.num_blocks == other.steps and (is_short or arm.num_layers == other.num_layers):
                return "short" if is_short else "plain"
        return ""

    return [name(arm) for arm in arms]


def difference(values: Sequence[float], others: Sequence[float]) -> Interval | None:
    """mean(values) - mean(others) with Welch's interval; None where there are not two of both.

    Values that are all the same, in both, have no width.
    """
    if min(len(values), len(others)) < 2:
        return None
    found = sum(values) / len(values) - sum(others) / len(others)
    if len({*values}) == len({*others}) == 1:
        return Interval(found, found, found)
    low, high = ttest_ind(values, others, equal_var=False).confidence_interval(CONFIDENCE)
    return Interval(found, float(low), float(high))

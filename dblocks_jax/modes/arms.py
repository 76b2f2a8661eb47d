"""What a table of runs compares: the name of each arm, and what its seeds tell apart."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scipy.stats import t as student

CONFIDENCE = 0.95  # that all intervals of a table hold together


class Arm(NamedTuple):
    """What an arm is made of. `steps` are those of training, of all blocks together."""

    num_layers: int  # of all blocks together
    num_blocks: int
    steps: int
    is_plain: bool  # no denoiser
    is_grown: bool
    others: Mapping[str, Any]  # fields in which a baseline must not differ


class Interval(NamedTuple):
    """A difference of two means, and where it lies."""

    difference: float
    low: float
    high: float


def names_of_arms(arms: Sequence[Arm]) -> list[str]:
    """The name of each, by its kin among the others; nothing for one that is no DiffusionBlocks' baseline.

    Beside DiffusionBlocks of L layers in B blocks and S steps a plain network is called "plain" if it has L layers and
    S / B steps, "short" if L / B layers and S / B steps, "short-long" if L / B layers and S steps; and all else alike.
    """
    of_blocks = [arm for arm in arms if arm.num_blocks > 1]

    def name(arm: Arm) -> str:
        if arm.num_blocks > 1:
            return "grown" if arm.is_grown else "DiffusionBlocks"
        for other in of_blocks if arm.is_plain else []:
            if arm.others != other.others:
                continue
            is_short = arm.num_layers * other.num_blocks == other.num_layers
            if arm.steps == other.steps and is_short:
                return "short-long"
            if arm.steps * other.num_blocks == other.steps and (is_short or arm.num_layers == other.num_layers):
                return "short" if is_short else "plain"
        return ""

    return [name(arm) for arm in arms]


def difference(values: Sequence[float], others: Sequence[float], num_arms: int) -> Interval | None:
    """mean(values) - mean(others), and Welch's interval; None where there are not two of both.

    Whoever looks at the best of `num_arms` has looked at all pairs of them: so each interval is as wide as is needed
    for those of all pairs to hold together with CONFIDENCE (Bonferroni).
    """
    if min(len(values), len(others)) < 2:
        return None
    found = statistics.mean(values) - statistics.mean(others)
    parts = [statistics.variance(each) / len(each) for each in (values, others)]
    if sum(parts) == 0:
        return Interval(found, found, found)
    shares = [part / sum(parts) for part in parts]  # the square of a tiny part would be 0
    freedom = 1 / sum(share**2 / (len(each) - 1) for share, each in zip(shares, (values, others), strict=True))
    outside = (1 - CONFIDENCE) / math.comb(num_arms, 2)
    half = float(student.ppf(1 - outside / 2, freedom)) * math.sqrt(sum(parts))
    return Interval(found, found - half, found + half)

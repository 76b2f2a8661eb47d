"""Which of the checkpoints are kept: the latest, and the best by their scores."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LATEST_KEPT = 2  # should the newest be damaged, training goes on from the one before


class LatestAndBest:
    """Orbax's question what to keep, answered: the LATEST_KEPT latest, and the `save_top_k` best."""

    def __init__(self, scores: Mapping[int, float], save_top_k: int):
        self._scores = scores
        self._save_top_k = save_top_k

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        del context
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        kept = {*steps[-LATEST_KEPT:], *ranked(steps, self._scores)[: self._save_top_k]}
        return [checkpoint.step in kept for checkpoint in checkpoints]


def ranked(steps: Iterable[int], scores: Mapping[int, float]) -> list[int]:
    """Those that have a score, the best first; of equal ones the later."""
    return sorted((step for step in steps if step in scores), key=lambda step: (-scores[step], -step))

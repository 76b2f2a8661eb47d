"""Steps that changed nothing because their numbers were not finite: counted, named, and the end of a run if many."""

from typing import Any

from absl import logging
from jaxtyping import Float
from numpy import ndarray

from dblocks_jax.run.errors import Diverged, naming_malformed
from dblocks_jax.training.step import SKIPPED, WORST_LEVEL


class Health:
    """Counts skipped steps by block. It survives a restart: `record` goes into checkpoints, and comes back from there.

    The counts are those of all steps that have come home when it is asked; the device is never waited for.

    Raises:
      UserError: `record`, which may be a stranger's, holds no such counts.
    """

    def __init__(self, max_bad_steps: int, record: Any):
        with naming_malformed("what the checkpoint tells of skipped steps"):
            for by_block in record.values():
                if not all(type(count) is int for count in by_block.values()):
                    raise ValueError("its counts are no whole numbers")
        self.record = {"total": {}, "in_a_row": {}} | record  # block (as text: it lives in JSON) -> number of steps
        self._max_bad_steps = max_bad_steps
        self._too_many = ""

    def take(self, first_step: int, block: int, metrics: dict[str, Float[ndarray, " k"]]) -> list[dict[str, Any]]:
        """Look at a block's steps, of which the first has number `first_step` (from 1); return the skipped ones."""
        name = str(block)
        total, in_a_row = self.record["total"], self.record["in_a_row"]
        skipped = []
        for i, is_skipped in enumerate(metrics[SKIPPED]):
            if not is_skipped:
                in_a_row[name] = 0
                continue
            total[name] = total.get(name, 0) + 1
            in_a_row[name] = in_a_row.get(name, 0) + 1
            level = float(metrics[WORST_LEVEL][i]) if WORST_LEVEL in metrics else None
            skipped.append({"step": first_step + i, "block": block, "level": level})
            if in_a_row[name] == 1:
                logging.warning("%s: the update is skipped", describe(skipped[-1]))
            if in_a_row[name] >= self._max_bad_steps and not self._too_many:
                self._too_many = f"{describe(skipped[-1])}, the last of {in_a_row[name]} such steps in a row"
        return skipped

    def check(self) -> None:
        """Pass, or end the run here.

        Raises:
          Diverged: `max_bad_steps` steps of a block in a row were skipped.
        """
        if self._too_many:
            raise Diverged(
                f"{self._too_many}. Those steps changed nothing: the last checkpoint holds what was there before them. "
                "Try a smaller lr, more num_warmup_steps, or a larger sigma_min"
            )


def describe(skipped: dict[str, Any]) -> str:
    """A skipped step in words."""
    level = "" if skipped["level"] is None else f" (level of the worst sample: {skipped['level']:.4g})"
    return f"step {skipped['step']}, block {skipped['block']}: the loss or its gradient is not finite{level}"

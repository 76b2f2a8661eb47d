"""The results that modes leave in a run's folder, read by other modes: the folder may be a stranger's."""

import reprlib
from pathlib import Path
from typing import Any

from dblocks_jax.run.errors import UserError
from dblocks_jax.run.workdir import read_saved

NUMBER = int | float
KINDS: dict[str, Any] = {
    "mode": str, "top1": NUMBER, "macro_f1": NUMBER, "cross_entropy": NUMBER | None, "step": int,
    "checkpoint": int | None, "num_images": int, "diverged": bool, "data_dir": str, "sampler": dict,
    "arithmetic": dict, "accuracy_by_num_steps": dict, "loss": NUMBER | None, "accuracy_of_samples": NUMBER,
    "frechet_judge": NUMBER | None, "frechet_pixels": NUMBER | None, "kid_judge": NUMBER | None,
    "kid_pixels": NUMBER | None, "nearest_ratio": NUMBER | None, "num_sequences": int, "num_samples": int,
    "bits": NUMBER | None, "bits_error": NUMBER | None, "bits_by_block": list, "distinct_2": NUMBER,
    "repetition": NUMBER, "known_words": NUMBER, "bits_first": NUMBER | None,
    "bits_by_step": list, "bits_joined": NUMBER | None,
    "calibration_error": NUMBER | None,
}  # fmt: skip
SHARES = ("top1", "macro_f1", "accuracy_of_samples", "distinct_2", "repetition", "known_words")  # which lie in [0, 1]
SIGNED = ("kid_judge", "kid_pixels")  # estimates of what is not negative
LARGEST = 1e30


def read_result(workdir: Path, name: str) -> dict[str, Any] | None:
    """What a mode left in the file `name`, or None where there is none.

    Raises:
      UserError: a field is not what a mode writes; it is named.
    """
    result = read_saved(workdir, name)
    for field, value in (result or {}).items():
        is_sound = isinstance(value, KINDS.get(field, object))
        if is_sound and field in KINDS and isinstance(value, NUMBER):
            is_sound = (-LARGEST if field in SIGNED else 0) <= value <= (1 if field in SHARES else LARGEST)
        if field == "accuracy_by_num_steps" and isinstance(value, dict):
            is_sound = all(
                count.isdecimal() and isinstance(share, NUMBER) and 0 <= share <= 1 for count, share in value.items()
            )
        if not is_sound:
            raise UserError(f"{workdir / name}: {field} is {reprlib.repr(value)}, which no run writes: make it anew")
    return result

"""scikit-learn's handwritten digits, read from its files: to import the library takes longer than a short training."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from dblocks_jax.data.sources import ArraySource
from dblocks_jax.run.errors import UserError

IMAGES, SIDE, MOST_INK = 1797, 8, 16
# A bit for each image, set for the 360 test images: scikit-learn's stratified split of random_state=0.
IN_TEST = (
    "000004883524104000064100934205001a00080100240028062c12001000940a009019120420f8a0028110a000080a8820441524494240a0"
    "0a0000004004d80000818020004805c400104008a0100005404800301000020ec409000224840083a8013c20a6980a0000000b08400804a0"
    "184802024041c1008004404684376a810216004480004042a0a4180a5000840b8561c608108008004c80c02004068e000108820081003808"
    "03c008190000100e01008410a0210033282904c044c080680e0102830082008822a6402c24042108a860809081a00c02820242120138a415"
    "00"
)


def load_digits(which: str) -> ArraySource:
    """A split of the 1797 digits, "train" or "test", with grey levels 0..16 spread over 0..255.

    Raises:
      UserError: scikit-learn's file of them is not there.
    """
    table = _table()
    in_test = np.unpackbits(np.frombuffer(bytes.fromhex(IN_TEST), np.uint8))[:IMAGES].astype(bool)
    rows = table[in_test if which == "test" else ~in_test]
    pixels = np.rint(rows[:, :-1] * (255 / MOST_INK)).astype(np.uint8)
    return ArraySource(pixels.reshape(-1, SIDE, SIDE, 1), rows[:, -1].astype(np.int32))


@cache
def _table() -> Float64[np.ndarray, "1797 65"]:
    """A row for each image: its pixels, row by row, and its label."""
    library = find_spec("sklearn")
    folders = library.submodule_search_locations if library is not None else None
    path = Path(*(folders or ["sklearn"])[:1]) / "datasets" / "data" / "digits.csv.gz"
    try:
        return np.loadtxt(path, delimiter=",")
    except (OSError, ValueError) as error:
        raise UserError(f"the digits of scikit-learn cannot be read from {path}: install scikit-learn anew") from error

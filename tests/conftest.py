"""Strictness for every test: shapes checked at run time, no silent broadcasting, flags parsed."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

install_import_hook("dblocks_jax", "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()  # Grain reads absl flags


@pytest.fixture
def key():
    return jax.random.key(0)

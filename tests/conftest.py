"""Strictness for every test: shapes checked at run time, no silent broadcasting, flags parsed.

Compiling is most of the time that tests take. So each program is compiled once, into a cache that lives as long as the
session and that its workers share, and without LLVM's optimisations; XLA's own, which decide about memory, stay on.
"""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit what their parent sets here
    CACHE = tempfile.TemporaryDirectory(prefix="dblocks_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

from jaxtyping import install_import_hook

install_import_hook("dblocks_jax", "beartype.beartype")

import jax
import pytest
from absl import flags

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # golden values hold on accelerators too
flags.FLAGS.mark_as_parsed()  # Grain reads absl flags


@pytest.fixture
def key():
    return jax.random.key(0)

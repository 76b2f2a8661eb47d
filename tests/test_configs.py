"""Any config either trains a step or is refused with one line before anything is compiled or written.

The long version tries more of them: see docs/reliability.md.
"""

import tempfile
from pathlib import Path

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs import dblock_digits
from dblocks_jax.modes.train import train
from dblocks_jax.run.errors import Diverged, UserError
from dblocks_jax.training.config import CHOICES
from dblocks_jax.training.optimizer import SCHEDULES

SMALL = {
    "num_layers": 2, "num_blocks": 2, "hidden_size": 12, "num_heads": 2, "intermediate_size": 16, "batch_size": 700,
    "max_steps": 1, "eval_batch_size": 360,
}  # fmt: skip
HOSTILE_INTS = st.sampled_from([-1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**63, 10**30])
HOSTILE_FLOATS = st.sampled_from([-1.0, 0.0, 1e-300, 1e-30, 1e-3, 0.3, 0.5, 1.0, 80.0, 1e30, 1e300]) | st.floats()
HOSTILE_TEXT = st.sampled_from(["", "none", "digits", "{}", "../..", '{"min_lr": 1}', "[", "é\n"]) | st.text(max_size=8)


SPECIAL = {
    "max_steps": st.just(1),
    "dataset": st.sampled_from(["digits", "digits", "folder", "Digits"]) | st.text(max_size=8),
    "data_dir": st.sampled_from(["/nonexistent", "", "~", "/dev/null", "\0"]),
    "scheduler_type": st.sampled_from(list(SCHEDULES)) | HOSTILE_TEXT,
    "grow_at": st.sampled_from([(), (0.5,), (0.25, 0.5), (0.0,), (1.5,), (-1.0,), ("0.5",)]),
    "train_blocks": st.sampled_from([(), (0,), (1,), (0, 1), (1, 0), (5,), (-1,), ("0",)]),
} | {field: st.sampled_from(choices) | st.sampled_from(choices) | HOSTILE_TEXT for field, choices in CHOICES.items()}


def values_of(field: str, default: object) -> st.SearchStrategy:
    """Values that a flag can give a field, most of them sound."""
    if field in SPECIAL:
        return SPECIAL[field]
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        near = st.integers(max(0, default // 2), 2 * default + 2)
        return near | near | HOSTILE_INTS
    if isinstance(default, float):
        near = st.floats(0, 2 * default + 0.1)
        return near | near | HOSTILE_FLOATS
    return HOSTILE_TEXT


def changes_of() -> st.SearchStrategy[dict]:
    """A few fields, with values for them."""
    config = dblock_digits.get_config()
    config.update(SMALL)
    fields = sorted(config.keys())
    return st.lists(st.sampled_from(fields), min_size=1, max_size=5, unique=True).flatmap(
        lambda chosen: st.fixed_dictionaries({field: values_of(field, config[field]) for field in chosen})
    )


COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: COMPILED.append(event) if "backend_compile" in event else None
)
OUTCOMES: dict[str, int] = {}


def try_config(changes: dict) -> None:
    config = dblock_digits.get_config()
    config.update(SMALL)
    config.update(changes)
    COMPILED.clear()
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        try:
            result = train(config, workdir, command=[], overrides={})
        except UserError as error:
            message = str(error)
            assert message and "\n" not in message, message
            assert not COMPILED and not workdir.exists()
            outcome = "refused"
        except Diverged:
            outcome = "diverged"
        else:
            assert result["steps_run"] == 1
            outcome = "trained"
    OUTCOMES[outcome] = OUTCOMES.get(outcome, 0) + 1


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=5, derandomize=True, **QUIET)
@given(changes_of())
def test_a_config_trains_or_is_refused(changes):
    try_config(changes)


@pytest.mark.long
@settings(max_examples=600, print_blob=True, **QUIET)
@given(changes_of())
def test_600_configs_train_or_are_refused(changes):
    try_config(changes)


@pytest.mark.long
def test_print_the_outcomes(capsys):
    with capsys.disabled():
        print(f"\nconfigs tried: {OUTCOMES}")

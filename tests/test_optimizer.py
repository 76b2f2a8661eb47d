"""AdamW against optax's own, and the rules for parts, clipping and schedules."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dblocks_jax.run.errors import UserError
from dblocks_jax.training.optimizer import SCHEDULES, adamw, learning_rate, new_part


def test_two_parts_move_as_optax_moves_one_tree(key):
    params = {"a": jax.random.normal(key, (3, 2)), "b": jax.random.normal(key, (4,))}
    grads = jax.tree.map(lambda p: 0.01 * p + 0.001, params)
    reference = optax.adamw(1e-2, weight_decay=0.1)
    state, expected = reference.init(params), params
    parts = (new_part({"a": params["a"]}), new_part({"b": params["b"]}))
    for _ in range(3):
        updates, state = reference.update(grads, state, expected)
        expected = optax.apply_updates(expected, updates)
        parts, norm = adamw(
            parts, ({"a": grads["a"]}, {"b": grads["b"]}), lr=jnp.float32(1e-2), weight_decay=0.1, clip_norm=10.0
        )
    np.testing.assert_allclose(parts[0].params["a"], expected["a"], rtol=1e-5)
    np.testing.assert_allclose(parts[1].params["b"], expected["b"], rtol=1e-5)
    np.testing.assert_allclose(norm, optax.tree.norm(grads), rtol=1e-6)


def test_clipping_is_by_the_norm_of_all_parts_together():
    parts = (new_part({"w": jnp.zeros(1)}), new_part({"w": jnp.zeros(1)}))
    grads = ({"w": jnp.array([3.0])}, {"w": jnp.array([4.0])})
    moved, norm = adamw(parts, grads, lr=jnp.float32(1.0), weight_decay=0.0, clip_norm=1.0)
    assert norm == 5.0
    # After one step the first moment is (1 - b1) times the clipped gradient.
    np.testing.assert_allclose(moved[0].adam.mu["w"], 0.1 * 3 / 5, rtol=1e-5)
    np.testing.assert_allclose(moved[1].adam.mu["w"], 0.1 * 4 / 5, rtol=1e-5)


def test_weight_decay_reaches_every_parameter():
    part = new_part({"bias": jnp.array([2.0])})
    moved, _ = adamw((part,), ({"bias": jnp.zeros(1)},), lr=jnp.float32(0.5), weight_decay=0.1, clip_norm=1.0)
    np.testing.assert_allclose(moved[0].params["bias"], 2.0 * (1 - 0.5 * 0.1), rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_warm_up_from_zero_and_never_go_below_it(name):
    kwargs = '{"min_lr": 1e-5}' if name == "cosine_with_min_lr" else "{}"
    at = learning_rate(name, lr=1e-3, num_warmup_steps=10, total_steps=50, specific_kwargs=kwargs)
    assert at(0) == 0 and at(5) == pytest.approx(5e-4) and at(10) == pytest.approx(1e-3)
    rates = [at(step) for step in range(10, 51)]
    assert all(0 <= later <= earlier for earlier, later in pairwise(rates))


def test_a_minimum_rate_is_where_the_cosine_ends():
    absolute = learning_rate(
        "cosine_with_min_lr", lr=1e-3, num_warmup_steps=0, total_steps=10, specific_kwargs='{"min_lr": 1e-4}'
    )
    relative = learning_rate(
        "cosine_with_min_lr", lr=1e-3, num_warmup_steps=0, total_steps=10, specific_kwargs='{"min_lr_rate": 0.1}'
    )
    assert absolute(10) == pytest.approx(1e-4) == relative(10)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("polynomial", "{}", "constant_with_warmup, linear"),
        ("linear", '{"min_lr": 1}', "linear takes none"),
        ("cosine", "{min_lr: 1}", "not JSON"),
        ("cosine", "[1]", "JSON object"),
        pytest.param("cosine", "[" * 200_000, "not JSON", id="deep"),
        pytest.param("cosine", '{"num_cycles": ' + "1" * 5000 + "}", "not JSON", id="digits"),
        pytest.param("cosine", '{"num_cycles": ' + "1" * 400 + "}", "numbers from 0 to 1e", id="large"),
        ("cosine_with_min_lr", "{}", "needs scheduler_specific_kwargs"),
        ("cosine_with_min_lr", '{"min_lr": 1, "min_lr_rate": 1}', "give one"),
    ],
)
def test_schedule_mistakes_are_named(name, kwargs, message):
    with pytest.raises(UserError, match=message):
        learning_rate(name, lr=1e-3, num_warmup_steps=0, total_steps=10, specific_kwargs=kwargs)

"""Checkpoints: exact round trips, which are kept, and what is said when one does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dblocks_jax.run.arrays import differences
from dblocks_jax.run.checkpoint import Checkpoints
from dblocks_jax.run.devices import to_device, to_host
from dblocks_jax.run.errors import UserError
from dblocks_jax.training.optimizer import Part, new_part


def parts_of(value: float) -> dict[str, Part]:
    """A shared part and a block, with one update's worth of state."""
    params = {"shared": {"w": jnp.full((2, 3), value)}, "block_0": {"layers": {0: {"b": jnp.full(4, -value)}}}}
    parts = {name: new_part(p) for name, p in params.items()}
    return {
        name: Part(part.params, part.adam._replace(count=part.adam.count + 7, mu=jax.tree.map(jnp.sin, part.params)))
        for name, part in parts.items()
    }


@pytest.mark.parametrize("where", ["device", "host"])
def test_everything_comes_back_bit_for_bit_even_after_donation(tmp_path, where):
    """Wherever it was, and to where it was."""
    place = to_host if where == "host" else to_device
    parts = place(parts_of(1 / 3))
    expected = jax.device_get(parts)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, parts, {})
        double = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)
        jax.block_until_ready(double(double(to_device(parts))))  # overwrites the buffers while they may be in use
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(5, place(parts_of(0.0)))
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(restored)}
    assert kinds == {"pinned_host" if where == "host" else "device"}


def test_the_latest_two_and_the_best_are_kept(tmp_path):
    scores = {}
    with Checkpoints(tmp_path, scores=scores, save_top_k=1) as checkpoints:
        for step, top1 in [(10, 0.2), (20, 0.9), (30, 0.4), (40, 0.5), (50, 0.3)]:
            checkpoints.save(step, parts_of(float(step)), {"lr": 0.1})
            scores[step] = top1
        checkpoints.wait()
        assert (checkpoints.best(), checkpoints.steps()) == ([20, 40, 50], [20, 40, 50])
    with Checkpoints(tmp_path, scores=scores, save_top_k=1, read_only=True) as checkpoints:
        assert [checkpoints.find(which) for which in ("best", "last", "40")] == [20, 50, 40]
        with pytest.raises(UserError, match=r"'30'.*\[20, 40, 50\]"):
            checkpoints.find("30")
        params = checkpoints.restore_params(20, {name: part.params for name, part in parts_of(0.0).items()})
        assert checkpoints.run(20)["lr"] == 0.1
    np.testing.assert_array_equal(params["shared"]["w"], 20.0)


def test_where_none_is_kept_for_its_score_the_best_is_the_last(tmp_path):
    """Which are left beside the last depends on interruptions, and the result must not."""
    with Checkpoints(tmp_path, scores={10: 0.9, 20: 0.1}, save_top_k=0) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, parts_of(float(step)), {})
        checkpoints.wait()
        assert checkpoints.steps() == [10, 20]
        assert checkpoints.best() == [] and checkpoints.find("best") == 20


def test_without_validation_the_best_is_the_last(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == []
        with pytest.raises(UserError, match="no checkpoint yet"):
            checkpoints.find("best")
        for step in (1, 2, 3):
            checkpoints.save(step, parts_of(float(step)), {})
        checkpoints.wait()
        assert checkpoints.find("best") == 3


def test_a_checkpoint_of_another_architecture_is_explained_by_parameter(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, parts_of(1.0), {})
        checkpoints.wait()
        wanted = {"shared": new_part({"w": jnp.zeros((2, 4))}), "block_1": new_part({"b": jnp.zeros(4)})}
        with pytest.raises(UserError) as error:
            checkpoints.restore(1, wanted)
    lines = str(error.value).splitlines()
    assert [line.strip() for line in lines[1:]] == [
        "block_0/layers/0/b: expected nothing, found float32[4]",
        "block_1/b: expected float32[4], found nothing",
        "shared/w: expected float32[2, 4], found float32[2, 3]",
    ]


def test_equal_trees_do_not_differ():
    assert differences(expected={"a": "float32[2]"}, found={"a": "float32[2]"}) == []

"""A stranger's network and task, outside the package, trained by our trainer."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import dblocks_jax
from dblocks_jax.data.arrays import ArrayData
from dblocks_jax.run.devices import to_host
from dblocks_jax.run.errors import UserError
from dblocks_jax.run.workdir import logged
from dblocks_jax.training.heldout import held_out_loss
from dblocks_jax.training.setting import new_model
from examples import own_task


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(its folder, the model, samples) of the example after few steps."""
    workdir = tmp_path_factory.mktemp("example") / "run"
    return workdir, *own_task.main(workdir, max_steps=60, batch_size=256, save_every_n_epochs=60)


def test_it_learns_in_both_blocks(trained):
    """The loss of each block, which nothing but its own steps lowers, is below that of the fresh model."""
    _, model, _ = trained
    _, fresh = new_model(model.task, model.config.seed)
    score = held_out_loss(model.task, model.blueprint)
    before, after = (score(params, own_task.DATA, "test", lambda: None) for params in (fresh, model.params))
    assert set(fresh) == {"shared", "block_0", "block_1"}
    for name in fresh:
        moved = jax.tree.map(lambda was, now: float(np.abs(now - was).max()), fresh[name], model.params[name])
        assert min(jax.tree.leaves(moved)) > 0, name
    assert np.all(np.array(after["loss_by_block"]) < np.array(before["loss_by_block"]))
    assert after["loss"] == pytest.approx(np.mean(after["loss_by_block"]))


def test_what_is_logged_is_the_loss_of_the_saved_model(trained):
    workdir, model, _ = trained
    found = held_out_loss(model.task, model.blueprint)(model.params, own_task.DATA, "test", lambda: None)
    assert [line["loss"] for line in logged(workdir) if "split" in line] == [pytest.approx(found["loss"], rel=1e-6)]


def test_samples_lie_where_points_do(trained):
    """After few steps they are no spirals yet, but the noise, of 5 in each coordinate, is gone."""
    workdir, _, points = trained
    assert points.shape == (1000, 2) and np.isfinite(points).all()
    assert np.asarray(points).std() < 1.0
    with Image.open(workdir / "spirals.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 3


def test_blocks_that_rest_on_the_host_answer_on_the_device(trained):
    """As those do of a run with idle_blocks=host."""
    _, model, _ = trained
    resting = replace(model, params=to_host(model.params))
    for name, leaves in resting.params.items():
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(leaves)} == {"pinned_host"}, name
    for module, expected in zip(resting.together(1), model.together(1), strict=True):
        jax.tree.map(np.testing.assert_array_equal, nnx.state(module), nnx.state(expected))
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(nnx.state(module))} == {"device"}


def test_it_goes_on_where_it_stands(trained):
    workdir, model, points = trained
    again, same = own_task.main(workdir, max_steps=60, batch_size=256, save_every_n_epochs=60)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    np.testing.assert_array_equal(same, points)


def test_a_run_of_a_strangers_task_is_not_read_without_it(trained):
    with pytest.raises(UserError, match="task is 'spirals'; choose one of classify, generate"):
        dblocks_jax.load_trained(trained[0])


def test_other_data_are_refused(trained, monkeypatch):
    splits = {"train": own_task.spirals(4096, seed=5), "test": own_task.spirals(1000, seed=1)}
    monkeypatch.setattr(own_task, "DATA", ArrayData("other spirals", splits))
    with pytest.raises(UserError, match="trained on other examples than those of other spirals"):
        own_task.main(trained[0], max_steps=60, batch_size=256, save_every_n_epochs=60)


def test_arrays_that_are_no_examples_are_refused():
    with pytest.raises(UserError, match="the data p have no split 'test'"):
        ArrayData("p", {"train": np.zeros(3)})
    with pytest.raises(UserError, match=r"split 'test' of p have \[2, 3\] examples"):
        ArrayData("p", {"train": np.zeros(3), "test": {"x": np.zeros(2), "y": np.zeros(3)}})

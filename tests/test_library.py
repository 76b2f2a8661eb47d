"""What the package offers to Python: its names, where they are, and what they say of themselves."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dblocks_jax
from dblocks_jax import Entry, default_config, find_data, train
from dblocks_jax.run.errors import UserError
from dblocks_jax.tasks.table import TASKS

ROOT = Path(__file__).parents[1]


def test_nothing_is_loaded_before_it_is_asked_for():
    with pytest.raises(AttributeError, match="no attribute 'load_everything'"):
        _ = dblocks_jax.load_everything
    code = "import sys, dblocks_jax; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_names_are_told_alike_to_readers_to_editors_and_at_run_time():
    source = ast.parse(Path(dblocks_jax.__file__).read_text())
    imports = [node for node in ast.walk(source) if isinstance(node, ast.ImportFrom)]
    places = {name.name: node.module for node in imports for name in node.names}
    for general in ("import_module", "TYPE_CHECKING", "Any"):
        places.pop(general)
    assert places == dblocks_jax._PLACES and sorted(places) == sorted(dblocks_jax.__all__)
    contents = re.findall(r"\w+", dblocks_jax.__doc__)
    assert [name for name in dblocks_jax.__all__ if name not in contents] == []


@pytest.mark.parametrize("name", dblocks_jax.__all__)
def test_what_is_offered_is_documented_where_it_is_defined(name):
    """A class without a text has its base's, or one that Python makes of its fields."""
    offered = getattr(dblocks_jax, name)
    own = inspect.getdoc(offered) if inspect.isfunction(offered) else offered.__dict__.get("__doc__")
    assert own and not own.startswith(f"{name}(")
    source = inspect.getsource(offered)
    if inspect.isfunction(offered) and ("raise UserError" in source or "raise Diverged" in source):
        assert "Raises:" in own


def test_defaults_are_those_of_every_task_and_refuse_what_is_no_field():
    for task in TASKS:
        config = default_config(task)
        assert config.task == task and set(default_config()) < set(config)
        for mistake in ("learning_rate", "num_block"):
            with pytest.raises(AttributeError):
                setattr(config, mistake, 1)
            with pytest.raises(KeyError):
                config.update({mistake: 1})
        with pytest.raises(TypeError):
            config.lr = "fast"
    own = default_config()
    own.update(task="of my own", steepness=3)
    assert own.steepness == 3
    with pytest.raises(UserError, match="there is no task 'clasify': choose one of classify"):
        default_config("clasify")


def test_a_task_of_ones_own_is_not_taken_for_another(tmp_path):
    entry = Entry("mine", find_data=lambda config: None, make=lambda config, card: None)  # pyright: ignore
    with pytest.raises(UserError, match="task is 'classify' in the config, but 'mine' is given"):
        train(default_config("classify"), tmp_path, own=entry)
    with pytest.raises(UserError, match="task is '' in the config, but 'mine' is given"):
        find_data(default_config(), own=entry)
    with pytest.raises(UserError, match="task is ''; choose one of classify"):
        find_data(default_config())
    assert list(tmp_path.iterdir()) == []

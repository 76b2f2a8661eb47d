"""What the documents say of the program is so."""

import ast
import re
from pathlib import Path

import pytest

from dblocks_jax.tasks.table import TASKS
from docs import make_configuration, make_notebook

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "checkpoints" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PATH = r"(?:configs|dblocks_jax|docs|tests|benchmarks|checkpoints)/[\w/]*\w\.(?:py|md|png|html)"


def test_the_configuration_page_is_up_to_date():
    """If not: uv run docs/make_configuration.py"""
    assert make_configuration.PAGE.read_text() == make_configuration.make()


def test_the_notebook_is_that_of_its_page():
    """If not: uv run docs/make_notebook.py"""
    assert make_notebook.NOTEBOOK.read_text() == make_notebook.make()


@pytest.mark.parametrize("task", TASKS)
def test_every_field_is_explained_once(task):
    fields = []
    for name in ("common", task):
        sections = make_configuration.sections_of(name)
        fields += [field for of_section in sections.values() for field in of_section]
    assert sorted(name for name, _ in fields) == sorted(make_configuration.defaults_of(task))
    assert all(meaning for _, meaning in fields)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_files_and_names_that_are_mentioned_exist(document):
    text = re.sub(r"\s+", " ", document.read_text())
    for path, name in re.findall(rf"`({PATH})(?:: (\w+))?`", text):
        assert (ROOT / path).exists(), path
        if name:
            tree = ast.parse((ROOT / path).read_text())
            assert name in {node.name for node in tree.body if hasattr(node, "name")}, (path, name)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_fields_that_commands_set_exist(document):
    known = {field for task in TASKS for field in make_configuration.defaults_of(task)}
    text = document.read_text()
    named = set(re.findall(r"--config\.(\w+)", text)) - {"FIELD"}
    assert named <= known
    for config in re.findall(r"--config=(configs/\w+\.py)", text):
        assert config in {"configs/X.py", "configs/CONFIG.py"} or (ROOT / config).exists(), config

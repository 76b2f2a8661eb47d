"""Writes docs/configuration.md from the configs' own comments and checks: uv run docs/make_configuration.py"""

import importlib
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from dblocks_jax.fields.defaults import default_config  # noqa: E402
from dblocks_jax.tasks import gaussian, images, text, text_order  # noqa: E402
from dblocks_jax.tasks.classify import config as classify  # noqa: E402
from dblocks_jax.tasks.generate import config as generate  # noqa: E402
from dblocks_jax.tasks.mask import config as mask  # noqa: E402
from dblocks_jax.tasks.next_token import config as next_token  # noqa: E402
from dblocks_jax.tasks.recurrent import config as recurrent  # noqa: E402
from dblocks_jax.tasks.table import TASKS  # noqa: E402
from dblocks_jax.training import config as training  # noqa: E402

# Where the fields of a task are checked.
CHECKS: dict[str, tuple[Any, ...]] = {
    "common": (training,),
    "classify": (training, classify, gaussian, images),
    "generate": (training, generate, gaussian, images),
    "mask": (training, mask, text),
    "next_token": (training, next_token, gaussian, text, text_order),
    "recurrent": (training, recurrent, gaussian, text, text_order),
}

PAGE = ROOT / "docs" / "configuration.md"
FIELD = re.compile(r"    config\.(\w+) = .*?(?:  # (.*))?$")
SECTION = re.compile(r"    # (.*)\.$")
HEAD = """# Configuration

Every field can be set on the command line, as `--config.FIELD=VALUE`. Fields that all tasks have stand in
`dblocks_jax/fields/common.py`, those of a task in the file of its name beside it, with their defaults: for
classification the released program on CIFAR-100. The last column says what may differ from the saved run: when it goes
on (*resume*: fields that no parameter depends on), or when it is scored, used or exported (*use*).

This page is made of the comments in those files and the checks in `dblocks_jax/training/config.py` and in the tasks by
`uv run docs/make_configuration.py`; a test compares it.
"""


class Field(NamedTuple):
    name: str
    meaning: str


def read_sections(source: str) -> dict[str, list[Field]]:
    """Title -> fields of each section of a config file, with the comment behind each field."""
    sections: dict[str, list[Field]] = {}
    for line in source.splitlines():
        if found := SECTION.match(line):
            sections[found[1]] = []
        elif found := FIELD.match(line):
            list(sections.values())[-1].append(Field(found[1], found[2] or ""))
    return sections


def sections_of(name: str) -> dict[str, list[Field]]:
    """Those of a task, or of "common"."""
    return read_sections((ROOT / "dblocks_jax" / "fields" / f"{name}.py").read_text())


def checked(task: str, name: str) -> dict[str, Any]:
    """What the checks of a task know: a name of ours -> all that they list under it."""
    lists = [getattr(module, name) for module in CHECKS[task] if hasattr(module, name)]
    return {key: each[key] if isinstance(each, dict) else True for each in lists for key in each}


def allowed(task: str, name: str, default: Any) -> str:
    """What a field may be, in words."""
    if name in checked(task, "CHOICES"):
        return ", ".join(f'`"{choice}"`' for choice in checked(task, "CHOICES")[name])
    if isinstance(default, bool):
        return "`True`, `False`"
    bounds = []
    if name in checked(task, "POSITIVE"):
        bounds.append("> 0")
    elif name in checked(task, "NOT_NEGATIVE"):
        bounds.append(">= 0")
    if name in checked(task, "BELOW_ONE"):
        bounds.append("0 to below 1")
    if name in checked(task, "LARGEST"):
        bounds.append(f"at most {checked(task, 'LARGEST')[name]:,}")
    return ", ".join(bounds)


def changeable(name: str) -> str:
    """When a field may differ from the saved run's."""
    when = ["resume"] if name in training.FREE_TO_CHANGE else []
    of_samplers = {field for entry in TASKS.values() for field in entry.sampler_fields}
    if name in (*of_samplers, *training.ARITHMETIC_FIELDS, *training.FREE_TO_CHANGE):
        when.append("use")
    return ", ".join(when)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def defaults_of(task: str) -> dict[str, Any]:
    """Every field of a task with its default."""
    return default_config(task).to_dict()


def shipped() -> list[tuple[str, ...]]:
    """Each config file with its purpose and what it changes."""
    rows = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        config = module.get_config().to_dict()
        defaults = defaults_of(config["task"])
        changes = ", ".join(f"`{field}={value!r}`" for field, value in config.items() if value != defaults[field])
        rows.append((f"`configs/{path.name}`", (module.__doc__ or "").splitlines()[0], changes or "nothing"))
    return rows


def make() -> str:
    """The page."""
    files = {"common": default_config().to_dict()} | {task: defaults_of(task) for task in TASKS}
    parts = [HEAD]
    for name, defaults in files.items():
        parts.append(f"## Fields of {'all tasks' if name == 'common' else f'the task `{name}`'}\n")
        for title, fields in sections_of(name).items():
            rows = [
                (
                    f"`{field}`",
                    f"`{defaults[field]!r}`",
                    meaning,
                    allowed(name, field, defaults[field]),
                    changeable(field),
                )
                for field, meaning in fields
            ]
            parts += [f"### {title}\n", table(("field", "default", "meaning", "allowed", "may change"), rows) + "\n"]
        others = [f"`{key}={value!r}`" for key, value in defaults.items() if value != files["common"].get(key, value)]
        if others:
            parts.append(f"Of the fields of all tasks, other defaults: {', '.join(others)}\n")
    parts += ["## Configs that are there\n", table(("file", "what it is", "what it changes"), shipped()) + "\n"]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(make())

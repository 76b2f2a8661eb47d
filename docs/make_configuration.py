"""Writes docs/configuration.md from the configs' own comments and checks: uv run docs/make_configuration.py"""

import importlib
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from configs import common  # noqa: E402
from dblocks_jax.training import config as checks  # noqa: E402

PAGE = ROOT / "docs" / "configuration.md"
FIELD = re.compile(r"    config\.(\w+) = .*?(?:  # (.*))?$")
SECTION = re.compile(r"    # (.*)\.$")
HEAD = """# Configuration

Every field can be set on the command line, as `--config.FIELD=VALUE`. Defaults are those of `configs/common.py`: the
released program on CIFAR-100. The last column says what may differ from the saved run: when it goes on (*resume*:
fields that no parameter depends on), or when it is scored, used or exported (*use*).

This page is made of the comments in `configs/common.py` and the checks in `dblocks_jax/training/config.py` by
`uv run docs/make_configuration.py`; a test compares it.
"""


class Field(NamedTuple):
    name: str
    meaning: str


def read_sections(source: str) -> dict[str, list[Field]]:
    """Title -> fields of each section of configs/common.py, with the comment behind each field."""
    sections: dict[str, list[Field]] = {}
    for line in source.splitlines():
        if found := SECTION.match(line):
            sections[found[1]] = []
        elif found := FIELD.match(line):
            list(sections.values())[-1].append(Field(found[1], found[2] or ""))
    return sections


def allowed(name: str, default: Any) -> str:
    """What a field may be, in words."""
    if name in checks.CHOICES:
        return ", ".join(f'`"{choice}"`' for choice in checks.CHOICES[name])
    if isinstance(default, bool):
        return "`True`, `False`"
    bounds = []
    if name in checks.POSITIVE:
        bounds.append("> 0")
    if name in checks.NOT_NEGATIVE:
        bounds.append(">= 0")
    if name in checks.BELOW_ONE:
        bounds.append("0 to below 1")
    if name in checks.LARGEST:
        bounds.append(f"at most {checks.LARGEST[name]:,}")
    return ", ".join(bounds)


def changeable(name: str) -> str:
    """When a field may differ from the saved run's."""
    when = ["resume"] if name in checks.FREE_TO_CHANGE else []
    if name in (*checks.SAMPLER_FIELDS, *checks.ARITHMETIC_FIELDS, *checks.FREE_TO_CHANGE):
        when.append("use")
    return ", ".join(when)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def shipped() -> list[tuple[str, ...]]:
    """Each config file with its purpose and what it changes."""
    defaults = common.get_config().to_dict()
    rows = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        if path.stem == "common":
            continue
        module = importlib.import_module(f"configs.{path.stem}")
        config = module.get_config().to_dict()
        changes = ", ".join(f"`{field}={value!r}`" for field, value in config.items() if value != defaults[field])
        rows.append((f"`configs/{path.name}`", (module.__doc__ or "").splitlines()[0], changes or "nothing"))
    return rows


def make() -> str:
    """The page."""
    defaults = common.get_config().to_dict()
    parts = [HEAD]
    for title, fields in read_sections((ROOT / "configs" / "common.py").read_text()).items():
        rows = [
            (f"`{name}`", f"`{defaults[name]!r}`", meaning, allowed(name, defaults[name]), changeable(name))
            for name, meaning in fields
        ]
        parts += [f"## {title}\n", table(("field", "default", "meaning", "allowed", "may change"), rows) + "\n"]
    parts += ["## Configs that are there\n", table(("file", "what it is", "what it changes"), shipped()) + "\n"]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(make())

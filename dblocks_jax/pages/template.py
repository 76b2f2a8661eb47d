"""Templates filled in. In pages text is escaped, pictures are not."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from dblocks_jax.run.files import saving, write_whole
from dblocks_jax.run.naming import shown_lines


def render(name: str, values: dict[str, Any]) -> str:
    """The template `name` with `values`, whose "charts" are SVG."""
    environment = Environment(
        loader=PackageLoader("dblocks_jax.pages"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_escape,
    )
    environment.filters["percent"] = lambda value, digits=1: f"{value:.{digits}%}"
    environment.filters["json"] = json.dumps  # which is YAML too: whatever a name is, it is quoted
    pictures = {key: Markup(svg) for key, svg in values.get("charts", {}).items()}
    return environment.get_template(name).render(values | {"charts": pictures})


def _escape(value: Any) -> Any:
    """What does not print, such as ESC in the name of a class, is shown as its escape."""
    if isinstance(value, Markup):
        return Markup(shown_lines(value))
    return shown_lines(value) if isinstance(value, str) else value


def write_page(path: Path, values: dict[str, Any], template: str | None = None) -> Path:
    """Fill in a template, without another that which has the name of the page, and write it: `path`.

    Raises:
      Unsaved: it cannot be written; a page that was there before still is.
    """
    text = render(template or path.name, values)
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    return path

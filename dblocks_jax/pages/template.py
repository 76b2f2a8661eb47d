"""Templates filled in: text is escaped, pictures are not."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup


def render(name: str, values: dict[str, Any]) -> str:
    """A page: the template `name` with `values`, whose "charts" are SVG."""
    environment = Environment(
        loader=PackageLoader("dblocks_jax.pages"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda value, digits=1: f"{value:.{digits}%}"
    pictures = {key: Markup(svg) for key, svg in values.get("charts", {}).items()}
    return environment.get_template(name).render(values | {"charts": pictures})

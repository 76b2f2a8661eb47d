"""Writes docs/blocks_in_ten_minutes.ipynb from the page of that name: uv run docs/make_notebook.py"""

import json
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "blocks_in_ten_minutes.md"
NOTEBOOK = PAGE.with_suffix(".ipynb")
CODE = re.compile(r"^```python\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


def cells_of(page: str) -> list[tuple[str, str]]:
    """(kind, text) of each cell: what is fenced as python is code, what lies between is not."""
    pieces = CODE.split(page)
    kinds = ("markdown", "code") * len(pieces)
    return [(kind, piece.strip()) for kind, piece in zip(kinds, pieces, strict=False) if piece.strip()]


def make() -> str:
    """The notebook, without outputs."""
    cells = []
    for number, (kind, text) in enumerate(cells_of(PAGE.read_text())):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        cells.append(cell | {"source": text.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    about = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return json.dumps({"cells": cells, "metadata": about, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(make())

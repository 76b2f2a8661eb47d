"""In the environment of the wheel: it holds every file of the package, and the notebook finds what it should."""

import re
import sys
import time
from importlib.metadata import metadata
from pathlib import Path

import nbformat
from nbclient import NotebookClient

import dblocks_jax

repository, installed = Path(sys.argv[1]), Path(dblocks_jax.__file__).parent
assert repository not in installed.parents, installed


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


assert files_of(installed) == files_of(repository / "dblocks_jax"), "the wheel does not hold the package's files"
about = metadata("dblocks-jax")
assert about.get_payload() == (repository / "README.md").read_text() and about["Keywords"] and about["Classifier"]

begun = time.monotonic()
notebook = nbformat.read(repository / "docs" / "blocks_in_ten_minutes.ipynb", as_version=4)
NotebookClient(notebook, timeout=600).execute()
outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
accuracy = {name: float(share) for name, share in re.findall(r"(\w+): ([\d.]+)% of 360 test images", printed)}
distance = float(re.findall(r"distance from the ring, mean: ([\d.]+)", printed)[0])
print(f"notebook: {time.monotonic() - begun:.0f} s, accuracy {accuracy}, distance from the ring {distance}")
assert min(accuracy["plain"], accuracy["blocks"]) > 50, "hardly better than guessing"  # 10 %
assert distance < 0.2, "the noise is not gone"
assert sum("image/png" in output.get("data", {}) for output in outputs) == 3, "pictures are missing"

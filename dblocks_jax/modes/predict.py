"""Classify image files with a trained model, and tell how sure it became from step to step."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dblocks_jax.data.images import IMAGE_SUFFIXES, read_images, telling
from dblocks_jax.modes.load import Classifier, load_run, only
from dblocks_jax.run.errors import NOT_FINITE, Diverged, UserError
from dblocks_jax.run.files import saving
from dblocks_jax.run.naming import shown
from dblocks_jax.run.workdir import write_json
from dblocks_jax.tasks.classify.beliefs import describe, describe_steps
from dblocks_jax.tasks.classify.task import CLASSIFY
from dblocks_jax.training.config import arithmetic

PREDICTIONS = "predictions.json"
MOST_ROWS = 50  # of the printed table; the file has all
MOST_STEPS = 8  # of which the table shows all; of more the first, the middle one and the last
NARROWEST_NAME = 20  # columns of a path, however narrow the terminal is
UNLIMITED = 100_000  # columns


def predict(
    config: ConfigDict, workdir: Path, images: Sequence[str], *, overrides: dict[str, Any], checkpoint: str
) -> dict[str, Any]:
    """Classify files, and folders with all below them: print a table, and write PREDICTIONS into the workdir.

    Raises:
      UserError: there is no such run or image, or it cannot be read.
      Diverged: the model's answers are not finite.
      Unsaved: the table is printed, but PREDICTIONS cannot be written.
    """
    paths = find_images(images)
    loaded, _ = load_run(workdir, checkpoint=checkpoint, config=config, overrides=overrides)
    trained = Classifier(only(loaded, workdir, CLASSIFY))
    probabilities = classify_files(trained, paths)
    if not np.isfinite(probabilities[-1]).all():
        raise Diverged(f"{workdir}: {NOT_FINITE}")
    steps = describe_steps(trained.config)
    records = [
        describe(str(path), probabilities[:, i], trained.card.class_names, steps) for i, path in enumerate(paths)
    ]
    print_table(records)
    with saving(workdir / PREDICTIONS):
        write_json(workdir / PREDICTIONS, records)
    return {
        "mode": "predict",
        "workdir": str(workdir),
        "checkpoint": loaded.step,
        "num_images": len(paths),
        "predictions": str(workdir / PREDICTIONS),
    }


def find_images(names: Sequence[str]) -> list[Path]:
    """The image files that are named, and those below the folders that are named, in the order of their paths.

    Raises:
      UserError: nothing is there.
    """
    found: list[Path] = []
    for path in map(Path, names):
        if os.path.isdir(path):
            inside = sorted(file for file in path.rglob("*") if _is_image(file, path))
            if not inside:
                raise UserError(f"{shown(path)} holds no image: none below it ends in {', '.join(IMAGE_SUFFIXES)}")
            found += inside
        elif os.path.lexists(path):
            found.append(path)
        else:
            raise UserError(f"there is no image {shown(path)}")
    if not found:
        raise UserError("--mode=predict needs --images: files or folders")
    return found


def _is_image(file: Path, folder: Path) -> bool:
    """Whether it has the name of one. What is no regular file is named when it is read."""
    is_hidden = any(part.startswith((".", "__MACOSX")) for part in file.relative_to(folder).parts)
    return file.suffix.lower() in IMAGE_SUFFIXES and not is_hidden and not os.path.isdir(file)


def classify_files(trained: Classifier, paths: Sequence[Path]) -> Float[np.ndarray, "n images classes"]:
    """Probabilities after each denoising step. All batches have the size of the first, so one program serves them.

    Raises:
      UserError: an image cannot be read.
    """
    size = min(trained.config.eval_batch_size, len(paths))
    batches = []
    for start in telling(range(0, len(paths), size), total=len(paths), each=size, doing="classifying %s images"):
        positions = np.minimum(np.arange(start, start + size), len(paths) - 1)  # the last image fills the last batch
        pixels = read_images([paths[i] for i in positions], trained.card.image_shape)
        with arithmetic(trained.config):
            logits = trained.classify(trained.params, jnp.asarray(pixels), jnp.asarray(positions, jnp.int32))
        batches.append(np.asarray(jax.nn.softmax(logits, axis=-1)))
    return np.concatenate(batches, axis=1)[:, : len(paths)]


def print_table(records: list[dict[str, Any]]) -> None:
    """What `describe` says of each image, a line each. A terminal that is too narrow gets the ends of the paths."""
    console = Console()
    if not console.is_terminal:  # a file or another program reads it: nothing is cut
        console = Console(width=UNLIMITED)
    header = ("image", "answer", "probability", "step by step")
    rows = [row_of(record) for record in records[:MOST_ROWS]]
    others = sum(max(map(cell_len, column)) for column in list(zip(header, *rows, strict=True))[1:])
    room = max(NARROWEST_NAME, console.width - others - 2 * len(header))  # rich sets the columns two apart
    table = Table(*header, box=None)
    table.columns[0].no_wrap = True  # where there is no room even so, the other columns wrap
    for name, *others in rows:
        table.add_row(Text(end_of(name, room)), *map(Text, others))  # as text, of which rich reads no markup
    console.print(table)
    if len(records) > MOST_ROWS:
        console.print(f"and {len(records) - MOST_ROWS} more")


def row_of(record: dict[str, Any]) -> tuple[str, str, str, str]:
    """A line of the table."""
    steps = [f"{step['probability_of_answer']:.1%}" for step in record["by_step"]]
    if len(steps) > MOST_STEPS:
        steps = [steps[0], "...", steps[len(steps) // 2], "...", steps[-1]]
    answer = record["top5"][0]
    return shown(record["image"]), shown(answer["label"]), f"{answer['probability']:.1%}", " > ".join(steps)


def end_of(name: str, width: int) -> str:
    """A path cut at its beginning to so many columns of a terminal, for its end is what tells it from others."""
    if cell_len(name) <= width:
        return name
    name = name[-width:]
    while cell_len(name) > width - 1:
        name = name[1:]
    return f"…{name}"

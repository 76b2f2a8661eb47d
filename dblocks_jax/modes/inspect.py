"""`--mode=inspect`: what a config describes, before anything is trained: modules, noise ranges, data."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from dblocks_jax.data.datasets import Dataset, Source
from dblocks_jax.diffusion.gaussian import Gaussian
from dblocks_jax.pages import charts
from dblocks_jax.pages.pictures import data_uri
from dblocks_jax.pages.template import write_page
from dblocks_jax.run.devices import on_cpu
from dblocks_jax.tasks.table import SHOWN, entry_of
from dblocks_jax.training.config import arithmetic, check_config, count_steps
from dblocks_jax.training.overview import describe_shares, num_parameters
from dblocks_jax.training.setting import new_model

PAGE = "inspect.html"
DEPTH = 4  # of the module table: down to the parts of a layer
NARROWEST = 150  # characters of the module table, which a narrower terminal would cut
SAMPLES_OF_A_CLASS, MOST_CLASSES = 6, 20


def inspect(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Print the modules of a step and the noise ranges, and write PAGE, with images of each class, into `workdir`.

    Raises:
      UserError: the config is wrong, its data cannot be had, or the page cannot be written.
    """
    entry = entry_of(config)
    check_config(entry, config)
    dataset: Any = entry.find_data(config)
    train, val, test = dataset.split("train"), dataset.split("val"), dataset.split("test")
    task, shown = entry.make(config, dataset), SHOWN[entry.name]
    with on_cpu(), arithmetic(config):
        blueprint, params = new_model(task, config.seed)
        together = blueprint.together([params[name] for name in blueprint.names(0)])
        table = tabulate(*shown.step_of(task, together))
    parameters = {name: num_parameters(part) for name, part in params.items()}
    length = count_steps(entry, config, len(train))
    splits = {"train": train, "val": val, "test": test}
    counts = {name: count_classes(split, dataset) for name, split in splits.items() if split is not None}
    print(table)
    for name, count in parameters.items():
        print(f"{name}: {count:,} parameters")
    for block, text in describe_shares(task).items():
        print(f"block {block}: sigma {text}")
    for name, of_class in counts.items():
        print(f"{name}: {sum(of_class):,} images, {min(of_class):,} to {max(of_class):,} of a class")
    drawn = {}
    if isinstance(task.corruption, Gaussian):
        drawn["noise"] = charts.noise(task.corruption.noise, task.corruption.edges, shown.levels_of(task))
    page = {
        "name": f"{config.dataset}, {entry.describe(config)}",
        "dataset": dataset,
        "counts": counts,
        "samples": samples(train, dataset),
        "about_images": shown.about_images(task),
        "table": table,
        "parameters": parameters,
        "noise_ranges": describe_shares(task),
        "charts": drawn,
        "length": length,
    }
    path = write_page(workdir / PAGE, page)
    return {
        "mode": "inspect",
        "page": str(path),
        "parameters": parameters,
        "images": {name: sum(of_class) for name, of_class in counts.items()},
        "classes": len(dataset.class_names),
        "steps": length.steps,
    }


def tabulate(module: nnx.Module, inputs: tuple[Any, ...]) -> str:
    """The modules that one step runs, for one example: shapes, parameters, FLOPs. All blocks are alike."""
    width = max(NARROWEST, shutil.get_terminal_size().columns)
    options: Any = {"depth": DEPTH, "compute_flops": True, "console_kwargs": {"width": width, "force_terminal": False}}
    return nnx.tabulate(module, *inputs, **options)


def count_classes(split: Source, dataset: Dataset) -> list[int]:
    """How many images each class has."""
    return np.bincount(split.labels, minlength=len(dataset.class_names)).tolist()


def samples(train: Source, dataset: Dataset) -> dict[str, list[str]]:
    """The first images of the first classes, as pictures for the page. Latents are none."""
    chosen = {}
    if train.take(np.array([0]))["image"].dtype != np.uint8:
        return chosen
    for label, name in enumerate(dataset.class_names[:MOST_CLASSES]):
        indices = np.flatnonzero(train.labels == label)[:SAMPLES_OF_A_CLASS]
        chosen[name] = [data_uri(pixels) for pixels in train.images(indices)]
    return chosen

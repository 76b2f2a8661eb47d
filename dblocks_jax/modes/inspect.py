"""`--mode=inspect`: what a config describes, before anything is trained: modules, noise ranges, data."""

import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from dblocks_jax.data.datasets import Dataset, Source
from dblocks_jax.diffusion.noise import block_edges
from dblocks_jax.models.dblock_vit import IsolatedDBlockViT, Shared
from dblocks_jax.models.layers import Block
from dblocks_jax.models.vit import ViT
from dblocks_jax.modes.report import data_uri
from dblocks_jax.pages import charts
from dblocks_jax.pages.template import write_page
from dblocks_jax.run.devices import on_cpu
from dblocks_jax.tasks.classify.denoiser import denoise
from dblocks_jax.training.build import Blueprint, new_model, sampler_plan
from dblocks_jax.training.config import (
    architecture,
    arithmetic,
    check_config,
    count_steps,
    find_dataset,
    noise_distribution,
)
from dblocks_jax.training.overview import noise_ranges, num_parameters

PAGE = "inspect.html"
DEPTH = 4  # of the module table: down to the parts of a layer
NARROWEST = 150  # characters of the module table, which a narrower terminal would cut
SAMPLES_OF_A_CLASS, MOST_CLASSES = 6, 20


class Step(nnx.Module):
    """One denoising step: a block with what it shares."""

    def __init__(self, shared: Shared, block: Block, sigma_data: float):
        self.shared, self.block, self.sigma_data = shared, block, sigma_data

    def __call__(self, images, z, sigma):
        """Logits."""
        return denoise(self.shared, self.block, images, z, sigma, sigma_data=self.sigma_data)


def inspect(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Print the modules of a step and the noise ranges, and write PAGE, with images of each class, into `workdir`.

    Raises:
      UserError: the config is wrong, its data cannot be had, or the page cannot be written.
    """
    check_config(config)
    dataset = find_dataset(config)
    train, val, test = dataset.split("train"), dataset.split("val"), dataset.split("test")
    with on_cpu(), arithmetic(config):
        model = new_model(config, architecture(config, dataset))
        table = tabulate(config, model, dataset)
    _, params = Blueprint.of(model)
    parameters = {name: num_parameters(part) for name, part in params.items()}
    length = count_steps(config, len(train))
    splits = {"train": train, "val": val, "test": test}
    counts = {name: count_classes(split, dataset) for name, split in splits.items() if split is not None}
    print(table)
    for name, count in parameters.items():
        print(f"{name}: {count:,} parameters")
    for block, text in noise_ranges(config).items():
        print(f"block {block}: sigma {text}")
    for name, of_class in counts.items():
        print(f"{name}: {sum(of_class):,} images, {min(of_class):,} to {max(of_class):,} of a class")
    drawn = {}
    if config.model_type == "dblock":
        noise = noise_distribution(config)
        drawn["noise"] = charts.noise(noise, block_edges(noise, config.num_blocks), list(sampler_plan(config)[0]))
    page = {
        "name": f"{config.dataset}, {'plain ViT' if config.model_type == 'vit' else 'DiffusionBlocks'}",
        "dataset": dataset,
        "counts": counts,
        "samples": samples(train, dataset),
        "table": table,
        "parameters": parameters,
        "noise_ranges": noise_ranges(config),
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


def tabulate(config: ConfigDict, model: Any, dataset: Dataset) -> str:
    """The modules that one step runs, for one image: shapes, parameters, FLOPs. All blocks are alike: block 0's."""
    images = jnp.zeros((1, *dataset.image_shape))
    width = max(NARROWEST, shutil.get_terminal_size().columns)
    options: Any = {"depth": DEPTH, "compute_flops": True, "console_kwargs": {"width": width, "force_terminal": False}}
    if isinstance(model, ViT):
        return nnx.tabulate(model, images, None, **options)
    shared = model.shared[0] if isinstance(model, IsolatedDBlockViT) else model.shared
    step = Step(shared, model.blocks[0], config.sigma_data)
    return nnx.tabulate(step, images, jnp.zeros((1, config.hidden_size)), jnp.ones(1), **options)


def count_classes(split: Source, dataset: Dataset) -> list[int]:
    """How many images each class has."""
    return np.bincount(split.labels, minlength=len(dataset.class_names)).tolist()


def samples(train: Source, dataset: Dataset) -> dict[str, list[str]]:
    """The first images of the first classes, as pictures for the page."""
    chosen = {}
    for label, name in enumerate(dataset.class_names[:MOST_CLASSES]):
        indices = np.flatnonzero(train.labels == label)[:SAMPLES_OF_A_CLASS]
        chosen[name] = [data_uri(pixels) for pixels in train.images(indices)]
    return chosen

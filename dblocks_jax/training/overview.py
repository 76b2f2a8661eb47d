"""One screen about a run before it starts: devices, data, model, memory, length, place."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dblocks_jax.data.datasets import Dataset
from dblocks_jax.diffusion.noise import block_edges
from dblocks_jax.run.devices import BLOCK, DATA
from dblocks_jax.run.logs import TENSORBOARD
from dblocks_jax.training.config import Length, noise_distribution
from dblocks_jax.training.optimizer import Params

MIB = 2**20


def overview(
    config: ConfigDict,
    workdir: Path,
    *,
    dataset: Dataset,
    images: dict[str, int],
    mesh: Mesh,
    params: dict[str, Params],
    trained: tuple[str, ...],
    length: Length,
    start: int,
) -> str:
    """The screen as text. `images` counts those of each split, `trained` names the parts that one step trains."""
    device = jax.devices()[0]
    across = f", mesh: {mesh.shape[DATA]} for data, {mesh.shape[BLOCK]} for blocks"
    splits = ", ".join(f"{count:,} {split}" for split, count in images.items())
    counts = {name: num_parameters(part) for name, part in params.items()}
    kind = "plain ViT" if config.model_type == "vit" else f"DiffusionBlocks, {config.num_blocks} blocks"
    each = "" if len(counts) == 1 else ": " + ", ".join(f"{name} {count:,}" for name, count in counts.items())
    mine = sum(counts[name] for name in trained)
    rows = {
        "run": f"{workdir}, " + (f"goes on at step {start:,}" if start else "from the start"),
        "devices": f"{jax.device_count()} x {device.device_kind}{across}, {jax.process_count()} process(es)",
        "data": f"{config.dataset}: {splits} images of {len(dataset.class_names)} classes, {dataset.image_shape}",
        "model": f"{kind}, {config.num_layers} layers, {sum(counts.values()):,} parameters{each}",
        "noise": ", ".join(f"block {block}: {text}" for block, text in noise_ranges(config).items()),
        "a step": f"trains {mine:,} of them: {4 * 4 * mine / MIB:,.1f} MiB of parameters, moments and gradients; "
        "activations come on top, --mode=memory tells",
        "length": f"{length.steps - start:,} steps to do of {length.steps:,}, {length.steps_per_epoch:,} an epoch, "
        f"{config.batch_size * config.accumulate_grad_batches} images a step",
        "watch": f"tensorboard --logdir={workdir / TENSORBOARD}",
    }
    return "\n".join(f"  {name:8s} {text}" for name, text in rows.items() if text)  # the plain model has no noise


def noise_ranges(config: ConfigDict) -> dict[int, str]:
    """Each block's noise levels in words; none for the plain model."""
    if config.model_type == "vit":
        return {}
    edges = block_edges(noise_distribution(config), config.num_blocks)
    return {block: f"{high:.3g} .. {low:.3g}" for block, (high, low) in enumerate(pairwise(edges))}


def num_parameters(tree: Any) -> int:
    """How many numbers a tree of arrays holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))

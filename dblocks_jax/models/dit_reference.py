"""Weights of the PyTorch DiT (facebookresearch/DiT), in and out: {parameter name: array} <-> our parts."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx

from dblocks_jax.models.conditioned import ConditionedBlock
from dblocks_jax.models.dit import DiTArchitecture, DiTLayer, DiTShared, make_dit, sincos_positions
from dblocks_jax.models.reference import Entry, linear, load_entries, patch_weight, same, save_entries, take
from dblocks_jax.run.errors import UserError

PATCH_WEIGHT = "x_embedder.proj.weight"
LABELS = "y_embedder.embedding_table.weight"
POSITIONS = "pos_embed"  # kept with the weights there, a constant here


def from_reference_dit(weights: Mapping[str, np.ndarray], config: Any) -> dict[str, nnx.Module]:
    """Build our parts "shared", "block_0", ... from the PyTorch DiT's parameters (its names and layouts).

    Sizes are read off the arrays; `config` gives what no array shows: `num_heads` and `num_blocks`.

    Raises:
      UserError: a parameter is missing, left over or of the wrong shape (it is named), the positions are not the fixed
        ones, or config does not fit.
    """
    weights = {name: np.asarray(value) for name, value in weights.items()}
    arch = read_architecture(weights, config)
    positions = weights.pop(POSITIONS)
    expected = sincos_positions(arch.patches_per_side, arch.hidden_size)[None]
    if positions.shape != expected.shape or not np.allclose(positions, expected, atol=1e-5):
        raise UserError(f"the reference weights' {POSITIONS} is not the fixed sine-cosine embedding of a square grid")
    parts = make_dit(arch, config.num_blocks, isolated=False, rngs=nnx.Rngs(0))
    load_entries(_entries(parts), weights)
    return parts


def to_reference_dit(parts: Mapping[str, nnx.Module]) -> dict[str, np.ndarray]:
    """The inverse of `from_reference_dit`, without the positions, which are no parameters. Also serves gradients.

    Raises:
      UserError: the blocks are isolated, so that the PyTorch DiT has no place for what each has of its own.
    """
    if "shared" not in parts:
        raise UserError("isolated blocks do not fit into one PyTorch DiT: each has its own embeddings and final layer")
    return save_entries(_entries(parts))


def read_architecture(weights: Mapping[str, np.ndarray], config: Any) -> DiTArchitecture:
    """The sizes that the arrays show.

    Raises:
      UserError: an array that shows them is missing or has another number of axes, or config does not fit.
    """
    hidden_size, channels, patch_size, _ = _shape(weights, PATCH_WEIGHT, 4)
    _, num_patches, _ = _shape(weights, POSITIONS, 3)
    num_rows, _ = _shape(weights, LABELS, 2)
    (intermediate_size,) = _shape(weights, "blocks.0.mlp.fc1.bias", 1)
    num_layers = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    if hidden_size % 4 or hidden_size % config.num_heads:
        raise UserError(f"4 and num_heads={config.num_heads} must divide the reference's hidden size {hidden_size}")
    if num_layers % config.num_blocks:
        raise UserError(f"num_blocks={config.num_blocks} does not divide the reference's {num_layers} layers")
    return DiTArchitecture(
        image_size=patch_size * round(num_patches**0.5),
        channels=channels,
        num_labels=num_rows - 1,
        patch_size=patch_size,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=config.num_heads,
        intermediate_size=intermediate_size,
    )


def _shape(weights: Mapping[str, np.ndarray], name: str, ndim: int) -> tuple[int, ...]:
    shape = take(weights, name).shape
    if len(shape) != ndim:
        raise UserError(f"the reference weights' {name} must have {ndim} axes, not shape {shape}")
    return shape


def _entries(parts: Mapping[str, nnx.Module]) -> Iterator[Entry]:
    """Every parameter of the parts, in the reference's terms. Our block b holds layers b * L/B and following."""
    shared = parts["shared"]
    blocks = [parts[f"block_{b}"] for b in range(len(parts) - 1)]
    assert isinstance(shared, DiTShared)
    projection = shared.patches.projection
    yield patch_weight(PATCH_WEIGHT, projection.kernel, shared.patches.patch_size)
    yield same("x_embedder.proj.bias", projection.bias)
    yield from linear("t_embedder.mlp.0", shared.noise.linear_1)
    yield from linear("t_embedder.mlp.2", shared.noise.linear_2)
    yield same(LABELS, shared.labels)
    yield from linear("final_layer.adaLN_modulation.1", shared.modulation.linear)
    yield from linear("final_layer.linear", shared.head)
    layers = [layer for block in blocks if isinstance(block, ConditionedBlock) for layer in block.layers]
    for index, layer in enumerate(layers):
        yield from _layer(f"blocks.{index}", layer)


def _layer(prefix: str, layer: DiTLayer) -> Iterator[Entry]:
    """Queries, keys and values are one array there too, in this order."""
    yield from linear(f"{prefix}.attn.qkv", layer.attention.query_key_value)
    yield from linear(f"{prefix}.attn.proj", layer.attention.output)
    yield from linear(f"{prefix}.mlp.fc1", layer.mlp.intermediate)
    yield from linear(f"{prefix}.mlp.fc2", layer.mlp.output)
    yield from linear(f"{prefix}.adaLN_modulation.1", layer.modulation.linear)

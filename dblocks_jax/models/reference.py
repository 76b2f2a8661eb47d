"""Weights of the released PyTorch program, in and out: {parameter name: array} <-> our models."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dblocks_jax.models.dblock_vit import DBlockViT, make_dblock_vit
from dblocks_jax.models.layers import ConditionedLayer, Layer
from dblocks_jax.models.primitives import LayerNorm, Linear
from dblocks_jax.models.vit import Architecture, ViT
from dblocks_jax.run.errors import UserError
from dblocks_jax.run.naming import shown

PATCH_WEIGHT = "vit.embeddings.patch_embeddings.projection.weight"
LABELS = "vit.embeddings.label_embeddings.weight"
CLS_TOKEN = "vit.embeddings.cls_token"


class Entry(NamedTuple):
    """One of our parameters, the reference parameters that hold its values, and the way there and back."""

    names: tuple[str, ...]
    variable: nnx.Variable
    to_ours: Callable[..., np.ndarray]  # reference arrays -> ours
    to_reference: Callable[[np.ndarray], tuple[np.ndarray, ...]]


def from_reference(weights: Mapping[str, np.ndarray], config: Any) -> ViT | DBlockViT:
    """Build our model from the released program's parameters (its names and layouts; a "model." prefix is allowed).

    Sizes are read off the arrays; `config` gives what no array shows: `num_heads`, `pool` and, for a conditioned
    model, `num_blocks`. Weights with label embeddings make a `DBlockViT`, weights with a CLS token a `ViT`.

    Raises:
      UserError: a parameter is missing, left over or of the wrong shape (it is named), or config does not fit.
    """
    weights = {name.removeprefix("model."): np.asarray(value) for name, value in weights.items()}
    arch = read_architecture(weights, config)
    if LABELS in weights:
        model = make_dblock_vit(arch, config.num_blocks, rngs=nnx.Rngs(0))
    else:
        model = ViT(arch, rngs=nnx.Rngs(0))
    load_entries(_entries(model), weights)
    return model


def to_reference(model: ViT | DBlockViT) -> dict[str, np.ndarray]:
    """The inverse of `from_reference`: float32 arrays under the released program's names. Also serves gradients."""
    return save_entries(_entries(model))


def load_entries(entries: Iterable[Entry], weights: Mapping[str, np.ndarray]) -> None:
    """Set every entry's parameter, as float32.

    Raises:
      UserError: a parameter is missing, left over or of the wrong shape; it is named.
    """
    left_over = set(weights)
    for entry in entries:
        arrays = [take(weights, name) for name in entry.names]
        left_over.difference_update(entry.names)
        expected = entry.variable.get_value().shape
        try:
            value = entry.to_ours(*arrays)
        except ValueError:  # they have another number of dimensions, or do not fit each other
            value = None
        if value is None or value.shape != expected:
            shapes = ", ".join(f"{name} {array.shape}" for name, array in zip(entry.names, arrays, strict=True))
            raise UserError(f"the reference weights {shapes} do not fit: expected {expected} after conversion")
        entry.variable.set_value(jnp.asarray(value, jnp.float32))
    if left_over:
        names = ", ".join(map(shown, sorted(left_over)))
        raise UserError(f"the reference weights hold parameters this model does not have: {names}")


def save_entries(entries: Iterable[Entry]) -> dict[str, np.ndarray]:
    """The inverse: every entry's parameter in the reference's terms."""
    weights = {}
    for entry in entries:
        arrays = entry.to_reference(np.asarray(entry.variable.get_value()))
        weights.update(zip(entry.names, arrays, strict=True))
    return weights


def take(weights: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in weights:
        raise UserError(f"the reference weights lack {name}")
    return weights[name]


def _sizes(weights: Mapping[str, np.ndarray], name: str, count: int) -> tuple[int, ...]:
    shape = take(weights, name).shape
    if len(shape) != count or not all(shape):
        raise UserError(f"the reference weights have a {name} of shape {shape}: it must have {count} dimensions")
    return shape


def read_architecture(weights: Mapping[str, np.ndarray], config: Any) -> Architecture:
    if (LABELS in weights) == (CLS_TOKEN in weights):
        raise UserError(f"the reference weights must hold either {LABELS} or {CLS_TOKEN}")
    hidden_size, channels, patch_size, _ = _sizes(weights, PATCH_WEIGHT, 4)
    num_patches = _sizes(weights, "vit.embeddings.position_embeddings", 3)[1] - 1
    numbered = (re.match(r"vit\.encoder\.layer\.([0-9]{1,6})\.", name) for name in weights)
    num_layers = 1 + max((int(found[1]) for found in numbered if found), default=-1)
    if hidden_size % config.num_heads:
        raise UserError(f"num_heads={config.num_heads} does not divide the reference's hidden size {hidden_size}")
    if LABELS in weights and num_layers % config.num_blocks:
        raise UserError(f"num_blocks={config.num_blocks} does not divide the reference's {num_layers} layers")
    return Architecture(
        image_size=patch_size * round(num_patches**0.5),
        channels=channels,
        num_labels=_sizes(weights, "classifier.weight", 2)[0],
        patch_size=patch_size,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=config.num_heads,
        intermediate_size=_sizes(weights, "vit.encoder.layer.0.intermediate.dense.bias", 1)[0],
        dropout_rate=0.0,
        pool=config.pool,
    )


def _entries(model: ViT | DBlockViT) -> Iterator[Entry]:
    """Every parameter of the model, in the reference's terms. Our block b holds layers b * L/B and following."""
    if isinstance(model, ViT):
        top, blocks = model, [model.trunk]
        yield same(CLS_TOKEN, model.cls_token)
    else:
        top, blocks = model.shared, model.blocks
        yield same(LABELS, top.labels)
        yield from linear("vit.time_embedder.mlp.0", top.noise.linear_1)
        yield from linear("vit.time_embedder.mlp.2", top.noise.linear_2)
        yield from linear("adaLN_modulation.linear", top.modulation.linear)
    yield same("vit.embeddings.position_embeddings", top.positions)
    projection = top.patches.projection
    assert projection.bias is not None
    yield patch_weight(PATCH_WEIGHT, projection.kernel, top.patches.patch_size)
    yield same("vit.embeddings.patch_embeddings.projection.bias", projection.bias)
    yield from _norm("vit.layernorm", top.norm)
    yield from linear("classifier", top.head)
    layers = [layer for block in blocks for layer in block.layers]
    for index, layer in enumerate(layers):
        yield from _layer(f"vit.encoder.layer.{index}", layer)


def _layer(prefix: str, layer: Layer | ConditionedLayer) -> Iterator[Entry]:
    fused = layer.attention.query_key_value
    names = [f"{prefix}.attention.attention.{role}" for role in ("query", "key", "value")]

    def split(x: np.ndarray) -> list[np.ndarray]:
        return np.split(x, 3, axis=-1)

    yield Entry(
        tuple(f"{name}.weight" for name in names),
        fused.kernel,
        lambda *arrays: np.concatenate([array.T for array in arrays], axis=-1),
        lambda x: tuple(part.T for part in split(x)),
    )
    assert fused.bias is not None
    yield Entry(
        tuple(f"{name}.bias" for name in names), fused.bias, lambda *a: np.concatenate(a), lambda x: tuple(split(x))
    )
    yield from linear(f"{prefix}.attention.output.dense", layer.attention.output)
    yield from linear(f"{prefix}.intermediate.dense", layer.mlp.intermediate)
    yield from linear(f"{prefix}.output.dense", layer.mlp.output)
    yield from _norm(f"{prefix}.layernorm_before", layer.norm_attention)
    yield from _norm(f"{prefix}.layernorm_after", layer.norm_mlp)
    if isinstance(layer, ConditionedLayer):
        yield from linear(f"{prefix}.adaLN_modulation.linear", layer.modulation.linear)


def same(name: str, variable: nnx.Variable) -> Entry:
    return Entry((name,), variable, lambda x: x, lambda x: (x,))


def linear(prefix: str, module: Linear) -> Iterator[Entry]:
    """PyTorch keeps (out, in); we keep (in, out)."""
    yield Entry((f"{prefix}.weight",), module.kernel, lambda x: x.T, lambda x: (x.T,))
    assert module.bias is not None
    yield same(f"{prefix}.bias", module.bias)


def _norm(prefix: str, module: LayerNorm) -> Iterator[Entry]:
    assert module.scale is not None and module.bias is not None
    yield same(f"{prefix}.weight", module.scale)
    yield same(f"{prefix}.bias", module.bias)


def patch_weight(name: str, kernel: nnx.Variable, patch_size: int) -> Entry:
    """A convolution (d, c, p, p) there; here a matrix from a flattened (p, p, c) patch."""

    def to_reference(x: np.ndarray) -> tuple[np.ndarray]:
        return (x.reshape(patch_size, patch_size, -1, x.shape[-1]).transpose(3, 2, 0, 1),)

    return Entry((name,), kernel, lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]), to_reference)

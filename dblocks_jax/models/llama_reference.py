"""Weights of Hugging Face's Llama, in and out: {parameter name: array} <-> our plain model."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx

from dblocks_jax.models.llama import Llama, LlamaArchitecture, LlamaLayer
from dblocks_jax.models.primitives import Projection
from dblocks_jax.models.reference import Entry, load_entries, same, save_entries, take
from dblocks_jax.run.errors import UserError

EMBEDDINGS = "model.embed_tokens.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"


def from_reference_llama(weights: Mapping[str, np.ndarray], config: Any) -> Llama:
    """Build our model from the parameters of a `LlamaForCausalLM` (Hugging Face's names and layouts).

    Sizes are read off the arrays; `config` gives what no array shows: `num_heads`, `rope_theta`, `rms_norm_eps`. Every
    query has a key and value of its own, and the head is not tied to the embeddings.

    Raises:
      UserError: a parameter is missing, left over or of the wrong shape (it is named), or config does not fit.
    """
    weights = {name: np.asarray(value) for name, value in weights.items()}
    arch = read_architecture(weights, config)
    model = nnx.eval_shape(lambda: Llama(arch, rngs=nnx.Rngs(0)))  # nothing is drawn that would be written over
    load_entries(_entries(model), weights)
    return model


def to_reference_llama(model: Llama) -> dict[str, np.ndarray]:
    """The inverse of `from_reference_llama`. Also serves gradients."""
    return save_entries(_entries(model))


def read_architecture(weights: Mapping[str, np.ndarray], config: Any) -> LlamaArchitecture:
    """The sizes that the arrays show.

    Raises:
      UserError: an array that shows them is missing or has another number of axes, or config does not fit.
    """
    vocab_size, hidden_size = _shape(weights, EMBEDDINGS)
    intermediate_size, _ = _shape(weights, GATE)
    numbered = (re.match(r"model\.layers\.([0-9]{1,6})\.", name) for name in weights)
    num_layers = len({found[1] for found in numbered if found})
    if hidden_size % (2 * config.num_heads):
        raise UserError(f"twice num_heads={config.num_heads} must divide the reference's hidden size {hidden_size}")
    return LlamaArchitecture(
        vocab_size=vocab_size,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=config.num_heads,
        intermediate_size=intermediate_size,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.rms_norm_eps,
    )


def _shape(weights: Mapping[str, np.ndarray], name: str) -> tuple[int, int]:
    shape = take(weights, name).shape
    if len(shape) != 2 or not all(shape):
        raise UserError(f"the reference weights' {name} must have 2 axes, not shape {shape}")
    return shape


def _entries(model: Llama) -> Iterator[Entry]:
    """Every parameter of the model, in the reference's terms."""
    yield same(EMBEDDINGS, model.embeddings)
    for index, layer in enumerate(model.layers):
        yield from _layer(f"model.layers.{index}", layer)
    yield same("model.norm.weight", model.norm.scale)
    yield _side_by_side(("lm_head.weight",), model.head)


def _layer(prefix: str, layer: LlamaLayer) -> Iterator[Entry]:
    yield same(f"{prefix}.input_layernorm.weight", layer.norm_attention.scale)
    queries_keys_values = (f"{prefix}.self_attn.{kind}_proj.weight" for kind in "qkv")
    yield _side_by_side(tuple(queries_keys_values), layer.attention.query_key_value)
    yield _side_by_side((f"{prefix}.self_attn.o_proj.weight",), layer.attention.output)
    yield same(f"{prefix}.post_attention_layernorm.weight", layer.norm_mlp.scale)
    gate_up = (f"{prefix}.mlp.{kind}_proj.weight" for kind in ("gate", "up"))
    yield _side_by_side(tuple(gate_up), layer.mlp.gate_up)
    yield _side_by_side((f"{prefix}.mlp.down_proj.weight",), layer.mlp.down)


def _side_by_side(names: tuple[str, ...], module: Projection) -> Entry:
    """Arrays of equal shape (out, in) there, one of (in, all the outs) here."""

    def to_ours(*arrays: np.ndarray) -> np.ndarray:
        if any(array.shape != arrays[0].shape for array in arrays):
            raise ValueError("which is whose could not be told from the sum")
        return np.concatenate([array.T for array in arrays], axis=-1)

    return Entry(names, module.kernel, to_ours, lambda x: tuple(part.T for part in np.split(x, len(names), axis=-1)))

"""Recurrent depth as its formulas have it, in float64 and numpy: slow, plain, and written apart from `huginn.py`.

For tests. Parameters are those of our models, as nested dicts of arrays.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num

ROTARY_BASE = 50_000.0
EPSILON = 1e-6

Weights = dict[Any, Any]


def huginn_logits(
    weights: Weights, tokens: Int[np.ndarray, "b t"], state: Num[np.ndarray, "b t d"], steps: int, *, num_heads: int
) -> Float[np.ndarray, "b t v"]:
    """Huginn's logits after `steps` steps from `state`."""
    trunk, table = weights["trunk"], weights["embeddings"].astype(np.float64)
    e = _stack(trunk["prelude"], table[tokens] * math.sqrt(table.shape[1]), None, num_heads)
    for _ in range(steps):
        inputs = np.concatenate([state, e], axis=-1) @ trunk["adapter"]["kernel"]
        state = _stack(trunk["core"], inputs, None, num_heads)
    coda = _stack(trunk["coda"], _norm(state, weights["norm"]["scale"]), None, num_heads)
    return _norm(coda, weights["norm"]["scale"]) @ table.T


def dblock_huginn_features(
    shared: Weights,
    trunk: Weights,
    tokens: Int[np.ndarray, "b t"],
    z_in: Num[np.ndarray, "b t d"],
    cond: Num[np.ndarray, "b d"],
    *,
    num_heads: int,
) -> Float[np.ndarray, "b t d"]:
    """F of one pass, given the vector of each sample's noise level."""
    table = shared["embeddings"].astype(np.float64)
    table = table / np.linalg.norm(table, axis=1, keepdims=True)
    e = _stack(trunk["prelude"], table[tokens] * math.sqrt(table.shape[1]), None, num_heads)
    inputs = np.concatenate([z_in, e], axis=-1) @ trunk["adapter"]["kernel"]
    core = _stack(trunk["core"], inputs, cond, num_heads)
    coda = _stack(trunk["coda"], _norm(core, shared["norm"]["scale"]), cond, num_heads)
    return _norm(coda, shared["norm"]["scale"])


def _stack(weights: Weights, x: Any, cond: Any, num_heads: int) -> Any:
    for _, layer in sorted(weights["layers"].items(), key=lambda item: int(item[0])):
        x = _layer(layer, x, num_heads) if cond is None else _conditioned_layer(layer, x, cond, num_heads)
    return x


def _layer(weights: Weights, x: Any, num_heads: int) -> Any:
    scales = {i: weights[f"norm_{i}"]["scale"] for i in (1, 2, 3, 4)}
    x = _norm(_attention(weights["attention"], _norm(x, scales[1]), num_heads) + x, scales[2])
    return _norm(_mlp(weights["mlp"], _norm(x, scales[3])) + x, scales[4])


def _conditioned_layer(weights: Weights, x: Any, cond: Any, num_heads: int) -> Any:
    """The gains of norms 1 and 3 are 1 + scale, their offsets shift, and branches are gated."""
    width = x.shape[-1]

    def modulation(name: str) -> list[Any]:
        dense = weights[name]["linear"]
        flat = _silu(cond) @ dense["kernel"] + dense["bias"]
        return [flat[:, None, i : i + width] for i in range(0, flat.shape[1], width)]

    shift, scale = modulation("modulation_1")
    attended = _attention(weights["attention"], _norm(x, 1 + scale) + shift, num_heads)
    gate, shift, scale, gate_mlp = modulation("modulation_2")
    x = _norm(gate * attended + x, weights["norm_2"]["scale"])
    return _norm(gate_mlp * _mlp(weights["mlp"], _norm(x, 1 + scale) + shift) + x, weights["norm_4"]["scale"])


def _attention(weights: Weights, x: Any, num_heads: int) -> Any:
    """One token, head and position at a time."""
    _, t, width = x.shape
    half = width // num_heads // 2
    q, k, v = np.split(x @ weights["query_key_value"]["kernel"], 3, axis=-1)
    q, k = q + weights["bias"][:width], k + weights["bias"][width:]
    result = np.zeros_like(q)
    for head in range(num_heads):
        at = slice(2 * half * head, 2 * half * (head + 1))
        turned_q, turned_k = (
            np.stack([_turn(array[:, i, at], i, half) for i in range(t)], axis=1) for array in (q, k)
        )  # fmt: skip
        for i in range(t):
            scores = np.einsum("bw,bjw->bj", turned_q[:, i], turned_k[:, : i + 1]) / math.sqrt(2 * half)
            weight = np.exp(scores - scores.max(axis=1, keepdims=True))
            weight = weight / weight.sum(axis=1, keepdims=True)
            result[:, i, at] = np.einsum("bj,bjw->bw", weight, v[:, : i + 1, at])
    return result @ weights["output"]["kernel"]


def _turn(x: Any, position: int, half: int) -> Any:
    """Features i and i + half as a complex number, times exp(i position base^(-i / half))."""
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * position * ROTARY_BASE ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag], axis=1)


def _mlp(weights: Weights, x: Any) -> Any:
    gate, up = np.split(x @ weights["gate_up"]["kernel"], 2, axis=-1)
    return (_silu(gate) * up) @ weights["down"]["kernel"]


def _silu(x: Any) -> Any:
    return x / (1 + np.exp(-x))


def _norm(x: Any, scale: Any) -> Any:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPSILON) * scale

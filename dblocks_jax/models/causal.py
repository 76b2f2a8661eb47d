"""Causal attention: in training, where it goes backward some heads at a time, and token by token with a cache.

A token that is denoised reads the clean tokens before it, and its own noisy key and value where the clean ones of its
place would stand. That is one more diagonal, not a longer sequence: see `causal_attend`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dblocks_jax.models.chunks import chunk_size, loop
from dblocks_jax.models.primitives import ATTENDED, once


@jax.custom_vjp
def causal_attend(
    qkv: Float[Array, "b t 3 h w"], before: Float[Array, "b t 2 h w"] | None = None
) -> Float[Array, "b t h w"]:
    """softmax(q k / sqrt(w)) v, where token i reads tokens j <= i.

    Given the keys and values `before` of other tokens at the same places, token i reads those of j < i, and of `qkv`
    only its own. Probabilities are never kept for the backward pass.
    """
    return _attend(qkv, before)


def _off_and_on(square: Float[Array, "b h t t"]) -> tuple[Float[Array, "b h t t"], Float[Array, "b t h 1"]]:
    """A square without its diagonal, and its diagonal, one entry for each token and head."""
    diagonal = jnp.eye(square.shape[-1], dtype=bool)[None, None]
    on = jnp.sum(jnp.where(diagonal, square, 0.0), axis=-1)
    return jnp.where(diagonal, 0.0, square), on.swapaxes(1, 2)[..., None]


def _with_diagonal(square: Float[Array, "b h t t"], on: Float[Array, "b t h"]) -> Float[Array, "b h t t"]:
    diagonal = jnp.eye(square.shape[-1], dtype=bool)[None, None]
    return jnp.where(diagonal, on.swapaxes(1, 2)[..., None], square)


def _products(q: Array, k: Array, own: Array | None) -> Float[Array, "b h q t"]:
    """q_i k_j in float32, on the diagonal q_i own_i where there is one."""
    square = jnp.einsum("bqhw,bthw->bhqt", q, k, preferred_element_type=jnp.float32)
    if own is None:
        return square
    return _with_diagonal(square, jnp.einsum("bqhw,bqhw->bqh", q, own, preferred_element_type=jnp.float32))


def _probabilities(q: Array, k: Array, own: Array | None) -> Float[Array, "b h t t"]:
    scores = _products(q * q.shape[-1] ** -0.5, k, own)
    allowed = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
    return jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf), axis=-1)


def _parts(qkv: Array, before: Array | None) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """(queries, keys, values, own keys, own values); there are own ones only where others are read."""
    q, k, v = (qkv[:, :, i] for i in range(3))
    return (q, k, v, None, None) if before is None else (q, before[:, :, 0], before[:, :, 1], k, v)


def _attend(qkv, before):
    q, k, v, own_k, own_v = _parts(qkv, before)
    probs = _probabilities(q, k, own_k)
    if own_v is None:
        return jnp.einsum("bhqt,bthw->bqhw", probs.astype(v.dtype), v)
    off, on = _off_and_on(probs)
    return jnp.einsum("bhqt,bthw->bqhw", off.astype(v.dtype), v) + on.astype(v.dtype) * own_v


def _forward(qkv, before):
    attended = checkpoint_name(_attend(qkv, before), ATTENDED)
    return attended, (qkv, before, attended)


def _gradients(qkv, before, attended, grad):
    """(gradient of qkv, of before) of some heads."""
    q, k, v, own_k, own_v = _parts(qkv, before)
    probs = _probabilities(q, k, own_k)
    total = jnp.sum(grad.astype(jnp.float32) * attended, axis=-1).swapaxes(1, 2)[..., None]
    grad_scores = probs * (_products(grad, v, own_v) - total) * q.shape[-1] ** -0.5
    if own_k is None or own_v is None:
        grad_scores = grad_scores.astype(q.dtype)
        grad_v = jnp.einsum("bhqt,bqhw->bthw", probs.astype(v.dtype), grad)
        grad_q = jnp.einsum("bhqt,bthw->bqhw", grad_scores, k)
        return jnp.stack([grad_q, jnp.einsum("bhqt,bqhw->bthw", grad_scores, q), grad_v], axis=2), None
    (probs, on), (grad_scores, grad_on) = _off_and_on(probs), _off_and_on(grad_scores)
    grad_scores, on, grad_on = (array.astype(q.dtype) for array in (grad_scores, on, grad_on))
    grad_q = jnp.einsum("bhqt,bthw->bqhw", grad_scores, k) + grad_on * own_k
    grad_v = jnp.einsum("bhqt,bqhw->bthw", probs.astype(v.dtype), grad)
    grad_before = jnp.stack([jnp.einsum("bhqt,bqhw->bthw", grad_scores, q), grad_v], axis=2)
    return jnp.stack([grad_q, grad_on * q, on * grad], axis=2), grad_before


def _backward(saved, grad):
    qkv, before, attended = saved
    grad, qkv = once(grad, qkv)
    grad, attended = once(grad, attended)
    if before is not None:
        grad, before = once(grad, before)
    b, t, _, h, _ = qkv.shape
    size = chunk_size(h, b * t * t * 4)

    def part(i, array: Any, axis: int) -> Any:
        return jax.lax.dynamic_slice_in_dim(array, i * size, size, axis)

    def body(i, arrays):
        """Gradients take the place of what they were computed from."""
        qkv_i, before_i = jax.tree.map(lambda array: part(i, array, 3), arrays)
        grads = _gradients(qkv_i, before_i, part(i, attended, 2), part(i, grad, 2))
        return jax.tree.map(
            lambda array, grad: jax.lax.dynamic_update_slice_in_dim(array, grad, i * size, axis=3), arrays, grads
        )

    return loop(h // size, body, (qkv, before))


causal_attend.defvjp(_forward, _backward)


def attend_cached(
    qkv: Float[Array, "b 1 3 h w"], cache: Float[Array, "b n 2 h w"], position: Int[Array, ""]
) -> tuple[Float[Array, "b 1 h w"], Float[Array, "b n 2 h w"]]:
    """`causal_attend` of the one token at `position`: (what it reads, the cache with its key and value).

    The cache holds the keys and values of the tokens before it; what lies behind is not read. `position` must be below
    n, which nothing here can check.
    """
    q = qkv[:, :, 0]
    cache = jax.lax.dynamic_update_slice_in_dim(cache, qkv[:, :, 1:], position, axis=1)
    k, v = cache[:, :, 0], cache[:, :, 1]
    scores = _products(q * q.shape[-1] ** -0.5, k, None)
    allowed = (jnp.arange(cache.shape[1]) <= position)[None, None, None]
    probs = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhqt,bthw->bqhw", probs.astype(v.dtype), v), cache

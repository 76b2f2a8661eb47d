"""What is trained with less memory: an MLP, self-attention and readouts go backward some tokens or heads at a time.

So what is as wide as the MLP, or as large as the attention probabilities, exists for a part only. What does not depend
on the number of layers weighs most in a block of few. Batches are never cut: they may be split over devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Shaped

from dblocks_jax.models.primitives import (
    ATTENDED,
    DENSE_OUTPUT,
    affine,
    affine_backward,
    attend,
    attend_backward,
    gelu_tanh,
    once,
)

CHUNK_BYTES = 2**25  # of a part of a wide array, counted in float32: enough to keep a device busy


def chunk_size(length: int, bytes_of_one: int) -> int:
    """The largest divisor of `length` of which no chunk is larger than CHUNK_BYTES; 1 if there is none."""
    sizes = (size for size in range(length, 1, -1) if length % size == 0)
    return next((size for size in sizes if size * bytes_of_one <= CHUNK_BYTES), 1)


def loop(count: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`carry` after `body` for each of 0..count-1."""
    return body(0, carry) if count == 1 else jax.lax.fori_loop(0, count, body, carry)


def over_tokens(function: Callable[..., Any], bytes_of_token: int, *arrays: Shaped[Array, "b t ..."]) -> Any:
    """function(*arrays), arrays of [b, t, ...], for some tokens of every sample at a time.

    `bytes_of_token` is what one place in the sequence costs inside of it, for all samples together. What is not of a
    chunk's size exists for one chunk only, and again when it goes backward.
    """
    b, t = arrays[0].shape[:2]
    size = chunk_size(t, bytes_of_token)
    if size == t:
        return function(*arrays)
    cut = [jnp.moveaxis(array.reshape(b, t // size, size, *array.shape[2:]), 1, 0) for array in arrays]
    found = jax.lax.map(lambda part: jax.checkpoint(function)(*part), cut)
    return jax.tree.map(lambda array: jnp.moveaxis(array, 0, 1).reshape(b, t, *array.shape[3:]), found)


@jax.custom_vjp
def mlp_by_chunks(
    x: Float[Array, "b t d"],
    kernel_1: Float[Array, "d m"],
    bias_1: Float[Array, " m"],
    kernel_2: Float[Array, "m d"],
    bias_2: Float[Array, " d"],
) -> Float[Array, "b t d"]:
    """gelu_tanh(x kernel_1 + bias_1) kernel_2 + bias_2; in training some tokens of every sample at a time."""
    return affine(gelu_tanh(affine(x, kernel_1, bias_1)), kernel_2, bias_2)


def _mlp_forward(x, kernel_1, bias_1, kernel_2, bias_2):
    b, t, d = x.shape
    wide = affine(x.reshape(b * t, d), kernel_1, bias_1).reshape(b, t, -1)
    wide = checkpoint_name(wide, DENSE_OUTPUT)
    size = chunk_size(t, b * kernel_1.shape[1] * 4)

    def body(i, out):
        wide_i = jax.lax.dynamic_slice_in_dim(wide, i * size, size, axis=1)
        out_i = affine(gelu_tanh(wide_i.reshape(b * size, -1)), kernel_2, bias_2)
        return jax.lax.dynamic_update_slice_in_dim(out, out_i.reshape(b, size, d), i * size, axis=1)

    # Outputs take the place of inputs, which nothing needs any more: zeros would be made too early.
    return loop(t // size, body, x), (x, wide, kernel_1, kernel_2)


def _mlp_backward(saved, grad):
    x, wide, kernel_1, kernel_2 = saved
    grad, x = once(grad, x)
    b, t, d = x.shape
    size = chunk_size(t, b * kernel_1.shape[1] * 4)

    def body(i, carry):
        grad, sums = carry
        x_i, wide_i, grad_i = (
            jax.lax.dynamic_slice_in_dim(array, i * size, size, axis=1).reshape(b * size, -1)
            for array in (x, wide, grad)
        )
        activated, through_gelu = jax.vjp(gelu_tanh, wide_i)
        grad_activated, *of_output = affine_backward((activated, kernel_2), grad_i)
        grad_x, *of_input = affine_backward((x_i, kernel_1), *through_gelu(grad_activated))
        sums = jax.tree.map(jnp.add, sums, (*of_input, *of_output))
        # Gradients take the place of what they were computed from.
        return jax.lax.dynamic_update_slice_in_dim(grad, grad_x.reshape(b, size, d), i * size, axis=1), sums

    shapes = (kernel_1.shape, kernel_1.shape[1:], kernel_2.shape, kernel_2.shape[1:])
    zeros = tuple(once(grad, jnp.zeros(shape, kernel_1.dtype))[1] for shape in shapes)
    grad_x, sums = loop(t // size, body, (grad, zeros))
    return grad_x, *sums


mlp_by_chunks.defvjp(_mlp_forward, _mlp_backward)


@jax.custom_vjp
def self_attend(qkv: Float[Array, "b t 3 h w"]) -> Float[Array, "b t h w"]:
    """`attend` among the same tokens, without dropout; the backward pass takes some heads at a time."""
    q, k, v = (qkv[:, :, i] for i in range(3))
    return attend(q, k, v, None, 0.0)


def _self_attend_forward(qkv):
    attended = checkpoint_name(self_attend(qkv), ATTENDED)
    return attended, (qkv, attended)


def _self_attend_backward(saved, grad):
    qkv, attended = saved
    grad, qkv = once(grad, qkv)
    grad, attended = once(grad, attended)
    b, t, _, h, _ = qkv.shape
    size = chunk_size(h, b * t * t * 4)

    def body(i, qkv):
        qkv_i = jax.lax.dynamic_slice_in_dim(qkv, i * size, size, axis=3)
        q, k, v = (qkv_i[:, :, part] for part in range(3))
        attended_i, grad_i = (jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=2) for x in (attended, grad))
        *grads, _ = attend_backward(0.0, (q, k, v, None, attended_i), grad_i)
        return jax.lax.dynamic_update_slice_in_dim(qkv, jnp.stack(grads, axis=2), i * size, axis=3)

    return (loop(h // size, body, qkv),)


self_attend.defvjp(_self_attend_forward, _self_attend_backward)

"""What is trained with less memory: MLPs, self-attention and readouts go backward some units, heads, tokens at a time.

So what is as wide as the MLP, or as large as the attention probabilities, exists for a part only. What does not depend
on the number of layers weighs most in a block of few. Batches are never cut: they may be split over devices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Shaped

from dblocks_jax.models.primitives import (
    ATTENDED,
    DENSE_OUTPUT,
    affine,
    affine_backward,
    affine_weights_backward,
    attend,
    attend_backward,
    once,
)

CHUNK_BYTES = 2**24  # of a part of a wide array, counted in float32: enough to keep a device busy
MOST_PARTS = 4  # of an MLP: with more, products are too small for a GPU


def chunk_size(length: int, bytes_of_one: int) -> int:
    """The largest divisor of `length` of which no chunk is larger than CHUNK_BYTES; 1 if there is none."""
    sizes = (size for size in range(length, 1, -1) if length % size == 0)
    return next((size for size in sizes if size * bytes_of_one <= CHUNK_BYTES), 1)


def unit_parts(width: int, bytes_of_one: int) -> int:
    """Into how many parts an MLP's `width` hidden units are cut: as few as CHUNK_BYTES allows, or as many as may be."""
    counts = [count for count in range(1, MOST_PARTS + 1) if width % count == 0]
    return next((count for count in counts if width // count * bytes_of_one <= CHUNK_BYTES), counts[-1])


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


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def mlp_by_units(
    activation: Callable[[Array], Array],
    remat: bool,
    x: Float[Array, "n d"],
    kernel_1: Float[Array, "d m"],
    bias_1: Float[Array, " m"],
    kernel_2: Float[Array, "m d"],
    bias_2: Float[Array, " d"],
) -> Float[Array, "n d"]:
    """activation(x kernel_1 + bias_1) kernel_2 + bias_2; in training some of the m hidden units at a time.

    With `remat` the backward pass keeps none of them: it computes each part again when its turn comes.
    """
    return affine(activation(affine(x, kernel_1, bias_1)), kernel_2, bias_2)


def _units(
    n: int, kernel_1: Float[Array, "d m"], bias_1: Float[Array, " m"], kernel_2: Float[Array, "m d"]
) -> list[tuple[Array, Array, Array]]:
    """The weights of each part of the hidden units, for n rows."""
    count = unit_parts(kernel_1.shape[1], n * 4)
    cut = jnp.split(kernel_1, count, axis=1), jnp.split(bias_1, count), jnp.split(kernel_2, count)
    return list(zip(*cut, strict=True))


def _mlp_forward(activation, remat, x, kernel_1, bias_1, kernel_2, bias_2):
    out, kept = jnp.broadcast_to(bias_2, x.shape), []
    for i, (kernel_1_i, bias_1_i, kernel_2_i) in enumerate(_units(len(x), kernel_1, bias_1, kernel_2)):
        # One part at a time. With one and the same x XLA for GPUs would join the products and cut their results apart.
        out, x_i = once(out, x) if i else (out, x)
        # What is named is kept by layers: of what is made of it the sum would be computed again.
        wide = checkpoint_name(affine(x_i, kernel_1_i, bias_1_i), DENSE_OUTPUT)
        out = out + jnp.matmul(activation(wide), kernel_2_i.astype(x.dtype), preferred_element_type=out.dtype)
        kept.append(wide)
    return out.astype(x.dtype), (x, None if remat else kept, kernel_1, bias_1, kernel_2)


def _mlp_backward(activation, remat, saved, grad):
    x, kept, kernel_1, bias_1, kernel_2 = saved
    grad, x = once(grad, x)
    grad_x, grads_1, grads_bias, grads_2 = jnp.zeros(x.shape, kernel_1.dtype), [], [], []
    for i, (kernel_1_i, bias_1_i, kernel_2_i) in enumerate(_units(len(x), kernel_1, bias_1, kernel_2)):
        # Not before the part before is done, and what it needed is gone.
        if remat:
            grad_x, x = once(grad_x, x) if i else (grad_x, x)
            wide = affine(x, kernel_1_i, bias_1_i)
        else:
            grad_x, wide = once(grad_x, kept[i]) if i else (grad_x, kept[i])
        activated, through_activation = jax.vjp(activation, wide)
        grad_activated, grad_2, _ = affine_backward((activated, kernel_2_i), grad)
        (grad_wide,) = through_activation(grad_activated)
        grad_wide, grad_1, grad_bias = affine_weights_backward(x, grad_wide, kernel_1.dtype)
        grad_x += jnp.matmul(grad_wide, kernel_1_i.T.astype(x.dtype), preferred_element_type=kernel_1.dtype)
        grads_1.append(grad_1)
        grads_bias.append(grad_bias)
        grads_2.append(grad_2)
    grad_bias_2 = jnp.sum(grad, axis=0, dtype=kernel_2.dtype)
    of_weights = jnp.concatenate(grads_1, axis=1), jnp.concatenate(grads_bias), jnp.concatenate(grads_2)
    return grad_x.astype(x.dtype), *of_weights, grad_bias_2


mlp_by_units.defvjp(_mlp_forward, _mlp_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def self_attend(
    qkv: Float[Array, "b t 3 h w"], keep: Bool[Array, "b h t t"] | None = None, rate: float = 0.0
) -> Float[Array, "b t h w"]:
    """`attend` among the same tokens; the backward pass takes some heads at a time."""
    q, k, v = (qkv[:, :, i] for i in range(3))
    return attend(q, k, v, keep, rate)


def _self_attend_forward(qkv, keep, rate):
    attended = checkpoint_name(self_attend(qkv, keep, rate), ATTENDED)
    return attended, (qkv, keep, attended)


def _self_attend_backward(rate, saved, grad):
    qkv, keep, attended = saved
    grad, qkv = once(grad, qkv)
    grad, attended = once(grad, attended)
    b, t, _, h, _ = qkv.shape
    size = chunk_size(h, b * t * t * 4)

    def body(i, qkv):
        def mine(whole, axis):
            return jax.lax.dynamic_slice_in_dim(whole, i * size, size, axis)

        qkv_i = mine(qkv, 3)
        q, k, v = (qkv_i[:, :, part] for part in range(3))
        keep_i = None if keep is None else mine(keep, 1)
        *grads, _ = attend_backward(rate, (q, k, v, keep_i, mine(attended, 2)), mine(grad, 2))
        return jax.lax.dynamic_update_slice_in_dim(qkv, jnp.stack(grads, axis=2), i * size, axis=3)

    return loop(h // size, body, qkv), None


self_attend.defvjp(_self_attend_forward, _self_attend_backward)

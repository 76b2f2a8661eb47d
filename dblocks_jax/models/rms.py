"""Root-mean-square norms, with the features scaled by weights or by the noise level, and SwiGLU.

Their backward passes keep what they read and nothing made of it, as those in `primitives.py`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dblocks_jax.models.primitives import once


def _unit_rms(x, epsilon: float):
    """(rows whose mean square is 1, what they were divided by, inverted), in float32."""
    x = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
    return x * inverse, inverse


def _through_unit_rms(grad, normal, inverse):
    """The gradient of x from that of x / rms(x)."""
    return inverse * (grad - normal * jnp.mean(grad * normal, axis=-1, keepdims=True))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def normalize_rms(x: Float[Array, "b t d"], scale: Float[Array, " d"], epsilon: float) -> Float[Array, "b t d"]:
    """x / sqrt(mean(x^2) + epsilon) * scale over the features of each token, in float32."""
    return _unit_rms(x, epsilon)[0] * scale[None, None]


def _normalize_rms_backward(epsilon, saved, grad):
    x, scale = saved
    grad, x = once(grad, x)
    normal, inverse = _unit_rms(x, epsilon)
    grad_x = _through_unit_rms(grad * scale[None, None], normal, inverse).astype(x.dtype)
    return grad_x, jnp.sum(grad * normal, axis=(0, 1))


normalize_rms.defvjp(lambda x, scale, epsilon: (normalize_rms(x, scale, epsilon), (x, scale)), _normalize_rms_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize_rms_modulated(
    x: Float[Array, "b t d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"], epsilon: float
) -> Float[Array, "b t d"]:
    """x / sqrt(mean(x^2) + epsilon) * (1 + scale) + shift, in float32; all tokens of a sample have the same."""
    return _unit_rms(x, epsilon)[0] * (1.0 + scale[:, None]) + shift[:, None]


def _normalize_rms_modulated_backward(epsilon, saved, grad):
    x, scale = saved
    grad, x = once(grad, x)
    grad, scale = once(grad, scale)  # a CPU writes it out for each row
    normal, inverse = _unit_rms(x, epsilon)
    grad_x = _through_unit_rms(grad * (1.0 + scale[:, None]), normal, inverse).astype(x.dtype)
    return grad_x, jnp.sum(grad, axis=1), jnp.sum(grad * normal, axis=1)


normalize_rms_modulated.defvjp(
    lambda x, shift, scale, epsilon: (normalize_rms_modulated(x, shift, scale, epsilon), (x, scale)),
    _normalize_rms_modulated_backward,
)


class RMSNorm(nnx.Module):
    """`normalize_rms` with weights that start at 1: in float32 whatever `dtype` the result has."""

    def __init__(self, features: int, epsilon: float, *, dtype: str = "float32"):
        self.epsilon = epsilon
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones(features))

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return normalize_rms(x, self.scale[...], self.epsilon).astype(self.dtype)


@jax.custom_vjp
def swiglu(wide: Float[Array, "n w"]) -> Float[Array, "n m"]:
    """silu(gate) * up, where `wide` holds the gates, then as many of the others (w = 2 m)."""
    gate, up = jnp.split(wide, 2, axis=-1)
    return gate * jax.lax.logistic(gate) * up


def _swiglu_backward(wide, grad):
    # The barrier keeps XLA from sharing the sigmoid with the forward pass, and so from keeping it.
    gate, up = jnp.split(jax.lax.optimization_barrier(wide), 2, axis=-1)
    sigmoid = jax.lax.logistic(gate)
    slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    return (jnp.concatenate([grad * up * slope, grad * gate * sigmoid], axis=-1),)


swiglu.defvjp(lambda wide: (swiglu(wide), wide), _swiglu_backward)

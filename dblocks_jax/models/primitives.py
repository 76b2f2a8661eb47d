"""What layers are made of, each with a backward pass that is sparing with memory. No dropout without a key."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Key

# The reference cuts its normal(0.02) draws at +-2.0, which is 100 standard deviations: no cut at all.
init_weights = nnx.initializers.normal(0.02)
init_zeros = nnx.initializers.zeros
init_xavier = nnx.initializers.xavier_uniform()

EPSILON = 1e-12  # of the released vision transformer's layer norm
EPSILON_PLAIN = 1e-6  # of DiT's, which has neither scale nor bias

# What a layer keeps for its backward pass: outputs of dense layers and of attention, dropout masks (a byte an entry).
# Norms, GELU and attention probabilities are computed again, sooner than written to memory and read back.
DENSE_OUTPUT, ATTENDED, DROPOUT_MASK = "dense_output", "attended", "dropout_mask"
KEPT = jax.checkpoint_policies.save_only_these_names(DENSE_OUTPUT, ATTENDED, DROPOUT_MASK)


def once(there: Array, x: Array) -> tuple[Array, Array]:
    """(there, x), where x is not used before `there` is computed, so that what is made of x does not wait in memory.

    Use both: a barrier lets go of what is not used. On a CPU XLA drops barriers before it decides the order, but must
    wait for the terms of a sum. What is added is zero unless there is a NaN, which no compiler can know.
    """

    def by_sum(there, x):
        return there, x + jnp.isnan(there[(0,) * there.ndim]).astype(x.dtype)

    def by_barrier(there, x):
        return jax.lax.optimization_barrier((there, x))

    return jax.lax.platform_dependent(there, x, cpu=by_sum, default=by_barrier)


@jax.custom_vjp
def affine(x: Float[Array, "*b i"], kernel: Float[Array, "i o"], bias: Float[Array, " o"]) -> Float[Array, "*b o"]:
    """x @ kernel + bias in x's type, with a backward pass that is sparing with memory."""
    product = x @ kernel.astype(x.dtype)
    return product + jnp.broadcast_to(bias.astype(x.dtype), product.shape)


def affine_backward(saved, grad):
    """(gradient of x, of the kernel, of the bias) from saved = (x, kernel)."""
    x, kernel = saved
    grad, grad_kernel, grad_bias = affine_weights_backward(x, grad, kernel.dtype)
    return grad @ kernel.T.astype(x.dtype), grad_kernel, grad_bias


def affine_weights_backward(x, grad, dtype):
    """(grad, gradient of the kernel, of the bias): the second is computed before the first can be used."""
    grad, grad_kernel = _kernel_first(x, grad, dtype)
    return grad, grad_kernel, jnp.sum(grad, axis=tuple(range(x.ndim - 1)), dtype=dtype)


def _kernel_first(x, grad, dtype):
    grad, x = once(grad, x)
    # A CPU transposes the left operand in memory, so that is the narrower one; the product is small either way.
    x_is_narrower = x.shape[-1] <= grad.shape[-1]
    left, right = (x, grad) if x_is_narrower else (grad, x)
    product = _sum_over_rows(left, right, dtype)
    # First the kernel's gradient, which is the last to need x, then the gradient that is as large as x.
    grad, product = jax.lax.optimization_barrier((grad, product))
    return grad, product if x_is_narrower else product.T


def _sum_over_rows(left: Float[Array, "*b i"], right: Float[Array, "*b o"], dtype: Any) -> Float[Array, "i o"]:
    """The sum over all rows of left[row] right[row]^T."""

    def product(left, right):
        rows = tuple(range(left.ndim - 1))
        return jax.lax.dot_general(left, right, ((rows, rows), ((), ())), preferred_element_type=dtype)

    def of_transposed(left, right):
        # Behind the barrier it is a product as any other. With the transposition in it XLA has a slow routine alone.
        columns = jax.lax.optimization_barrier(left.reshape(-1, left.shape[-1]).T)
        return jnp.matmul(columns, right.reshape(-1, right.shape[-1]), preferred_element_type=dtype)

    return jax.lax.platform_dependent(left, right, cpu=of_transposed, default=product)


affine.defvjp(lambda x, kernel, bias: (affine(x, kernel, bias), (x, kernel)), affine_backward)


@jax.custom_vjp
def project(x: Float[Array, "*b i"], kernel: Float[Array, "i o"]) -> Float[Array, "*b o"]:
    """x @ kernel in x's type: `affine` without a bias."""
    return x @ kernel.astype(x.dtype)


def project_backward(saved, grad):
    """(gradient of x, of the kernel) from saved = (x, kernel)."""
    x, kernel = saved
    grad, grad_kernel = _kernel_first(x, grad, kernel.dtype)
    return grad @ kernel.T.astype(x.dtype), grad_kernel


project.defvjp(lambda x, kernel: (project(x, kernel), (x, kernel)), project_backward)


class Linear(nnx.Module):
    """A dense layer: float32 parameters, normal(0.02) weights and zero bias to begin with, computing in `dtype`."""

    def __init__(
        self, features_in: int, features_out: int, *, dtype: str = "float32", init=init_weights, rngs: nnx.Rngs
    ):
        self.dtype = dtype
        self.kernel = nnx.Param(init(rngs.params(), (features_in, features_out)))
        self.bias = nnx.Param(init_zeros(rngs.params(), (features_out,)))

    def __call__(self, x: Float[Array, "*b i"], columns: slice = slice(None)) -> Float[Array, "*b o"]:
        """The outputs `columns`, by default all."""
        out = affine(x.astype(self.dtype), self.kernel[...][:, columns], self.bias[...][columns])
        return checkpoint_name(out, DENSE_OUTPUT)


class Projection(nnx.Module):
    """A dense layer without bias: float32 weights, normal(0.02) to begin with, computing in `dtype`."""

    def __init__(
        self, features_in: int, features_out: int, *, dtype: str = "float32", init=init_weights, rngs: nnx.Rngs
    ):
        self.dtype = dtype
        self.kernel = nnx.Param(init(rngs.params(), (features_in, features_out)))

    def __call__(self, x: Float[Array, "*b i"], columns: slice = slice(None)) -> Float[Array, "*b o"]:
        """The outputs `columns`, by default all."""
        return checkpoint_name(project(x.astype(self.dtype), self.kernel[...][:, columns]), DENSE_OUTPUT)


@jax.custom_vjp
def normalize_features(
    x: Float[Array, "*b d"], scale: Float[Array, " d"], bias: Float[Array, " d"]
) -> Float[Array, "*b d"]:
    """(x - mean) / sqrt(variance + 1e-12) * scale + bias over the features of each row, in float32."""
    normal, _ = _standardize(x, EPSILON)
    return normal * _as_row(scale, x.ndim) + _as_row(bias, x.ndim)


def _standardize(x, epsilon: float):
    """(rows of zero mean and unit variance, what they were divided by, inverted)."""
    x = x.astype(jnp.float32)
    # The variance of what is left without the mean keeps its digits.
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + epsilon)
    return centred * inverse, inverse


def _as_row(vector, ndim: int):
    return vector.reshape((1,) * (ndim - 1) + (-1,))


def _normalize_backward(saved, grad):
    x, scale = saved
    normal, inverse = _standardize(x, EPSILON)
    grad = grad.astype(jnp.float32)
    product = grad * normal
    # As products with a vector, since for sums of products XLA on CPUs would write `scale` out for each row.
    weights = scale / scale.size
    mean, slope = (jnp.matmul(array, weights, precision="highest")[..., None] for array in (grad, product))
    grad_x = inverse * (grad * _as_row(scale, x.ndim) - mean - normal * slope)
    rows = tuple(range(x.ndim - 1))
    return grad_x.astype(x.dtype), jnp.sum(product, axis=rows), jnp.sum(grad, axis=rows)


normalize_features.defvjp(lambda x, scale, bias: (normalize_features(x, scale, bias), (x, scale)), _normalize_backward)


@jax.custom_vjp
def normalize_modulated(
    x: Float[Array, "b t d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]
) -> Float[Array, "b t d"]:
    """(x - mean) / sqrt(variance + 1e-6) * (1 + scale) + shift over the features of each token, in float32.

    Shift and scale are the same for all tokens of a sample. The backward pass keeps x, and nothing made of it.
    """
    normal, _ = _standardize(x, EPSILON_PLAIN)
    return normal * (1.0 + scale[:, None]) + shift[:, None]


def _normalize_modulated_backward(saved, grad):
    x, scale = saved
    # Else the norms of both branches would wait in memory, computed again, while the MLP goes backward.
    grad, x = once(grad, x)
    grad, scale = once(grad, scale)  # a CPU writes it out for each row
    normal, inverse = _standardize(x, EPSILON_PLAIN)
    scaled = grad * (1.0 + scale[:, None])
    mean, slope = (jnp.mean(array, axis=-1, keepdims=True) for array in (scaled, scaled * normal))
    grad_x = (inverse * (scaled - mean - normal * slope)).astype(x.dtype)
    return grad_x, jnp.sum(grad, axis=1), jnp.sum(grad * normal, axis=1)


normalize_modulated.defvjp(
    lambda x, shift, scale: (normalize_modulated(x, shift, scale), (x, scale)), _normalize_modulated_backward
)


class LayerNorm(nnx.Module):
    """Layer normalisation: in float32 whatever `dtype` the result has."""

    def __init__(self, features: int, *, dtype: str = "float32"):
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return normalize_features(x, self.scale[...], self.bias[...]).astype(self.dtype)


def dropout(x: Array, rate: float, key: Key[Array, ""] | None) -> Array:
    """Zero each entry with probability `rate` and rescale the rest; the identity without a key or at rate 0."""
    keep = draw_kept(rate, key, x.shape, after=x)
    return x if keep is None else rescale_kept(x, keep, rate)


def draw_kept(
    rate: float, key: Key[Array, ""] | None, shape: tuple[Any, ...], *, after: Array
) -> Bool[Array, "..."] | None:
    """Which entries a dropout keeps; None for all of them. They are drawn once `after` is there.

    Under `jax.export` an entry of `shape` may be a symbol, not an int.
    """
    if key is None or rate == 0.0:
        return None
    # Nothing else orders the draws: a CPU's scheduler makes those of all layers first, eight bytes an entry.
    _, data = once(jax.lax.stop_gradient(after), jax.random.key_data(key))
    key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
    return checkpoint_name(jax.random.bernoulli(key, 1.0 - rate, shape), DROPOUT_MASK)


def rescale_kept(x: Array, keep: Bool[Array, "..."], rate: float) -> Array:
    """x / (1 - rate) where kept, else 0; scaled in float32, in which 1 / (1 - rate) has its digits."""
    return (x * jnp.where(keep, jnp.float32(1.0 / (1.0 - rate)), 0.0)).astype(x.dtype)


def split_key(key: Key[Array, ""] | None, count: int) -> list[Key[Array, ""] | None]:
    """`count` independent keys, or as many Nones."""
    return [None] * count if key is None else list(jax.random.split(key, count))


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """x * P(N(0, 1) <= x), exactly, by erf as in the reference. jax.nn.gelu uses erfc, which XLA takes to pieces."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_backward(x, grad):
    # The barrier keeps XLA from sharing erf with the forward pass, which would keep an array as large as x for it.
    x = jax.lax.optimization_barrier(x)
    density = jnp.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))
    return (grad * (0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5))) + x * density),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@jax.custom_vjp
def gelu_tanh(x: Array) -> Array:
    """GELU's approximation by tanh: x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""
    return x * jax.lax.logistic(_twice_tanhs_argument(x))  # (1 + tanh(u)) / 2 = logistic(2 u)


def _twice_tanhs_argument(x):
    return math.sqrt(8.0 / math.pi) * (x + 0.044715 * x * x * x)


def _gelu_tanh_backward(x, grad):
    # As for `gelu`: what the forward pass computed is computed again, not kept.
    x = jax.lax.optimization_barrier(x)
    twice = _twice_tanhs_argument(x)
    probability, rest = jax.lax.logistic(twice), jax.lax.logistic(-twice)  # 1 - probability would lose its digits
    slope = math.sqrt(8.0 / math.pi) * (1.0 + 3 * 0.044715 * x * x)
    return (grad * (probability + x * probability * rest * slope),)


gelu_tanh.defvjp(lambda x: (gelu_tanh(x), x), _gelu_tanh_backward)


def _probabilities(q: Float[Array, "b q h w"], k: Float[Array, "b t h w"]) -> Float[Array, "b h q t"]:
    scores = jnp.einsum("bqhw,bthw->bhqt", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores, axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
    q: Float[Array, "b q h w"],
    k: Float[Array, "b t h w"],
    v: Float[Array, "b t h w"],
    keep: Bool[Array, "b h q t"] | None,
    rate: float,
) -> Float[Array, "b q h w"]:
    """softmax(q k / sqrt(w)) v with dropout on the probabilities, which only ever exist for one layer at a time.

    The backward pass computes the probabilities again, once its gradient is there.
    """
    return _attend_forward(q, k, v, keep, rate)[0]


def _attend_forward(q, k, v, keep, rate):
    probs = _probabilities(q, k)
    dropped = probs if keep is None else rescale_kept(probs, keep, rate)
    attended = checkpoint_name(jnp.einsum("bhqt,bthw->bqhw", dropped.astype(v.dtype), v), ATTENDED)
    return attended, (q, k, v, keep, attended)


def attend_backward(rate, saved, grad):
    """(gradient of q, of k, of v, None) from saved = (q, k, v, keep, attended)."""
    q, k, v, keep, attended = saved
    grad, q = once(grad, q)
    grad, k = once(grad, k)
    grad, v = once(grad, v)
    probs = _probabilities(q, k)
    dropped = probs if keep is None else rescale_kept(probs, keep, rate)
    grad_v = jnp.einsum("bhqt,bqhw->bthw", dropped.astype(v.dtype), grad)
    # With p the probabilities, m the rescaled mask and g = grad v: p (m g - sum p m g), and that sum is grad attended.
    total = jnp.sum(grad.astype(jnp.float32) * attended, axis=-1).swapaxes(1, 2)[..., None]
    inner = jnp.einsum("bqhw,bthw->bhqt", grad, v, preferred_element_type=jnp.float32)
    grad_scores = ((dropped * inner - probs * total) * q.shape[-1] ** -0.5).astype(q.dtype)
    grad_q = jnp.einsum("bhqt,bthw->bqhw", grad_scores, k)
    grad_k = jnp.einsum("bhqt,bqhw->bthw", grad_scores, q)
    return grad_q, grad_k, grad_v, None


attend.defvjp(_attend_forward, attend_backward)

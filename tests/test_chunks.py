"""MLPs and attention, which go backward in parts: derivatives are those of the whole, memory is not."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dblocks_jax.models import chunks
from dblocks_jax.models.chunks import chunk_size, mlp_by_units, over_tokens, self_attend, unit_parts
from dblocks_jax.models.primitives import KEPT, gelu, gelu_tanh

# (bytes of a chunk, samples, tokens, heads): everything at once, some of it at a time, one after the other.
CUTS = [(2**25, 2, 6, 4), (600, 2, 6, 4), (1, 5, 9, 3)]
mlp = partial(mlp_by_units, gelu_tanh, False)
mlp_again = partial(mlp_by_units, gelu_tanh, True)


def mlp_inputs(key, samples: int, tokens: int, dtype="float32"):
    shapes = (samples * tokens, 5), (5, 24), (24,), (24, 5), (5,)
    x, *params = (jax.random.normal(jax.random.fold_in(key, i), shape) for i, shape in enumerate(shapes))
    return x.astype(dtype), *params


def plain_mlp(x, kernel_1, bias_1, kernel_2, bias_2, approximate=True):
    return jax.nn.gelu(x @ kernel_1 + bias_1[None], approximate=approximate) @ kernel_2 + bias_2[None]


def plain_attention(qkv, keep=None, rate=0.0):
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    probs = jax.nn.softmax(jnp.einsum("bqhw,bthw->bhqt", q, k) / math.sqrt(qkv.shape[-1]), axis=-1)
    if keep is not None:
        probs = jnp.where(keep, probs / (1 - rate), 0.0)
    return jnp.einsum("bhqt,bthw->bqhw", probs, v)


def value_and_grads(function, *args):
    """Of the sum of cubes, so that every entry of the result has a gradient of its own."""
    loss = jax.value_and_grad(lambda *args: jnp.sum(function(*args).astype(jnp.float32) ** 3), tuple(range(len(args))))
    return jax.tree.leaves(jax.jit(loss)(*args))


def assert_same_as_in_float64(ours, plain, *args):
    """`ours` and its gradients against those that JAX finds of the formula written out."""
    with jax.enable_x64():
        exact = value_and_grads(plain, *(np.asarray(array, np.float64) for array in args))
    for actual, expected in zip(value_and_grads(ours, *args), exact, strict=True):
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(ours(*args), plain(*args), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("bytes_of_chunk", "samples", "tokens", "heads"), CUTS)
def test_gradients_are_those_of_the_whole(bytes_of_chunk, samples, tokens, heads, key, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", bytes_of_chunk)
    for ours in (mlp, mlp_again):
        assert_same_as_in_float64(ours, plain_mlp, *mlp_inputs(key, samples, tokens))
    qkv = jax.random.normal(key, (samples, tokens, 3, heads, 5))
    assert_same_as_in_float64(self_attend, plain_attention, qkv)


def test_gradients_of_the_vision_transformers_are_those_of_the_whole(key, monkeypatch):
    """The exact GELU, and dropout on probabilities; two heads at a time."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 600)
    exact = partial(mlp_by_units, gelu, False), partial(plain_mlp, approximate=False)
    assert_same_as_in_float64(*exact, *mlp_inputs(key, 2, 6))
    qkv, keep = jax.random.normal(key, (2, 6, 3, 4, 5)), jax.random.bernoulli(key, 0.7, (2, 4, 6, 6))

    def attend(function):
        return lambda qkv: function(qkv, keep, 0.3)

    assert_same_as_in_float64(attend(self_attend), attend(plain_attention), qkv)


def test_what_layers_keep_for_the_backward_pass_is_not_written_over(key, monkeypatch):
    """Inputs and kept arrays, whose place attention's results take, are used once more elsewhere."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    args, qkv = mlp_inputs(key, 2, 6), jax.random.normal(key, (2, 6, 3, 2, 5))

    def twice(mlp, attend, *args):
        x, qkv, params = args[0], args[1], args[2:]
        return (mlp(x, *params) + mlp(mlp(x, *params), *params) + x) * jnp.sum(attend(qkv) * qkv[:, :, 1])

    assert_same_as_in_float64(
        partial(twice, mlp, self_attend), partial(twice, plain_mlp, plain_attention), args[0], qkv, *args[1:]
    )


@pytest.mark.long
def test_in_bfloat16_parts_are_summed_in_float32(key, monkeypatch):
    """Sums over 512 rows in bfloat16 would stop growing; the gradients of parameters keep their eight bits."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    args = mlp_inputs(key, 2, 256, "bfloat16")
    wide = [np.asarray(array, np.float32) for array in args]
    loss = lambda mlp, *args: jnp.sum(mlp(*args).astype(jnp.float32))  # noqa: E731
    ours = jax.grad(partial(loss, mlp), argnums=(0, 1, 2, 3, 4))(*args)
    exact = jax.grad(partial(loss, plain_mlp), argnums=(0, 1, 2, 3, 4))(*wide)
    assert [grad.dtype for grad in ours] == [jnp.bfloat16] + [jnp.float32] * 4
    np.testing.assert_array_equal(ours[4], np.full(5, 512.0))  # each of 2 x 256 tokens adds 1
    for actual, expected in zip(ours, exact, strict=True):
        np.testing.assert_allclose(np.asarray(actual, np.float32), expected, atol=0.02 * np.abs(expected).max())


def test_readouts_of_some_tokens_at_a_time_are_those_of_all(key, monkeypatch):
    """With their gradients, that of what is common to all tokens included."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2 * 3 * 4)

    def read(x, kernel):
        return jax.nn.log_softmax(x @ kernel)[..., 0]

    def in_parts(x, kernel):
        return over_tokens(lambda x: read(x, kernel), 3 * 4, x)

    assert_same_as_in_float64(in_parts, read, jax.random.normal(key, (2, 6, 5)), jax.random.normal(key, (5, 4)))


def temporaries(function, *shapes) -> int:
    """Bytes that the backward pass needs beside what is kept for it and what comes out."""
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    backward = jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args)
    apply = jax.jit(lambda backward, grad: backward(grad))
    analysis = apply.lower(backward, jax.eval_shape(function, *args)).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize("function", [mlp, mlp_again, self_attend])
def test_wide_arrays_exist_in_parts_only(function, monkeypatch):
    """The activation and its gradients, the probabilities and their gradient: an eighth of each at a time."""
    b, t, d, m, h = 4, 128, 8, 256, 8
    of_mlp = function is not self_attend
    shapes = ((b * t, d), (d, m), (m,), (m, d), (d,)) if of_mlp else ((b, t, 3, h, 4),)
    wide = 4 * (b * t * m if of_mlp else b * h * t * t)
    whole = temporaries(function, *shapes)
    assert whole >= wide
    monkeypatch.setattr(chunks, "CHUNK_BYTES", wide // 8)
    monkeypatch.setattr(chunks, "MOST_PARTS", 8)
    assert temporaries(function, *shapes) < whole / 3


def test_units_that_are_computed_again_are_not_kept():
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((60, 5), (5, 24), (24,), (24, 5), (5,))]

    def largest_kept(function):
        backward = jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args)
        return max(math.prod(array.shape) for array in jax.tree.leaves(backward))

    assert largest_kept(mlp) == 60 * 24
    assert largest_kept(mlp_again) == 60 * 5  # the input


def test_what_is_kept_by_name_is_not_computed_again(monkeypatch):
    """Each part has two products forward and four backward; those of the forward pass stand in the program once."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    shapes = (6, 5), (5, 24), (24,), (24, 5), (5,)
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    layer = jax.checkpoint(mlp, policy=KEPT)
    gradients = jax.grad(lambda *args: jnp.sum(layer(*args) ** 2), argnums=tuple(range(5)))
    program = jax.jit(gradients).lower(*args).as_text()
    assert program.count("stablehlo.dot_general") == chunks.MOST_PARTS * (2 + 4)


@given(length=st.integers(1, 400), one=st.integers(1, 2**27))
def test_a_chunk_divides_and_is_as_large_as_it_may_be(length, one):
    size = chunk_size(length, one)
    assert length % size == 0
    assert size == 1 or size * one <= chunks.CHUNK_BYTES
    larger = [s for s in range(size + 1, length + 1) if length % s == 0]
    assert all(s * one > chunks.CHUNK_BYTES for s in larger)


@given(width=st.integers(1, 4000), one=st.integers(1, 2**27))
def test_an_mlp_is_cut_into_as_few_parts_as_fit(width, one):
    count = unit_parts(width, one)
    assert width % count == 0 and count <= chunks.MOST_PARTS
    fewer = [c for c in range(1, count) if width % c == 0]
    assert all(width // c * one > chunks.CHUNK_BYTES for c in fewer)
    more = [c for c in range(count + 1, chunks.MOST_PARTS + 1) if width % c == 0]
    assert width // count * one <= chunks.CHUNK_BYTES or not more

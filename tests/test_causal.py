"""Causal attention, RMS norms and SwiGLU: values and gradients are those of the formulas, memory is not."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_chunks import assert_same_as_in_float64, temporaries

from dblocks_jax.models import chunks
from dblocks_jax.models.causal import attend_cached, causal_attend
from dblocks_jax.models.primitives import project
from dblocks_jax.models.rms import normalize_rms, normalize_rms_modulated, swiglu


def dense(qkv, before):
    """[those before; own] as one sequence, under a mask."""
    t = qkv.shape[1]
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    k, v = (jnp.concatenate([before[:, :, i], own], axis=1) for i, own in enumerate((k, v)))
    mask = np.concatenate([np.tril(np.ones((t, t), bool), -1), np.eye(t, dtype=bool)], axis=1)
    scores = jnp.einsum("bqhw,bthw->bhqt", q, k) / math.sqrt(qkv.shape[-1])
    probs = jax.nn.softmax(jnp.where(mask[None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhqt,bthw->bqhw", probs, v)


def test_attention_and_its_gradients_are_those_of_the_mask_written_out(key, monkeypatch):
    """Those of a plain Llama's attention are PyTorch's, see tests/test_llama.py."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)  # one head at a time
    qkv, before = jax.random.normal(key, (2, 6, 3, 2, 5)), jax.random.normal(jax.random.key(1), (2, 6, 2, 2, 5))
    assert_same_as_in_float64(causal_attend, dense, qkv, before)


def test_probabilities_exist_in_parts_only(monkeypatch):
    b, t, h = 4, 128, 8
    shapes = ((b, t, 3, h, 4), (b, t, 2, h, 4))
    whole = temporaries(causal_attend, *shapes)
    assert whole >= 4 * b * h * t * t
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4 * b * t * t)
    assert temporaries(causal_attend, *shapes) < whole / 3


def test_a_cache_answers_as_the_whole_sequence_does(key):
    qkv = jax.random.normal(key, (2, 5, 3, 2, 4))
    step = jax.jit(attend_cached)
    cache = jnp.full((2, 7, 2, 2, 4), 1e4)  # what lies behind is not read
    for i, expected in enumerate(jnp.moveaxis(causal_attend(qkv), 1, 0)):
        attended, cache = step(qkv[:, i : i + 1], cache, jnp.int32(i))
        np.testing.assert_allclose(attended[:, 0], expected, atol=1e-6)
    np.testing.assert_array_equal(cache[:, :5], qkv[:, :, 1:])


def rms(x):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 0.1)


@pytest.mark.parametrize(
    ("ours", "formula", "shapes"),
    [
        (partial(normalize_rms, epsilon=0.1), lambda x, scale: rms(x) * scale[None, None], ((2, 3, 5), (5,))),
        (
            partial(normalize_rms_modulated, epsilon=0.1),
            lambda x, shift, scale: rms(x) * (1 + scale[:, None]) + shift[:, None],
            ((2, 3, 5), (2, 5), (2, 5)),
        ),
        (swiglu, lambda x: jax.nn.silu(x[:, :4]) * x[:, 4:], ((6, 8),)),
        (project, lambda x, kernel: x @ kernel, ((2, 3, 5), (5, 4))),
    ],
    ids=["rms", "modulated", "swiglu", "project"],
)
def test_gradients_are_those_of_the_formula(ours, formula, shapes, key):
    args = [jax.random.normal(jax.random.fold_in(key, i), shape) for i, shape in enumerate(shapes)]
    assert_same_as_in_float64(ours, formula, *args)

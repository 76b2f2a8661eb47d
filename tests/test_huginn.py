"""Recurrent depth: values are those of the formulas written out, the gradient is cut, steps are drawn as said."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dblocks_jax.diffusion.precondition import precondition
from dblocks_jax.models.huginn import (
    Huginn,
    HuginnArchitecture,
    draw_steps,
    initial_state,
    make_dblock_huginn,
)
from dblocks_jax.models.huginn_reference import dblock_huginn_features, huginn_logits
from dblocks_jax.tasks.recurrent.denoiser import denoise_at, whole

TINY = HuginnArchitecture(
    vocab_size=7, num_layers=3, hidden_size=8, num_heads=2, intermediate_size=12, prelude_layers=1, coda_layers=1
)
LENGTH = 5


def drawn(make):
    """Modules with parameters drawn at random, so that gates are open and biases there."""
    modules, rng = nnx.eval_shape(make), np.random.default_rng(0)
    random = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.4, p.shape), p.dtype), nnx.state(modules, nnx.Param))
    nnx.update(modules, random)
    return modules


@cache
def huginn():
    return drawn(lambda: Huginn(TINY, rngs=nnx.Rngs(0)))


def numbers(module):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Param)))


def inputs():
    rng = np.random.default_rng(1)
    return rng.integers(0, 7, (2, LENGTH)), rng.normal(size=(2, LENGTH, 8)).astype(np.float32)


@jax.jit
def value_and_gradient(steps):
    """(logits, gradient of what is made of the last features)."""
    tokens, state = inputs()
    graphdef, params = nnx.split(huginn())

    def loss(params):
        model = nnx.merge(graphdef, params)
        features = model.features(jnp.asarray(tokens), jnp.asarray(state), steps)
        return jnp.sum(jnp.sin(features)), model.head(features)

    (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return logits, grads


@pytest.mark.parametrize("steps", [1, 3, 8, 10])
def test_logits_are_those_of_the_formulas(steps):
    """One compiled program for every number of steps: fewer than have a gradient, as many, more."""
    expected = huginn_logits(numbers(huginn()), *inputs(), steps, num_heads=2)
    np.testing.assert_allclose(value_and_gradient(jnp.int32(steps))[0], expected, atol=1e-5 * np.abs(expected).max())


def test_the_gradient_goes_through_the_last_eight_steps():
    """Against ten steps unrolled by hand, of which the first two are a constant; each goes backward by itself."""
    tokens, state = (jnp.asarray(array) for array in inputs())
    graphdef, params = nnx.split(huginn())
    of = lambda params: nnx.merge(graphdef, params)  # noqa: E731

    def prelude(params):
        return of(params).trunk.prelude(of(params).embed(tokens))

    def step(params, state, e):
        return of(params).trunk.core(of(params).trunk.adapter(jnp.concatenate([state, e], axis=-1)))

    def last(params, state):
        return jnp.sum(jnp.sin(of(params).norm(of(params).trunk.coda(of(params).norm(state)))))

    backward = jax.jit(lambda grad, *args: jax.vjp(step, *args)[1](grad))
    e, once, states = jax.jit(prelude)(params), jax.jit(step), [state]
    for _ in range(10):
        states.append(once(params, states[-1], e))
    total, grad = jax.jit(jax.grad(last, argnums=(0, 1)))(params, states[-1])
    grad_e = jnp.zeros_like(e)
    for before in states[9:1:-1]:  # what the steps 10, 9, ..., 3 read
        of_params, grad, of_e = backward(grad, params, before, e)
        total, grad_e = jax.tree.map(jnp.add, total, of_params), grad_e + of_e
    (of_params,) = jax.jit(lambda params, grad: jax.vjp(prelude, params)[1](grad))(params, grad_e)
    expected = jax.tree.map(jnp.add, total, of_params)
    ours = value_and_gradient(jnp.int32(10))[1]
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1e-3, np.abs(b).max()))


def test_the_denoiser_is_one_pass_of_the_formulas():
    """c_in z enters by the adapter; core and coda see the vector of the noise level, each sample its own."""
    parts = drawn(lambda: nnx.Dict(make_dblock_huginn(TINY, rngs=nnx.Rngs(0))))
    shared, trunk = parts["shared"], parts["block_0"]
    (tokens, z), sigma = inputs(), np.array([3.0, 0.1], np.float32)
    c_in = (1 / np.sqrt(sigma**2 + 0.25)).astype(np.float32)

    @jax.jit
    def ours():
        c, run = precondition(jnp.asarray(sigma), 0.5), whole(trunk)
        e, _ = run("prelude", shared.embed(jnp.asarray(tokens)), None)
        features, _ = denoise_at(shared, trunk, run, e, jnp.asarray(z), c, (None, None))
        return features, shared.noise(jnp.log(jnp.asarray(sigma)) / 4)

    features, cond = ours()
    expected = dblock_huginn_features(
        numbers(shared), numbers(trunk), tokens, z * c_in[:, None, None], np.asarray(cond), num_heads=2
    )
    np.testing.assert_allclose(features, expected, atol=1e-5 * np.abs(expected).max())


def test_steps_and_states_begin_as_huginn_draws_them():
    """E r = 1 + E rate = 33, var r = E rate + var rate; a normal number cut at 3 deviations has variance 0.9733."""
    count = 1_500
    steps = np.asarray(jax.jit(jax.vmap(draw_steps))(jax.random.split(jax.random.key(0), count)), float)
    variance = 32 + 32**2 * math.expm1(0.25)
    assert steps.min() >= 1
    assert steps.mean() == pytest.approx(33, abs=4 * math.sqrt(variance / count))
    assert steps.var() == pytest.approx(variance, rel=0.25)
    state = np.asarray(initial_state(jax.random.key(0), (10, 100, 100)))
    density = math.exp(-4.5) / math.sqrt(2 * math.pi)
    expected = 0.4 * (1 - 2 * 3 * density / math.erf(3 / math.sqrt(2)))
    assert state.var() == pytest.approx(expected, rel=0.02) and np.abs(state).max() <= 3 * math.sqrt(0.4)

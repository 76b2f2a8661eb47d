"""Recurrent depth as a task: what a position may know, that a cache changes nothing, and what is scored."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dblocks_jax.data.arrays import Arrays
from dblocks_jax.data.vocabulary import letters
from dblocks_jax.fields import recurrent
from dblocks_jax.models.blueprint import Blueprint
from dblocks_jax.run.errors import UserError
from dblocks_jax.tasks.recurrent.config import check, plain, written_at_once
from dblocks_jax.tasks.recurrent.objective import denoising_losses
from dblocks_jax.tasks.recurrent.show import Pass
from dblocks_jax.tasks.recurrent.task import Recurrent
from dblocks_jax.tasks.text import TextCard
from dblocks_jax.tasks.text_order import make_score

LENGTH = 6
SIZES = {
    "num_layers": 3, "prelude_layers": 1, "coda_layers": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 8,
    "text_length": LENGTH, "eval_batch_size": 4, "num_inference_steps": 3, "temperature": 0.0,
}  # fmt: skip
MODELS = ("huginn", "dblock")


@cache
def make(model_type):
    """(task, blueprint, parameters drawn at random, (parameters, tokens) -> logits of all tokens but the first)."""
    config = recurrent.get_config()
    config.update(SIZES | {"model_type": model_type})
    check(config)
    task = Recurrent(config, TextCard(letters(), LENGTH))
    blueprint, params = Blueprint.of(task.modules(jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.4, p.shape), p.dtype), params)
    logits_of = jax.jit(task.logits_of(blueprint))

    def answer(params, tokens):
        together = tuple(params[name] for name in blueprint.names(0))
        return np.asarray(logits_of(together, tokens, jnp.arange(len(tokens))))

    return task, blueprint, params, answer


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 27, (2, LENGTH)), jnp.int32)


@pytest.mark.parametrize("model_type", MODELS)
def test_a_token_moves_no_logits_but_those_of_later_ones(model_type):
    *_, params, answer = make(model_type)
    logits = answer(params, TOKENS)
    for i in range(LENGTH - 1):
        moved = answer(params, TOKENS.at[:, i].set((TOKENS[:, i] + 1) % 27))
        np.testing.assert_array_equal(np.any(moved != logits, axis=(0, 2)), np.arange(LENGTH - 1) >= i)


@pytest.mark.parametrize("model_type", MODELS)
def test_text_is_written_with_a_cache_as_it_is_scored_without(model_type):
    task, blueprint, params, answer = make(model_type)
    written, logits = zip(*task.writer(blueprint)(params, TOKENS[:, :2], LENGTH - 2, jnp.arange(2)), strict=True)
    text = jnp.concatenate([TOKENS[:, :2], jnp.stack(written, axis=1)], axis=1)
    expected = answer(params, text)[:, 1:]
    np.testing.assert_allclose(np.stack(logits, axis=1), expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(text[:, 2:], expected.argmax(axis=-1))


def test_levels_of_the_denoiser_are_euler_steps_from_zero():
    """Written out with passes one by one; the last level's logits are the answer, and one level is one look."""
    task, blueprint, params, answer = make("dblock")
    shared, trunk = blueprint.together((params["shared"], params["block_0"]))
    table = np.asarray(params["shared"]["embeddings"], np.float64)
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)

    @jax.jit
    def one_pass(z, sigma):
        return Pass(shared, trunk, 0.5)(TOKENS, z, jnp.full(2, sigma))

    z, levels = np.zeros((2, LENGTH, 8)), task.levels()
    assert levels[0] == 5.0 and len(levels) == 3
    for sigma, following in zip(levels, [*levels[1:], None], strict=True):
        logits = np.asarray(one_pass(jnp.asarray(z, jnp.float32), jnp.float32(sigma)), np.float64)
        if following is not None:
            p = np.exp(logits - logits.max(-1, keepdims=True))
            z = z + (following - sigma) * (z - p @ unit / p.sum(-1, keepdims=True)) / sigma
    np.testing.assert_allclose(answer(params, TOKENS), logits[:, :-1], atol=1e-4 * np.abs(logits).max())


def test_a_loss_is_of_the_tokens_up_to_its_own_and_of_noise_up_to_there():
    """Noise at t moves the cross-entropy of token t + 1 and later ones; behind the last token nothing is counted."""
    _, blueprint, params, _ = make("dblock")
    shared, trunk = blueprint.together((params["shared"], params["block_0"]))
    sigma, eps = jnp.array([1.0, 0.3]), jax.random.normal(jax.random.key(2), (2, LENGTH, 8))

    @jax.jit
    def losses(tokens, eps):
        return denoising_losses(shared, trunk, tokens, sigma, eps, sigma_data=0.5)

    found = losses(TOKENS, eps)
    np.testing.assert_array_equal(losses(TOKENS, eps.at[:, -1].add(1.0)).each, found.each)
    assert (losses(TOKENS, eps.at[:, -2].add(1.0)).each != found.each).all()
    np.testing.assert_allclose(found.weight, (sigma**2 + 0.25) / (0.5 * sigma) ** 2, rtol=1e-5)


def test_a_model_that_knows_nothing_needs_log2_27_bits():
    task, blueprint, params, _ = make("dblock")
    ignorant = params | {"shared": params["shared"] | {"embeddings": 0.0 * params["shared"]["embeddings"]}}
    chunks = Arrays({"tokens": np.random.default_rng(0).integers(0, 27, (10, LENGTH)).astype(np.uint8)})
    found = make_score(task, blueprint)(ignorant, chunks, lambda: None)
    assert found["bits"] == pytest.approx(math.log2(27), abs=1e-6) and found["num_sequences"] == 10


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_blocks": 2}, "num_blocks must be 1, not 2"),
        ({"coda_layers": 2}, "leave no layer of num_layers=3 to the core"),
        ({"num_inference_steps": 0}, "num_inference_steps must be greater than 0"),
        ({"grow_at": (0.5,)}, "are of several blocks"),
        ({"sharing": "isolated"}, "sharing=isolated is of several blocks"),
        ({"text_length": 1}, "text_length must be at least 2"),
    ],
)
def test_what_cannot_work_is_one_line(fields, message):
    for model_type in MODELS:
        config = recurrent.get_config()
        config.update(SIZES | {"model_type": model_type} | fields)
        with pytest.raises(UserError, match=message):
            check(config)


def test_caches_of_all_levels_fit_in_half_a_gibibyte():
    config = recurrent.get_config()
    at_once = written_at_once(config, config.text_length)
    of_one = 4 * 2 * 512 * (2 + 32 * (4 + 2)) * 256  # bytes of two kinds, 194 layers, 256 tokens
    assert at_once * of_one <= 2**29 < (at_once + 1) * of_one
    assert written_at_once(plain(config), config.text_length) > at_once

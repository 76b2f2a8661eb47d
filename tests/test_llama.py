"""The plain Llama against Hugging Face's, array by array, and what causality and checkpointing promise."""

import dataclasses
from functools import cache

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from dblocks_jax.models import chunks
from dblocks_jax.models.blueprint import Blueprint
from dblocks_jax.models.llama import Llama, LlamaArchitecture
from dblocks_jax.models.llama_reference import from_reference_llama, to_reference_llama
from dblocks_jax.run.errors import UserError
from dblocks_jax.tasks.next_token.generation import make_writer
from dblocks_jax.tasks.next_token.objective import plain_losses

TINY = LlamaArchitecture(vocab_size=11, num_layers=2, hidden_size=16, num_heads=2, intermediate_size=20)
cached_load = cache(golden.load)


def load(path):
    """(arrays, model) of a golden file."""
    arrays, config = cached_load(path)
    return arrays, from_reference_llama(golden.under(arrays, "param/"), config)


@pytest.mark.parametrize("path", golden.files("llama_*.npz"))
def test_reference_weights_survive_the_round_trip(path):
    arrays, model = load(path)
    weights, back = golden.under(arrays, "param/"), to_reference_llama(model)
    assert back.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


@pytest.mark.parametrize("path", golden.files("llama_*.npz"))
def test_hidden_states_logits_loss_and_gradients(path):
    """The last of the reference's hidden states is the one after the norm."""
    arrays, model = load(path)
    tokens = jnp.asarray(arrays["tokens"], jnp.int32)
    graphdef, params = nnx.split(model)

    @jax.jit
    def loss_fn(params):
        model = nnx.merge(graphdef, params)
        hidden = [model.embed(tokens)]
        for layer in model.layers:
            hidden.append(layer(hidden[-1]))
        return jnp.mean(plain_losses(model, tokens).each), (model(tokens), [*hidden[:-1], model.norm(hidden[-1])])

    (loss, (logits, hidden)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    for index, value in enumerate(hidden):
        golden.assert_close(value, arrays[f"hidden{index}"], 1e-5, f"hidden state {index}")
    golden.assert_close(logits, arrays["logits"], 1e-5, "logits")
    golden.assert_close(loss, arrays["loss_next_token"], 1e-5, "loss")
    actual, expected = to_reference_llama(nnx.merge(graphdef, grads)), golden.under(arrays, "grad/")
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        golden.assert_close(actual[name], value, 1e-4, name)


@pytest.mark.parametrize("path", golden.files("llama_*.npz"))
def test_greedy_text(path):
    """Written with a cache, as Hugging Face writes it; the logits are those of the whole text at once."""
    arrays, model = load(path)
    expected = jnp.asarray(arrays["greedy_from_4"], jnp.int32)
    b, length = expected.shape
    blueprint, params = Blueprint.of({"model": model})
    writer = make_writer(ConfigDict({"model_type": "llama", "seed": 0, "temperature": 0.0, "top_p": 1.0}), blueprint)
    tokens, logits = zip(*writer(params, expected[:, :4], length - 4, jnp.arange(b)), strict=True)
    np.testing.assert_array_equal(np.stack(tokens, axis=1), expected[:, 4:])
    at_once = np.asarray(jax.jit(model.__call__)(expected))
    golden.assert_close(np.stack(logits, axis=1), at_once[:, 3:-1], 1e-5, "logits")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "lack model.layers.1.mlp.up_proj.weight"),
        (lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": np.ones(16)}), "does not have: model.layers.0"),
        (lambda w: w.update({"lm_head.weight": np.ones((16, 11))}), r"lm_head.weight \(16, 11\)"),
        # Fewer keys than queries, as newer Llamas have; and an array that would make up for it.
        (lambda w: w.update({"model.layers.0.self_attn.k_proj.weight": np.ones((8, 16))}), r"k_proj.weight \(8, 16\)"),
        (
            lambda w: w.update(
                {f"model.layers.0.self_attn.{kind}_proj.weight": np.ones((n, 16)) for kind, n in (("k", 8), ("v", 24))}
            ),
            r"v_proj.weight \(24, 16\)",
        ),
        (lambda w: w.update({"model.embed_tokens.weight": np.ones(16)}), "must have 2 axes"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message):
    weights = to_reference_llama(Llama(TINY, rngs=nnx.Rngs(0)))
    from_reference_llama(weights, TINY)
    change(weights)
    with pytest.raises(UserError, match=message):
        from_reference_llama(weights, TINY)


def test_heads_that_do_not_fit_are_refused():
    weights = to_reference_llama(Llama(TINY, rngs=nnx.Rngs(0)))
    config = LlamaArchitecture(11, 2, 16, num_heads=16, intermediate_size=20)
    with pytest.raises(UserError, match="num_heads=16"):
        from_reference_llama(weights, config)


def test_parameters_start_as_the_reference_starts_them():
    """Norms at 1, all else normal(0.02)."""
    model = Llama(LlamaArchitecture(100, 1, 96, 2, 256), rngs=nnx.Rngs(0))
    for name, value in to_reference_llama(model).items():
        if "norm" in name:
            np.testing.assert_array_equal(value, 1.0, err_msg=name)
        else:
            assert np.std(value) == pytest.approx(0.02, rel=0.05), name


def test_later_tokens_move_no_earlier_logits(key):
    model = Llama(TINY, rngs=nnx.Rngs(0))
    forward, tokens = jax.jit(model.__call__), jax.random.randint(key, (2, 8), 0, 11)
    logits = forward(tokens)
    for i in range(8):
        moved = forward(tokens.at[:, i].set((tokens[:, i] + 1) % 11))
        np.testing.assert_array_equal(moved[:, :i], logits[:, :i])
        assert np.any(moved[:, i] != logits[:, i], axis=-1).all()


def gradients(**changes):
    arch = dataclasses.replace(TINY, num_layers=1, **changes)
    graphdef, params = nnx.split(Llama(arch, rngs=nnx.Rngs(0)))
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 11)
    return jax.jit(jax.grad(lambda params: jnp.mean(plain_losses(nnx.merge(graphdef, params), tokens).each)))(params)


@pytest.mark.long
def test_checkpointed_in_bfloat16_and_read_in_parts_only_digits_change(monkeypatch):
    """bfloat16 has 8 bits of mantissa; parameters and their gradients stay float32."""
    exact = gradients()
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2 * 11 * 4 * 2)  # the logits of two places
    again = gradients(gradient_checkpointing=True, dtype="bfloat16")
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(exact), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, atol=0.1 * np.abs(b).max())

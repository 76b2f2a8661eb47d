"""Blocks that denoise tokens: what the mask written out gives, who reads whom, and text written with a cache."""

import dataclasses
import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from dblocks_jax.diffusion.precondition import precondition
from dblocks_jax.models import chunks
from dblocks_jax.models.blueprint import Blueprint
from dblocks_jax.models.dblock_llama import make_dblock_llama, run_block
from dblocks_jax.models.llama import LlamaArchitecture
from dblocks_jax.run.errors import UserError
from dblocks_jax.tasks.next_token.denoiser import denoise, read_out
from dblocks_jax.tasks.next_token.generation import make_writer, sampler_plan, starting_noise
from dblocks_jax.tasks.next_token.objective import denoising_losses
from dblocks_jax.tasks.text_writing import choose_token

TINY = LlamaArchitecture(vocab_size=7, num_layers=4, hidden_size=16, num_heads=2, intermediate_size=20)
LENGTH = 8
SIGMA = {"sigma_data": 0.5, "sigma_min": 0.002}
CONFIG = ConfigDict(
    {
        "model_type": "dblock", "num_blocks": 2, "hidden_size": 16, "seed": 3, "num_inference_steps": 3, "gamma": 0.1,
        "p_mean": -1.2, "p_std": 1.2, "sigma_max": 80.0, "sampler_spacing": "cdf", "init_noise_scale": 1.0,
        "temperature": 0.0, "top_p": 1.0, **SIGMA,
    }
)  # fmt: skip


@cache
def tiny(head="linear", isolated=False):
    """Parts with parameters drawn at random, so that gates are open and every head answers."""
    make = partial(make_dblock_llama, TINY, 2, head=head, isolated=isolated)
    parts = nnx.eval_shape(lambda: nnx.Dict(make(rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    nnx.update(parts, jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.3, p.shape), p.dtype), nnx.state(parts)))
    return dict(parts.items())


def inputs(batch=2):
    key = jax.random.key(5)
    tokens = jax.random.randint(key, (batch, LENGTH), 0, TINY.vocab_size)
    return tokens, jax.random.normal(key, (batch, LENGTH, TINY.hidden_size)), jnp.array([3.0, 0.2])[:batch]


def masked_attention(qkv, mask):
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    scores = jnp.einsum("bqhw,bthw->bhqt", q, k) / np.sqrt(qkv.shape[-1])
    return jnp.einsum("bhqt,bthw->bqhw", jax.nn.softmax(jnp.where(mask[None, None], scores, -jnp.inf), axis=-1), v)


def concatenated(shared, block, clean, z_in, c_noise, c_noise_clean):
    """`run_block` as Block Diffusion has it: [noisy; clean] as one sequence, under a mask.

    Noisy i sees itself and clean j < i, clean i sees clean j <= i. Both halves have positions 0..n-1.
    """
    n = clean.shape[1]
    own, before, none = np.eye(n, dtype=bool), np.tril(np.ones((n, n), bool), -1), np.zeros((n, n), bool)
    mask = np.block([[own, before], [none, before | own]])
    positions = jnp.tile(jnp.arange(n), 2)
    conds = shared.noise(c_noise), shared.noise(jnp.full(c_noise.shape, c_noise_clean))

    def six_of_each_token(layer):
        each = zip(*(layer.modulation(cond) for cond in conds), strict=True)
        return [jnp.repeat(jnp.stack(pair, axis=1), n, axis=1) for pair in each]

    def norm(x, shift, scale):
        return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + TINY.rms_norm_eps) * (1 + scale) + shift

    x = jnp.concatenate([z_in, clean], axis=1)
    for layer in block.layers:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = six_of_each_token(layer)
        qkv = layer.attention.queries_keys_values(norm(x, shift_a, scale_a), positions)
        x = x + gate_a * layer.attention.read_out(masked_attention(qkv, mask))
        x = x + gate_m * layer.mlp(norm(x, shift_m, scale_m))
    return shared.normalize(x[:, :n], conds[0])


def test_two_streams_are_one_sequence_under_a_mask():
    """Gradients are those of the attention and the norms, see tests/test_causal.py."""
    parts, (tokens, z, _) = tiny(), inputs()
    shared, block = parts["shared"], parts["block_0"]
    args = shared.table()[tokens], z, jnp.array([0.3, -0.4])
    forward = lambda run: jax.jit(lambda *args: run(shared, block, *args, -1.5))(*args)  # noqa: E731
    ours, expected = forward(run_block), forward(concatenated)
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())


def test_a_token_is_answered_for_from_those_before_it_alone():
    """Clean token i moves logits behind i, and noisy token i moves its own; no other, not by a bit."""
    parts, (tokens, z, sigma) = tiny(), inputs()
    forward = jax.jit(lambda tokens, z: denoise(parts["shared"], parts["block_0"], tokens, z, sigma, **SIGMA))
    logits = forward(tokens, z)
    # What the network is given, by hand: z / sqrt(sigma^2 + 0.25), and ln(sigma) / 4.
    shared, block = parts["shared"], parts["block_0"]
    z_in = z / jnp.sqrt(sigma**2 + 0.25)[:, None, None]
    features = jax.jit(lambda *args: run_block(shared, block, *args, math.log(0.002) / 4))(
        shared.table()[tokens], z_in, jnp.log(sigma) / 4
    )
    expected = features @ shared.head.linear.kernel[...]
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
    for i in range(LENGTH):
        moved = forward(tokens.at[:, i].set((tokens[:, i] + 1) % TINY.vocab_size), z)
        np.testing.assert_array_equal(np.any(moved != logits, axis=(0, 2)), np.arange(LENGTH) > i)
        moved = forward(tokens, z.at[:, i].add(1.0))
        np.testing.assert_array_equal(np.any(moved != logits, axis=(0, 2)), np.arange(LENGTH) == i)


@pytest.mark.parametrize("head", ["linear", "denoised", "cosine"])
def test_what_heads_read(head):
    """F, or D = c_skip z + c_out F with EDM's coefficients, or its cosines with the table."""
    shared, (_, z, sigma) = tiny(head)["shared"], inputs()
    features, s = jax.random.normal(jax.random.key(6), z.shape), np.asarray(sigma)[:, None, None]
    denoised = (0.25 * z + s * 0.5 * np.sqrt(s**2 + 0.25) * features) / (s**2 + 0.25)
    if head == "cosine":
        rows = np.asarray(shared.embeddings[...])
        cosines = np.einsum("btd,vd->btv", denoised, rows) / np.linalg.norm(denoised, axis=-1, keepdims=True)
        expected = shared.head.scale[...] * cosines / np.linalg.norm(rows, axis=-1)[None, None]
    else:
        expected = {"linear": features, "denoised": denoised}[head] @ shared.head.linear.kernel[...]
    logits = read_out(shared, features, z, precondition(sigma, 0.5))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_losses_are_of_every_token_and_weighted_apart(monkeypatch):
    """Read in parts, the logits of two places at a time."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2 * 2 * TINY.vocab_size * 4)
    parts, (tokens, eps, sigma) = tiny(), inputs()
    shared, block = parts["shared"], parts["block_1"]

    @jax.jit
    def both():
        z = shared.table()[tokens] + sigma[:, None, None] * eps
        losses = denoising_losses(shared, block, tokens, sigma, eps, **SIGMA)
        return losses, denoise(shared, block, tokens, z, sigma, **SIGMA)

    losses, logits = both()
    probs = np.asarray(jax.nn.softmax(logits))
    picked = np.take_along_axis(probs, np.asarray(tokens)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(losses.each, -np.log(picked).mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(losses.weight, (sigma**2 + 0.25) / (0.5 * sigma) ** 2, rtol=1e-5)
    np.testing.assert_allclose(losses.watched["accuracy"], (probs.argmax(-1) == tokens).mean(axis=1), rtol=1e-6)


def test_parts_by_name_and_alike_in_structure():
    assert set(tiny()) == {"shared", "block_0", "block_1"}
    parts = tiny(isolated=True)
    assert set(parts) == {"shared_0", "block_0", "shared_1", "block_1"}
    assert nnx.graphdef(parts["shared_0"]) == nnx.graphdef(parts["shared_1"])
    assert nnx.graphdef(parts["block_0"]) == nnx.graphdef(parts["block_1"])


def test_a_fresh_block_hands_its_input_on():
    """All gates are closed: F is z_in, each token brought to a mean square of 1."""
    _, z, sigma = inputs()

    @jax.jit
    def features():
        arch = dataclasses.replace(TINY, num_layers=1)
        parts = make_dblock_llama(arch, 1, head="linear", isolated=False, rngs=nnx.Rngs(0))
        return run_block(parts["shared"], parts["block_0"], z, z, sigma, 0.0)

    np.testing.assert_allclose(features(), z / np.sqrt(np.mean(z**2, axis=-1, keepdims=True)), rtol=1e-4)


def test_text_is_written_with_a_cache_as_without():
    """Each token again from the training form, where clean tokens that come later are wrong: they are not read.

    Blocks are isolated, so the estimate is carried over from one table to the next.
    """
    parts, (tokens, *_), samples = tiny("linear", isolated=True), inputs(), jnp.array([4, 9])
    blueprint, params = Blueprint.of(parts)
    sigmas, owners = sampler_plan(CONFIG)
    assert set(owners) == {0, 1}

    @jax.jit
    def logits_of(modules, tokens, z, sigma, position):
        shared, block = blueprint.together(modules)
        z = jnp.repeat(z[:, None], LENGTH, axis=1)
        return denoise(shared, block, tokens, z, jnp.full(2, sigma, jnp.float32), **SIGMA)[:, position]

    tables = [np.asarray(parts[f"shared_{b}"].table()) for b in range(2)]
    written = list(make_writer(CONFIG, blueprint)(params, tokens[:, :3], LENGTH - 3, samples))
    assert len(written) == LENGTH - 3
    for position, (token, logits) in enumerate(written, start=3):
        z = starting_noise(CONFIG, samples, jnp.int32(position))
        for i, (owner, sigma) in enumerate(zip(owners, sigmas, strict=True)):
            modules = tuple(params[name] for name in blueprint.names(owner))
            again = logits_of(modules, tokens, z, sigma, position)
            if i < len(sigmas) - 1:
                probs = np.asarray(jax.nn.softmax(again))
                slope = (z - probs @ tables[owner]) / sigma
                z = z + (sigmas[i + 1] - sigma) * slope + probs @ (tables[owners[i + 1]] - tables[owner])
        np.testing.assert_allclose(logits, again, atol=1e-5 * np.abs(again).max())
        np.testing.assert_array_equal(token, np.argmax(again, axis=-1))
        tokens = tokens.at[:, position].set(token)


def test_the_nucleus():
    """Probabilities 0.5, 0.3, 0.15, 0.05: the first two add up to 0.75 and more, and are drawn 5 : 3."""
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.15, 0.5, 0.05, 0.3])), (4000, 4))
    keys = jax.random.split(jax.random.key(0), 4000)
    counts = lambda *args: np.bincount(choose_token(keys, logits, *args), minlength=4) / 4000  # noqa: E731
    np.testing.assert_array_equal(counts(0.0, 1.0), [0, 1, 0, 0])
    np.testing.assert_array_equal(counts(1.0, 0.4), [0, 1, 0, 0])
    four_deviations = 4 * np.sqrt(0.25 / 4000)
    np.testing.assert_allclose(counts(1.0, 0.75), [0, 0.625, 0, 0.375], atol=four_deviations)
    np.testing.assert_allclose(counts(1.0, 1.0), [0.15, 0.5, 0.05, 0.3], atol=four_deviations)
    roots = np.sqrt([0.15, 0.5, 0.05, 0.3])
    np.testing.assert_allclose(counts(2.0, 1.0), roots / roots.sum(), atol=four_deviations)


def test_a_text_has_a_beginning():
    blueprint, params = Blueprint.of(tiny())
    with pytest.raises(UserError, match="at least one token"):
        make_writer(CONFIG, blueprint)(params, jnp.zeros((1, 0), jnp.int32), 2, jnp.array([0]))

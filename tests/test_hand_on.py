"""Tokens handed on from block to block: one deep network in the forward pass, blocks apart in the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import common
from dblocks_jax.build import Blueprint, make_classifier, make_objective, make_step, new_model
from dblocks_jax.config import architecture
from dblocks_jax.datasets import Card
from dblocks_jax.denoiser import denoise_step
from dblocks_jax.diffusion.noise import sample_sigma
from dblocks_jax.diffusion.sampler import initial_z
from dblocks_jax.models.dblock_vit import hand_on, run_block
from dblocks_jax.models.layers import Block
from dblocks_jax.objective import denoising_loss
from dblocks_jax.optimizer import new_part
from dblocks_jax.residence import OneAtATime
from dblocks_jax.step import Steps, Streamed

CARD = Card(tuple("abcd"), (8, 8, 1), (0.5,), (0.25,))
IMAGES = jax.random.normal(jax.random.key(9), (5, 8, 8, 1))
LABELS = jnp.array([0, 1, 2, 3, 1])


def settings(**fields):
    config = common.get_config()
    config.update(
        hand_on_tokens=True, num_blocks=3, num_layers=6, hidden_size=12, num_heads=2, intermediate_size=16, dropout=0.0,
        image_size=8, patch_size=4, crop_padding=0, flip=False, weighting="none", pool="mean", init_noise_scale=0.0,
        sampler_spacing="blocks",
    )  # fmt: skip
    config.update(fields)
    return config


def perturbed(config):
    """A model whose zero-initialised layers are not zero, so that every path counts."""
    blueprint, params = Blueprint.of(new_model(config, architecture(config, CARD)))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return blueprint, jax.tree.unflatten(structure, noisy)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_blocks_that_hand_on_are_one_deep_network(pool):
    blueprint, params = perturbed(settings(pool=pool))
    model = blueprint.model(params)
    tokens = start = model.shared.embed_patches(IMAGES, None)
    for block in model.blocks:
        tokens = hand_on(model.shared, block, tokens)
    deep = Block([layer for block in model.blocks for layer in block.layers], first_only=False)
    np.testing.assert_allclose(tokens, deep(start, model.shared.steady(start), None), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_the_tokens_know_nothing_of_the_label(pool):
    """What is handed on is what a block without a label token computes; with "mean" the head alone reads z."""
    blueprint, params = perturbed(settings(pool=pool))
    model = blueprint.model(params)
    shared, block = model.shared, model.blocks[0]
    tokens, c_noise = shared.embed_patches(IMAGES, None), jnp.linspace(-1, 1, 5)
    z = jax.random.normal(jax.random.key(2), (5, 12))
    label, patches = block.apart(z[:, None], tokens, shared.noise(c_noise), shared.steady(tokens), None)
    np.testing.assert_allclose(patches, hand_on(shared, block, tokens), rtol=1e-5, atol=1e-5)
    one, other = (run_block(shared, block, tokens, each, c_noise)[0] for each in (z, -z))
    assert np.allclose(one, other) == (pool == "mean")
    again = block.apart(z[:, None], -tokens, shared.noise(c_noise), shared.steady(tokens), None)[0]
    assert not np.allclose(label, again)  # the label reads the patches


@pytest.mark.parametrize("sharing", ["shared", "isolated"])
def test_a_block_learns_from_the_tokens_before_it_and_not_through_them(sharing):
    config = settings(sharing=sharing)
    blueprint, params = perturbed(config)
    loss, ranges = make_objective(config, blueprint)
    key = jax.random.key(3)
    for number in range(3):
        mine = tuple(params[name] for name in blueprint.names(number))
        earlier = tuple(tuple(params[name] for name in names) for names in blueprint.earlier(number))
        args = (IMAGES, LABELS, key, ranges[number], number)
        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(mine, *args, earlier)
        # By hand, from the definition.
        tokens = None
        for before in range(number + 1):
            shared, block = (nnx.merge(blueprint.parts[name], params[name]) for name in blueprint.names(before))
            tokens = shared.embed_patches(IMAGES, None) if tokens is None else tokens
            if before < number:
                tokens = hand_on(shared, block, tokens)
        key_sigma, key_eps, *_ = jax.random.split(key, 4)
        sigma = sample_sigma(key_sigma, 5, ranges[number], p_mean=config.p_mean, p_std=config.p_std)
        eps = jax.random.normal(key_eps, (5, 12))
        expected, _ = denoising_loss(shared, block, tokens, LABELS, sigma, eps, sigma_data=0.5, weighting="none")
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        # The image's embedding belongs to block 0.
        assert np.any(grads[0]["patches"]["projection"]["kernel"]) == (number == 0)
        assert np.any(grads[1]["layers"][0]["mlp"]["output"]["kernel"])


@pytest.mark.parametrize("idle_on_host", [False, True])
@pytest.mark.parametrize("sharing", ["shared", "isolated"])
def test_one_compilation_and_only_the_block_at_work_changes(sharing, idle_on_host):
    config = settings(sharing=sharing)
    blueprint, params = perturbed(config)
    loss, ranges = make_objective(config, blueprint)
    step = make_step(config, loss, CARD)
    before = jax.device_get(params)
    parts = {name: new_part(part) for name, part in params.items()}
    model = OneAtATime(step, parts, blueprint.names, idle_on_host=idle_on_host, earlier=blueprint.earlier)
    data = Streamed(np.zeros((5, 8, 8, 1), np.uint8), np.asarray(LABELS, np.int32))
    for number in (2, 0, 1):
        steps = Steps(np.int32(1), np.int32(number), np.int32(0), np.full(1, 1e-2, np.float32), ranges[number])
        log = model.train(number, data, steps)
        assert np.isfinite(log["loss"]).all()
        after = {name: part.params for name, part in model.parts().items()}
        changed = {
            name
            for name in before
            if any(
                not np.array_equal(a, b)
                for a, b in zip(*map(jax.tree.leaves, (before[name], after[name])), strict=True)
            )
        }
        assert changed == set(blueprint.names(number))
        before = jax.device_get(after)
    assert step._cache_size() == 1


@pytest.mark.parametrize("sharing", ["shared", "isolated"])
def test_the_sampler_hands_tokens_on(sharing):
    config = settings(sharing=sharing, label_table="normalized")
    blueprint, params = perturbed(config)
    classify = make_classifier(config, blueprint, CARD)
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    sigmas, blocks = [80.0, 8.0, 2.0], [0, 2, 2]  # block 1 looks at no noise, and hands tokens on all the same
    logits = classify(params, images, np.arange(5), plan=(np.array(sigmas), blocks))
    normalized = jnp.asarray((images / np.float32(255) - 0.5) / 0.25, jnp.float32)
    z, modules = (
        initial_z(jnp.zeros((5, 12)), 80.0),
        {name: nnx.merge(blueprint.parts[name], params[name]) for name in params},
    )
    tokens = [modules[blueprint.names(0)[0]].embed_patches(normalized, None)]
    for number in range(2):
        shared, block = (modules[name] for name in blueprint.names(number))
        tokens.append(hand_on(shared, block, tokens[-1]))
    for i, (number, sigma, sigma_next) in enumerate(zip(blocks, sigmas, [*sigmas[1:], sigmas[-1]], strict=True)):
        shared, block = (modules[name] for name in blueprint.names(number))
        following = modules[blueprint.names([*blocks, blocks[-1]][i + 1])[0]].labels[...]
        expected, z = denoise_step(
            shared, block, tokens[number], z, np.float32(sigma), np.float32(sigma_next),
            sigma_data=0.5, cfg_scale=0.0, table="normalized",
            labels_next=following if sharing == "isolated" else None,
        )  # fmt: skip
        np.testing.assert_allclose(logits[i], expected, rtol=1e-4, atol=1e-5)

"""The released program's values, reproduced in float32: every array of every golden file."""

import json
from functools import cache, partial

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dblocks_jax.diffusion.loss import cross_entropy, weighted_loss
from dblocks_jax.diffusion.noise import NoiseDistribution, block_edges, blocks_of_sigmas, inference_sigmas
from dblocks_jax.diffusion.precondition import loss_weight
from dblocks_jax.diffusion.sampler import initial_z, sample
from dblocks_jax.models.dblock_vit import DBlockViT
from dblocks_jax.models.reference import from_reference, to_reference
from dblocks_jax.tasks.classify.denoiser import denoise, denoise_step
from dblocks_jax.tasks.classify.objective import denoising_losses
from dblocks_jax.training.optimizer import adamw, learning_rate, new_part

SIGMA_DATA = 0.5
cached_load = cache(golden.load)


def images_of(arrays):
    return jnp.asarray(arrays["pixel_values_nchw"].transpose(0, 2, 3, 1))


def split(model: DBlockViT):
    """(graphdef of the shared parts, of a block, parameters of the shared parts, of each block)."""
    shared_def, shared = nnx.split(model.shared)
    block_defs, blocks = zip(*(nnx.split(block) for block in model.blocks), strict=True)
    assert all(block_def == block_defs[0] for block_def in block_defs)
    return shared_def, block_defs[0], nnx.to_pure_dict(shared), [nnx.to_pure_dict(block) for block in blocks]


def reference_names(shared_def, block_def, shared, blocks) -> dict[str, np.ndarray]:
    merged = [nnx.merge(block_def, block) for block in blocks]
    return to_reference(DBlockViT(nnx.merge(shared_def, shared), merged))


def assert_gradients(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Each expected gradient to 1e-4 of its largest entry, except the one that is zero by mathematics.

    A key bias adds the same number to all scores of a query, which softmax ignores: both programs hold rounding noise
    there, so each is compared with zero on the scale of the key weights' gradient.
    """
    for name, value in expected.items():
        if name.endswith("key.bias"):
            scale = np.max(np.abs(expected[name.replace("bias", "weight")]))
            assert np.max(np.abs(actual[name])) <= 1e-5 * scale >= np.max(np.abs(value)), name
        else:
            golden.assert_close(actual[name], value, 1e-4, name)


def block_loss(shared_def, block_def):
    """The released code's loss of one block with its gradients, jitted once for all blocks."""

    def loss(params, images, labels, sigma, eps):
        losses = denoising_losses(
            nnx.merge(shared_def, params[0]), nnx.merge(block_def, params[1]), images, labels, sigma, eps,
            sigma_data=SIGMA_DATA,
        )  # fmt: skip
        return weighted_loss(losses.each, losses.weight, "batch_mean"), {"ce": jnp.mean(losses.each)}

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("path", golden.files("schedules.json"))
def test_schedules(path):
    expected = json.loads(path.read_text())
    noise = NoiseDistribution()
    for count, sigmas in expected["block_sigmas"].items():
        np.testing.assert_allclose(block_edges(noise, int(count)), sigmas[::-1], rtol=1e-6)
    for count, sigmas in expected["sampler_sigmas"].items():
        np.testing.assert_allclose(inference_sigmas(noise, int(count)), sigmas, rtol=1e-6)
    for count, sigmas in expected["karras_sigmas"].items():
        np.testing.assert_allclose(inference_sigmas(noise, int(count), rho=7.0), sigmas, rtol=1e-6)
    for case, rates in expected["lr_at_step"].items():
        name, lr, warmup, total, kwargs = case.split("|")
        at = learning_rate(
            name,
            lr=float(lr.removeprefix("lr=")),
            num_warmup_steps=int(warmup.removeprefix("warmup=")),
            total_steps=int(total.removeprefix("total=")),
            specific_kwargs=kwargs,
        )
        np.testing.assert_allclose([at(step) for step in range(len(rates))], rates, rtol=1e-6, err_msg=case)


@pytest.mark.parametrize("path", golden.files("dblock_*.npz") + golden.files("vit_*.npz"))
def test_reference_weights_survive_the_round_trip(path):
    arrays, config = cached_load(path)
    weights = golden.under(arrays, "param/")
    back = to_reference(from_reference(weights, config))
    assert back.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


@pytest.mark.parametrize("path", golden.files("vit_*.npz"))
def test_plain_vit(path):
    arrays, config = cached_load(path)
    graphdef, params = nnx.split(from_reference(golden.under(arrays, "param/"), config))

    @jax.jit
    @jax.value_and_grad
    def loss_fn(params, images, labels):
        return jnp.mean(cross_entropy(nnx.merge(graphdef, params)(images), labels))

    logits = nnx.merge(graphdef, params)(images_of(arrays))
    golden.assert_close(logits, arrays["logits"], 1e-5, "logits")
    loss, grads = loss_fn(params, images_of(arrays), jnp.asarray(arrays["labels"]))
    golden.assert_close(loss, arrays["loss"], 1e-5, "loss")
    actual = to_reference(nnx.merge(graphdef, grads))
    assert_gradients(actual, golden.under(arrays, "grad/"))


@pytest.mark.parametrize("path", golden.files("dblock_*.npz"))
def test_every_block(path):
    arrays, config = cached_load(path)
    model = from_reference(golden.under(arrays, "param/"), config)
    labels, images = jnp.asarray(arrays["labels"]), images_of(arrays)
    golden.assert_close(model.shared.embed_labels(labels), arrays["target_embeddings"], 1e-5, "target embeddings")
    shared_def, block_def, shared, blocks = split(model)
    loss_fn = block_loss(shared_def, block_def)

    @jax.jit
    def denoise_fn(shared, block, images, z, sigma):
        return denoise(
            nnx.merge(shared_def, shared), nnx.merge(block_def, block), images, z, sigma, sigma_data=SIGMA_DATA
        )

    for b in range(config.num_blocks):
        at = golden.under(arrays, f"block{b}/")
        sigma, eps = jnp.asarray(at["sigma"]), jnp.asarray(at["eps"])
        z = model.shared.embed_labels(labels) + sigma[:, None] * eps
        golden.assert_close(z, at["noisy"], 1e-5, "z")
        logits = denoise_fn(shared, blocks[b], images, z, sigma)
        golden.assert_close(logits, at["logits"], 1e-5, "logits")
        ce, weight = cross_entropy(logits, labels), loss_weight(sigma, SIGMA_DATA)
        golden.assert_close(ce, at["ce"], 1e-5, "cross-entropy")
        golden.assert_close(weight, at["weight"], 1e-5, "weight")
        golden.assert_close(weighted_loss(ce, weight, "per_sample"), at["loss_paper"], 1e-5, "Eq. 6")

        (loss, metrics), grads = loss_fn((shared, blocks[b]), images, labels, sigma, eps)
        golden.assert_close(loss, at["loss_released_code"], 1e-5, "released loss")
        golden.assert_close(metrics["ce"], np.mean(at["ce"]), 1e-5, "mean cross-entropy")
        zeros = [jax.tree.map(jnp.zeros_like, block) for block in blocks]
        zeros[b] = grads[1]
        actual = reference_names(shared_def, block_def, grads[0], zeros)
        expected = golden.under(at, "grad/")
        assert_gradients(actual, expected)
        untouched = {name for name in actual if name.startswith("vit.encoder.layer.")} - expected.keys()
        assert untouched == set(at["params_without_grad"])


@pytest.mark.parametrize("path", golden.files("dblock_*.npz"))
def test_sampler(path):
    arrays, config = cached_load(path)
    shared_def, block_def, shared, blocks = split(from_reference(golden.under(arrays, "param/"), config))
    noise, images = NoiseDistribution(), images_of(arrays)
    runs = sorted({name.split("/")[0] for name in arrays if name.startswith("sampler_")})
    assert runs

    @partial(jax.jit, static_argnames="cfg_scale")
    def jitted(shared, block, images, z, sigma, sigma_next, *, cfg_scale):
        return denoise_step(
            nnx.merge(shared_def, shared), nnx.merge(block_def, block), images, z, sigma, sigma_next,
            sigma_data=SIGMA_DATA, cfg_scale=cfg_scale, table="raw",
        )  # fmt: skip

    for run in runs:
        expected = golden.under(arrays, f"{run}/")
        num_steps, cfg_scale = run.removeprefix("sampler_steps").split("_cfg")
        sigmas = inference_sigmas(noise, int(num_steps))
        np.testing.assert_allclose(sigmas, expected["sigmas"], rtol=1e-6)
        visits = blocks_of_sigmas(block_edges(noise, config.num_blocks), sigmas)
        assert visits == list(expected["blocks"])

        def step(b, z, sigma, sigma_next, cfg_scale=float(cfg_scale)):
            return jitted(shared, blocks[b], images, z, sigma, sigma_next, cfg_scale=cfg_scale)

        logits, trajectory = sample(step, initial_z(jnp.asarray(expected["unit_noise"]), 80.0), sigmas, visits)
        golden.assert_close(trajectory, expected["trajectory"], 1e-5, run)
        golden.assert_close(logits[-1], expected["logits"], 1e-5, run)


@pytest.mark.parametrize("path", golden.files("dblock_*.npz"))
def test_training(path):
    arrays, config = cached_load(path)
    run = golden.under(arrays, "train/")
    shared_def, block_def, *params = split(from_reference(golden.under(arrays, "param/"), config))
    shared, blocks = new_part(params[0]), [new_part(block) for block in params[1]]
    images, labels = images_of(arrays), jnp.asarray(arrays["labels"])
    loss_fn = block_loss(shared_def, block_def)
    update = jax.jit(partial(adamw, weight_decay=0.01, clip_norm=1.0))

    losses, norms = [], []
    for b, sigma, eps in zip(run["blocks"], run["sigma"], run["eps"], strict=True):
        active = (shared, blocks[b])
        (loss, _), grads = loss_fn(tuple(part.params for part in active), images, labels, sigma, eps)
        (shared, blocks[b]), norm = update(active, grads, lr=jnp.float32(1e-3))
        losses.append(loss)
        norms.append(norm)
    np.testing.assert_allclose(losses, run["loss"], rtol=1e-5)
    np.testing.assert_allclose(norms, run["grad_norm"], rtol=1e-4)
    final = reference_names(shared_def, block_def, shared.params, [block.params for block in blocks])
    for name, expected in golden.under(run, "final/").items():
        np.testing.assert_allclose(final[name], expected, rtol=0, atol=1e-5, err_msg=name)

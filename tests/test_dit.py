"""The DiT against PyTorch's, array by array, and what its structure and its start promise."""

import dataclasses
from functools import cache, partial
from types import SimpleNamespace

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dblocks_jax.diffusion.loss import weighted_loss
from dblocks_jax.diffusion.noise import NoiseDistribution, inference_sigmas
from dblocks_jax.diffusion.sampler import solve
from dblocks_jax.models.dit import DiTArchitecture, make_dit, run_block, sincos_positions
from dblocks_jax.models.dit_reference import from_reference_dit, to_reference_dit
from dblocks_jax.run.errors import UserError
from dblocks_jax.tasks.generate.denoiser import denoise, denoising_losses, guided

TINY = DiTArchitecture(
    image_size=6, channels=1, num_labels=3, patch_size=3, num_layers=4, hidden_size=12, num_heads=3,
    intermediate_size=20,
)  # fmt: skip
cached_load = cache(golden.load)


def nhwc(array) -> jnp.ndarray:
    return jnp.asarray(np.moveaxis(array, -3, -1))


def nchw(array) -> np.ndarray:
    return np.moveaxis(np.asarray(array), -1, -3)


def load(path, *, num_blocks: int | None = None):
    """(arrays, config, parts) of a golden file, its layers cut into its own number of blocks or into `num_blocks`."""
    arrays, config = cached_load(path)
    cut = SimpleNamespace(num_heads=config.num_heads, num_blocks=num_blocks or config.num_blocks)
    return arrays, config, from_reference_dit(golden.under(arrays, "param/"), cut)


def assert_gradients(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Each expected gradient to 1e-4 of its largest entry. That of a key's bias is zero by mathematics.

    So it is compared with zero, on the scale of the key weights' gradient (see tests/test_golden.py).
    """
    for name, value in expected.items():
        if name.endswith("qkv.bias"):
            (q, k, v), (q_expected, k_expected, v_expected) = (np.split(x, 3) for x in (actual[name], value))
            scale = np.max(np.abs(np.split(expected[name.replace("bias", "weight")], 3)[1]))
            assert np.max(np.abs(k)) <= 1e-5 * scale >= np.max(np.abs(k_expected)), name
            golden.assert_close(q, q_expected, 1e-4, f"{name}, queries")
            golden.assert_close(v, v_expected, 1e-4, f"{name}, values")
        else:
            golden.assert_close(actual[name], value, 1e-4, name)


@pytest.mark.parametrize("path", golden.files("dit_*.npz"))
def test_reference_weights_survive_the_round_trip(path):
    arrays, config, parts = load(path)
    weights = golden.under(arrays, "param/")
    positions = sincos_positions(config.image_size // config.patch_size, config.hidden_size)
    np.testing.assert_allclose(weights.pop("pos_embed")[0], positions, atol=1e-6)
    back = to_reference_dit(parts)
    assert back.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


@pytest.mark.parametrize("path", golden.files("dit_*.npz"))
def test_every_layer(path):
    arrays, config, parts = load(path, num_blocks=1)
    shared, expected = parts["shared"], golden.under(arrays, "network/")
    tokens = shared.embed(nhwc(arrays["images_nchw"]))
    golden.assert_close(tokens, expected["tokens"], 1e-5, "tokens")
    cond = shared.condition(jnp.asarray(expected["c_noise"]), jnp.asarray(arrays["labels"]))
    golden.assert_close(cond, expected["cond"], 1e-5, "conditioning")
    layers = parts["block_0"].layers
    assert len(layers) == config.num_layers
    for index, layer in enumerate(layers):
        tokens = layer(tokens, cond)
        golden.assert_close(tokens, expected[f"after_layer{index}"], 1e-5, f"layer {index}")
    golden.assert_close(nchw(shared.read_out(tokens, cond)), expected["output_nchw"], 1e-5, "F")


def assert_block(arrays, at, config, shared, block, loss_fn, named) -> None:
    """The estimate, losses and gradients of one block; `named` puts a block's gradients in the reference's terms."""
    images, labels = nhwc(arrays["images_nchw"]), jnp.asarray(arrays["labels"])
    sigma, eps = jnp.asarray(at["sigma"]), nhwc(at["eps_nchw"])
    ((loss, (errors, denoised)), grads) = loss_fn((shared, block), images, labels, sigma, eps)
    golden.assert_close(nchw(denoised), at["denoised_nchw"], 1e-5, "D")
    golden.assert_close(errors, at["squared_error"], 1e-5, "squared error")
    golden.assert_close(loss, at["loss"], 1e-5, "loss")
    actual, expected = named(*grads), golden.under(at, "grad/")
    assert_gradients(actual, expected)
    untouched = actual.keys() - expected.keys()
    assert all(not actual[name].any() for name in untouched)
    trained = {name.split(".")[1] for name in expected if name.startswith("blocks.")}
    assert {name.split(".")[1] for name in untouched} == {str(i) for i in range(config.num_layers)} - trained


@pytest.mark.parametrize("cut", ["blocks", "plain"])
@pytest.mark.parametrize("path", golden.files("dit_*.npz"))
def test_estimate_loss_and_gradients(path, cut):
    """Of each block alone, and of all layers as one denoiser, the plain DiT."""
    arrays, config, parts = load(path, num_blocks=1 if cut == "plain" else None)
    shared_def, shared = nnx.split(parts["shared"])
    block_defs, blocks = zip(*(nnx.split(parts[name]) for name in parts if name != "shared"), strict=True)
    assert all(block_def == block_defs[0] for block_def in block_defs)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss_fn(params, images, labels, sigma, eps):
        modules = nnx.merge(shared_def, params[0]), nnx.merge(block_defs[0], params[1])
        losses = denoising_losses(*modules, images, labels, sigma, eps, sigma_data=config.sigma_data)
        loss, errors = weighted_loss(losses.each, losses.weight, "per_sample"), losses.each
        z = images + sigma[:, None, None, None] * eps
        return loss, (errors, denoise(*modules, labels, z, sigma, sigma_data=config.sigma_data))

    for b, block in enumerate(blocks):

        def named(of_shared, of_block, b=b):
            grads = [jax.tree.map(jnp.zeros_like, block) for block in blocks]
            grads[b] = of_block
            merged = {f"block_{i}": nnx.merge(block_defs[0], grad) for i, grad in enumerate(grads)}
            return to_reference_dit({"shared": nnx.merge(shared_def, of_shared)} | merged)

        at = golden.under(arrays, "plain/" if cut == "plain" else f"block{b}/")
        assert_block(arrays, at, config, shared, block, loss_fn, named)


@pytest.mark.parametrize("path", golden.files("dit_*.npz"))
def test_guided_sampler(path):
    arrays, config, parts = load(path)
    run = golden.under(arrays, "sampler/")
    noise, labels, scale = NoiseDistribution(), jnp.asarray(run["labels"]), float(run["guidance"])
    sigmas = inference_sigmas(noise, len(run["sigmas"]))
    np.testing.assert_allclose(sigmas, run["sigmas"], rtol=1e-6)
    shared_def, shared = nnx.split(parts["shared"])
    split = [nnx.split(parts[f"block_{b}"]) for b in range(config.num_blocks)]

    @jax.jit
    def estimate(shared, block, z, sigma):
        modules = nnx.merge(shared_def, shared), nnx.merge(split[0][0], block)
        return guided(*modules, labels, z, jnp.full(len(labels), sigma), sigma_data=config.sigma_data, scale=scale)

    z = sigmas[0].astype(np.float32) * nhwc(run["unit_noise_nchw"])
    trajectory, estimates = [z], []
    steps = solve(lambda b, z, sigma: estimate(shared, split[b][1], z, sigma), z, sigmas, list(run["blocks"]), "euler")
    for denoised, z_next in steps:
        estimates.append(denoised)
        trajectory.append(z_next)
    # Each state by itself: the first is a thousand times as large as the last.
    for name, ours in (("trajectory_nchw", trajectory), ("denoised_nchw", estimates)):
        for index, (actual, expected) in enumerate(zip(ours, run[name], strict=True)):
            golden.assert_close(nchw(actual), expected, 1e-5, f"{name} {index}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.1.attn.proj.bias"), "lack blocks.1.attn.proj.bias"),
        (lambda w: w.update({"blocks.0.attn.scale": np.ones(3)}), "does not have: blocks.0.attn.scale"),
        (lambda w: w.update({"final_layer.linear.weight": np.ones((18, 12))}), r"final_layer.linear.weight \(18, 12\)"),
        (lambda w: w.update({"pos_embed": w["pos_embed"][..., ::-1]}), "pos_embed is not the fixed"),
        (lambda w: w.update({"pos_embed": w["pos_embed"][:, :3]}), "pos_embed is not the fixed"),
        (lambda w: w.update({"x_embedder.proj.weight": np.ones((12, 9))}), "must have 4 axes"),
        (lambda w: w.pop("pos_embed"), "lack pos_embed"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message):
    weights = to_reference_dit(make_dit(TINY, 2, isolated=False, rngs=nnx.Rngs(0)))
    weights["pos_embed"] = sincos_positions(2, 12)[None]
    config = SimpleNamespace(num_heads=3, num_blocks=2)
    from_reference_dit(weights, config)
    change(weights)
    with pytest.raises(UserError, match=message):
        from_reference_dit(weights, config)


def test_isolated_blocks_have_no_place_in_one_reference():
    with pytest.raises(UserError, match="isolated"):
        to_reference_dit(make_dit(TINY, 2, isolated=True, rngs=nnx.Rngs(0)))


def params_of(module) -> dict[str, np.ndarray]:
    flat = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(value) for path, value in flat}


def test_parts_by_name_and_alike_in_structure():
    together, isolated = (make_dit(TINY, 2, isolated=isolated, rngs=nnx.Rngs(0)) for isolated in (False, True))
    assert list(together) == ["shared", "block_0", "block_1"]
    assert list(isolated) == ["shared_0", "block_0", "shared_1", "block_1"]
    for parts in (together, isolated):
        for kind in ("shared", "block"):
            alike = [part for name, part in parts.items() if name.startswith(kind)]
            assert all(nnx.graphdef(part) == nnx.graphdef(alike[0]) for part in alike)
            values = [params_of(part) for part in alike]
            name = "labels" if kind == "shared" else "layers.0.mlp.output.kernel"
            assert len({value[name].tobytes() for value in values}) == len(values)
        # Nothing but parameters: positions are no state, so a part splits into structure and parameters.
        assert all(nnx.split(part, nnx.Param) for part in parts.values())


def test_parameter_count_of_the_cifar_model():
    """DiT-S/2, by hand: 12 layers of 4 d^2 + 2 d m + 6 d^2 weights and 11 d + m biases."""
    d, m, labels, pixels = 384, 1536, 10, 12
    layer = 10 * d * d + 2 * d * m + 11 * d + m
    shared = (pixels * d + d) + (256 * d + d) + (d * d + d) + (labels + 1) * d + (2 * d * d + 2 * d) + pixels * (d + 1)
    arch = DiTArchitecture(32, 3, labels, 2, 12, d, 6, m)
    parts = nnx.eval_shape(lambda: nnx.Dict(make_dit(arch, 3, isolated=False, rngs=nnx.Rngs(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(parts, nnx.Param))) == shared + 12 * layer
    assert round((shared + 12 * layer) / 1e6) == 32


def test_parameters_start_as_the_reference_starts_them():
    """Zero biases, modulations and final layer; 0.02 for classes and noise level; else uniform, Xavier's bound."""
    arch = DiTArchitecture(16, 3, 50, 4, 1, 120, 4, 200)
    for part in make_dit(arch, 1, isolated=False, rngs=nnx.Rngs(0)).values():
        for name, value in params_of(part).items():
            if name.endswith("bias") or "modulation" in name or name.startswith("head"):
                assert not value.any(), name
            elif name == "labels" or name.startswith("noise"):
                assert np.std(value) == pytest.approx(0.02, rel=0.05), name
            else:
                bound = np.sqrt(6 / sum(value.shape))
                assert 0.99 * bound < np.max(np.abs(value)) <= bound, name
                assert np.std(value) == pytest.approx(bound / np.sqrt(3), rel=0.05), name


def test_a_fresh_block_is_the_identity_and_answers_zero(key):
    parts = make_dit(TINY, 2, isolated=False, rngs=nnx.Rngs(0))
    shared, block = parts["shared"], parts["block_1"]
    z, c_noise, labels = jax.random.normal(key, (2, 6, 6, 1)), jnp.array([0.1, -2.0]), jnp.array([0, 3])
    tokens = shared.embed(z)
    np.testing.assert_array_equal(block(tokens, shared.condition(c_noise, labels)), tokens)
    assert not run_block(shared, block, z, c_noise, labels).any()


def opened(key, **changes):
    """(shared, block, sample) of a tiny DiT with all its parameters moved, so that its gates are open."""
    parts = make_dit(dataclasses.replace(TINY, **changes), 2, isolated=False, rngs=nnx.Rngs(0))
    for part in parts.values():
        nnx.update(part, jax.tree.map(lambda p: p + 0.1 * jax.random.normal(key, p.shape), nnx.state(part)))
    sample = jax.random.normal(key, (2, 6, 6, 1)), jnp.array([0.3, -1.0]), jnp.array([1, 3])
    return parts["shared"], parts["block_0"], sample


def test_tokens_are_read_back_where_they_were_cut(key):
    """Where each token is its patch and the final layer hands tokens on, the image comes back (but for the norm)."""
    arch = dataclasses.replace(TINY, hidden_size=16, num_heads=2, patch_size=2, channels=4, image_size=6)
    shared = make_dit(arch, 1, isolated=False, rngs=nnx.Rngs(0))["shared"]
    shared.patches.projection.kernel[...] = shared.head.kernel[...] = jnp.eye(16)
    images = jax.random.normal(key, (2, 6, 6, 4))
    back = shared.read_out(shared.patches(images), jnp.zeros((2, 16)))
    for i in range(0, 6, 2):
        for j in range(0, 6, 2):
            patch, again = (np.asarray(x)[:, i : i + 2, j : j + 2].reshape(2, -1) for x in (images, back))
            normal = (patch - patch.mean(1, keepdims=True)) / patch.std(1, keepdims=True)
            np.testing.assert_allclose(again, normal, atol=1e-5)


def test_positions_tell_column_from_row():
    """By hand: column 2 of row 1 in a grid of 3, at frequencies 1 and 1 / 100."""
    expected = [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02), np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)]
    np.testing.assert_allclose(sincos_positions(3, 8)[1 * 3 + 2], expected, rtol=1e-6)


def test_guidance(key):
    """Scale 1 is no guidance, scale 0 the null class, and 3 goes as far beyond as the formula says."""
    shared, block, (z, _, labels) = opened(key)
    sigma = jnp.array([2.0, 0.3])
    estimate = partial(guided, shared, block, labels, z, sigma, sigma_data=0.5)
    conditional = denoise(shared, block, labels, z, sigma, sigma_data=0.5)
    unconditional = denoise(shared, block, jnp.full(2, 3), z, sigma, sigma_data=0.5)
    np.testing.assert_allclose(estimate(scale=1.0), conditional, atol=1e-6)
    np.testing.assert_allclose(estimate(scale=0.0), unconditional, atol=1e-6)
    np.testing.assert_allclose(estimate(scale=3.0), 3 * conditional - 2 * unconditional, atol=1e-5)
    assert not np.allclose(conditional[0], unconditional[0], atol=1e-3)
    np.testing.assert_allclose(conditional[1], unconditional[1], atol=1e-6)  # its label is the null class


def value_and_grad(key, **changes):
    shared, block, (z, c_noise, labels) = opened(key, **changes)
    graphdef, params = nnx.split(block)
    return jax.jit(
        jax.value_and_grad(
            lambda params, z: jnp.sum(run_block(shared, nnx.merge(graphdef, params), z, c_noise, labels) ** 3),
            argnums=(0, 1),
        )
    )(params, z)


def test_gradient_checkpointing_changes_no_value(key):
    (value, grads), (again, grads_again) = value_and_grad(key), value_and_grad(key, gradient_checkpointing=True)
    np.testing.assert_allclose(value, again, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max())


@pytest.mark.long
def test_bfloat16_computes_the_same_within_its_digits(key):
    """bfloat16 has 8 bits of mantissa. Parameters, gradients and the answer stay float32."""
    shared, block, sample = opened(key, dtype="bfloat16")
    half, whole = run_block(shared, block, *sample), run_block(*opened(key)[:2], *sample)
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, whole, atol=0.05 * float(np.abs(whole).max()))
    assert not np.array_equal(half, whole)
    (_, grads), (_, exact) = value_and_grad(key, dtype="bfloat16"), value_and_grad(key)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, atol=0.1 * np.abs(b).max())

"""Both transformers: sizes, initial behaviour and invariances."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dblocks_jax.models.dblock_vit import make_dblock_vit, normalize_rows, run_block
from dblocks_jax.models.layers import Attention, ConditionedLayer, Layer, sinusoidal_features
from dblocks_jax.models.primitives import (
    affine,
    attend,
    dropout,
    gelu,
    gelu_tanh,
    normalize_features,
    normalize_modulated,
    once,
)
from dblocks_jax.models.vit import Architecture, ViT, pool_tokens

TINY = Architecture(
    image_size=8, channels=3, num_labels=5, patch_size=4, num_layers=4, hidden_size=12, num_heads=3,
    intermediate_size=20, dropout_rate=0.0, pool="cls",
)  # fmt: skip


def count(module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def test_parameter_counts_of_the_cifar_models():
    """By hand: 12 layers of 4 d^2 + 2 d m weights, biases and norms; conditioned ones add 6d(d/6) + 6d each."""
    d, m, labels, k = 128, 3072, 100, 128 // 6
    layer = 4 * (d * d + d) + (d * m + m) + (m * d + d) + 4 * d
    common = (48 * d + d) + 65 * d + 2 * d + (labels * d + labels)
    arch = Architecture(32, 3, labels, 4, 12, d, 4, m, 0.1, "cls")
    plain = nnx.eval_shape(lambda: ViT(arch, rngs=nnx.Rngs(0)))
    assert count(plain) == common + d + 12 * layer
    assert round(count(plain) / 1e6, 1) == 10.3

    def parts_of_dblock():
        model = make_dblock_vit(arch, 3, rngs=nnx.Rngs(0))
        return model.shared, nnx.List(model.blocks)

    parts = nnx.eval_shape(parts_of_dblock)
    noise = (256 * k + k) + (k * k + k)
    conditioned = common + labels * d + noise + (2 * d * k + 2 * d) + 12 * (layer + 6 * d * k + 6 * d)
    assert sum(count(part) for part in parts) == conditioned
    assert round(conditioned / 1e6, 1) == 10.5


@pytest.mark.parametrize("first_only", [False, True])
def test_with_open_gates_a_fresh_layer_is_a_plain_one(key, first_only):
    """The same weights without modulation give the same tokens, at whatever noise level."""
    layer = ConditionedLayer(12, 3, 20, 0.0, open_gates=True, dtype="float32", rngs=nnx.Rngs(0))
    plain = Layer(12, 3, 20, 0.0, dtype="float32", rngs=nnx.Rngs(0))
    x, cond = jax.random.normal(key, (2, 5, 12)), jax.random.normal(key, (2, 2))
    expected = plain(x, None, first_only)
    assert not np.allclose(expected, x[:, : expected.shape[1]])
    np.testing.assert_allclose(layer(x, cond, None, first_only), expected, rtol=1e-5, atol=1e-6)


def test_a_fresh_block_is_the_identity_and_knows_nothing(key):
    """Gates start at 0, so the layers add nothing; the head starts at 0, so every label is as likely."""
    model = make_dblock_vit(TINY, 2, rngs=nnx.Rngs(0))
    images, z = jax.random.normal(key, (2, 8, 8, 3)), jax.random.normal(key, (2, 12))
    tokens = model.shared.embed(images, z, None)
    cond = model.shared.noise(jnp.array([0.1, -2.0]))
    np.testing.assert_array_equal(model.blocks[0](tokens, cond, None), tokens[:, :1])  # the label token is all it reads
    assert not model.shared.classify(z, cond).any()


def test_blocks_start_different_but_alike_in_structure():
    first, second = make_dblock_vit(TINY, 2, rngs=nnx.Rngs(0)).blocks
    assert nnx.graphdef(first) == nnx.graphdef(second)
    kernels = [block.layers[0].mlp.output.kernel[...] for block in (first, second)]
    assert not np.array_equal(*kernels)


def test_attention_does_not_care_about_the_order_of_tokens(key):
    attention = Attention(12, 3, 0.0, dtype="float32", rngs=nnx.Rngs(0))
    x = jax.random.normal(key, (1, 5, 12))
    order = jnp.array([3, 0, 4, 2, 1])
    np.testing.assert_allclose(attention(x[:, order], None), attention(x, None)[:, order], atol=1e-6)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_pooling(pool, key):
    tokens = jax.random.normal(key, (2, 5, 3))
    expected = tokens[:, 0] if pool == "cls" else tokens[:, 1:].sum(axis=1) / 4
    np.testing.assert_allclose(pool_tokens(tokens, pool), expected, rtol=1e-5)


def test_dropout_keeps_the_mean_and_the_rate(key):
    x = jnp.ones((200, 500))
    dropped = np.asarray(dropout(x, 0.1, key))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.9)}
    kept = np.mean(dropped > 0)  # 100,000 draws: standard deviation 0.00095
    assert abs(kept - 0.9) < 0.004
    assert dropout(x, 0.1, None) is x


def test_dropout_reaches_the_plain_model_and_only_with_a_key(key):
    arch = Architecture(**(vars(TINY) | {"dropout_rate": 0.5}))
    model = ViT(arch, rngs=nnx.Rngs(0))
    images = jax.random.normal(key, (1, 8, 8, 3))
    np.testing.assert_array_equal(model(images), model(images))
    assert not np.allclose(model(images, key), model(images, jax.random.key(1)))


@pytest.mark.parametrize(
    ("silenced", "place"),
    [
        ({"attention": 0.0, "layer": 0.0}, "the embeddings"),
        ({"embedding": 0.0, "layer": 0.0}, "the attention's probabilities"),
        ({"embedding": 0.0, "attention": 0.0}, "the branches' outputs"),
        ({"embedding": 0.0, "attention": 0.0, "layer": 0.0}, "nowhere"),
    ],
)
def test_dropout_has_its_places_in_a_block(silenced, place, key):
    """All places but one are switched off: two keys then differ exactly where one is left."""
    arch = Architecture(**(vars(TINY) | {"dropout_rate": 0.5}))
    model = make_dblock_vit(arch, 2, rngs=nnx.Rngs(0))
    block = model.blocks[0]
    model.shared.dropout_rate = silenced.get("embedding", 0.5)
    for layer in block.layers:
        layer.dropout_rate = silenced.get("layer", 0.5)
        layer.attention.dropout_rate = silenced.get("attention", 0.5)
        layer.modulation.linear.bias[...] = jnp.ones_like(layer.modulation.linear.bias[...])  # opens the gates
    images, z = jax.random.normal(key, (1, 8, 8, 3)), jax.random.normal(key, (1, 12))
    one, other = (run_block(model.shared, block, images, z, jnp.zeros(1), jax.random.key(k))[0] for k in (1, 2))
    assert np.allclose(one, other) == (place == "nowhere")


@pytest.mark.parametrize("branch", ["attention", "mlp"])
def test_dropout_follows_both_branches(branch, key):
    """With the other branch's gate closed, half of what a layer adds is zero and the rest is doubled."""
    arch = Architecture(**(vars(TINY) | {"dropout_rate": 0.5}))
    layer = make_dblock_vit(arch, 2, rngs=nnx.Rngs(0)).blocks[0].layers[0]
    layer.attention.dropout_rate = 0.0
    gate = {"attention": 2, "mlp": 5}[branch]
    open_gate = jnp.zeros((6, 12)).at[gate].set(3.0).reshape(-1)
    layer.modulation.linear.bias[...] = open_gate
    x, cond = jax.random.normal(key, (4, 5, 12)), jnp.zeros((4, 2))
    plain = layer(x, cond, None) - x
    dropped = np.asarray(layer(x, cond, key) - x)
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], 2 * np.asarray(plain)[kept], rtol=1e-3, atol=1e-6)
    assert abs(kept.mean() - 0.5) < 0.13  # 240 draws: standard deviation 0.03


@pytest.mark.parametrize("make", [ViT, lambda arch, rngs: make_dblock_vit(arch, 1, rngs=rngs).shared])
def test_weights_start_normal_with_deviation_two_hundredths_and_biases_at_zero(make):
    arch = Architecture(32, 3, 50, 4, 1, 120, 4, 200, 0.1, "cls")
    flat = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(make(arch, rngs=nnx.Rngs(0)), nnx.Param)))
    for path, value in flat:
        name = jax.tree_util.keystr(path)
        if name.endswith("['scale']"):
            assert np.all(value == 1), name
        elif name.endswith("['bias']") or "modulation" in name or (make is not ViT and "['head']" in name):
            assert np.all(value == 0), name
        else:
            assert np.std(value) == pytest.approx(0.02, rel=0.3 if value.size < 1000 else 0.1), name


def test_gradient_checkpointing_changes_no_value(key):
    """Same dropout, same output, same gradients, computed twice."""
    images, z = jax.random.normal(key, (2, 8, 8, 3)), jax.random.normal(key, (2, 12))

    def value_and_grad(remat: bool):
        arch = Architecture(**(vars(TINY) | {"dropout_rate": 0.3, "gradient_checkpointing": remat}))
        model = make_dblock_vit(arch, 2, rngs=nnx.Rngs(0))
        shared, (graphdef, params) = model.shared, nnx.split(model.blocks[0])
        # Open the gates: at their zero start the layers would add nothing to compare.
        params = jax.tree.map(lambda p: p + 0.05, params)
        return jax.jit(
            jax.value_and_grad(
                lambda p: jnp.sum(run_block(shared, nnx.merge(graphdef, p), images, z, jnp.zeros(2), key)[0] ** 3)
            )
        )(params)

    (plain, plain_grads), (remat, remat_grads) = value_and_grad(False), value_and_grad(True)
    np.testing.assert_allclose(plain, remat, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(plain_grads), jax.tree.leaves(remat_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max())


def loss_of_first_token(arch: Architecture, key):
    """(value, gradients) of a function of the first token after one block with open gates and dropout off."""
    model = make_dblock_vit(arch, 2, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model.blocks[0])
    params = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(key, p.shape), params)
    tokens, cond = jax.random.normal(key, (2, 5, 12)), jnp.ones((2, 2))

    def loss(params, tokens):
        return jnp.sum(nnx.merge(graphdef, params)(tokens, cond, None)[:, 0] ** 3)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, tokens)


def test_computing_only_the_token_that_is_read_changes_nothing(key):
    """Mean pooling makes the block compute all tokens: its first one, and what it asks of the rest, are the same."""
    (value, grads), (value_of_all, grads_of_all) = (
        loss_of_first_token(Architecture(**(vars(TINY) | {"pool": pool})), key) for pool in ("cls", "mean")
    )
    np.testing.assert_allclose(value, value_of_all, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_of_all), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 7), (7, 3)])
def test_the_dense_layers_own_backward_pass(inputs, outputs, key):
    """Against the derivative that JAX finds by itself; both orders of its product."""
    x, kernel, bias = (jax.random.normal(key, shape) for shape in ((2, 5, inputs), (inputs, outputs), (outputs,)))

    def cubed(layer):
        return jax.grad(lambda *args: jnp.sum(layer(*args) ** 3), argnums=(0, 1, 2))(x, kernel, bias)

    def plain(x, kernel, bias):
        return jnp.einsum("bti,io->bto", x, kernel) + bias[None, None]

    for ours, theirs in zip(cubed(affine), cubed(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA for CPUs makes of it")
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 128), (128, 16)])
def test_no_product_of_the_backward_pass_is_over_the_rows_of_its_left_operand(inputs, outputs):
    """For such products XLA for CPUs has a slow routine alone, which its own choice of layout would take."""
    x, kernel, bias = jnp.ones((256, inputs)), jnp.ones((inputs, outputs)), jnp.ones(outputs)

    def gradients(x, kernel, bias):
        return jax.grad(lambda *args: jnp.sum(affine(*args) ** 2), (0, 1, 2))(x * 2, kernel, bias)

    program = jax.jit(gradients).lower(x, kernel, bias).compile().as_text()
    products = re.findall(r"lhs_contracting_dims={([0-9,]*)}", program)
    assert len(products) == 3 and set(products) == {"1"}


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_layer_norm_and_its_own_backward_pass(offset, key):
    """Against the formula and its derivative in float64, also for rows whose mean is 300 times their deviation."""
    x = jax.random.normal(key, (2, 5, 16)) + offset
    scale, bias = jax.random.normal(jax.random.fold_in(key, 1), (2, 16))
    with jax.enable_x64():

        def formula(x, scale, bias):
            centred = x - jnp.mean(x, -1, keepdims=True)
            normal = centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-12)
            return normal * scale[None, None] + bias[None, None]

        exact = [jnp.asarray(np.asarray(array), jnp.float64) for array in (x, scale, bias)]
        value = formula(*exact)
        slopes = jax.grad(lambda *args: jnp.sum(formula(*args) ** 3), argnums=(0, 1, 2))(*exact)
    tolerance = 1e-5 if offset == 0.0 else 1e-3  # float32 knows the rows to 1e-7 of their mean
    np.testing.assert_allclose(normalize_features(x, scale, bias), value, rtol=tolerance, atol=tolerance)
    ours = jax.grad(lambda *args: jnp.sum(normalize_features(*args) ** 3), argnums=(0, 1, 2))(x, scale, bias)
    for a, b in zip(ours, slopes, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_modulated_norm_and_its_own_backward_pass(size, key):
    """Against the formula and its derivative in float64, also for rows as small as the epsilon."""
    x = size * jax.random.normal(key, (2, 5, 16))
    shift, scale = jax.random.normal(jax.random.fold_in(key, 1), (2, 2, 16))
    with jax.enable_x64():

        def formula(x, shift, scale):
            centred = x - jnp.mean(x, -1, keepdims=True)
            normal = centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-6)
            return normal * (1 + scale[:, None]) + shift[:, None]

        exact = [jnp.asarray(np.asarray(array), jnp.float64) for array in (x, shift, scale)]
        value = formula(*exact)
        slopes = jax.grad(lambda *args: jnp.sum(formula(*args) ** 3), argnums=(0, 1, 2))(*exact)
    np.testing.assert_allclose(normalize_modulated(x, shift, scale), value, rtol=1e-5, atol=1e-5)
    ours = jax.grad(lambda *args: jnp.sum(normalize_modulated(*args) ** 3), argnums=(0, 1, 2))(x, shift, scale)
    for a, b in zip(ours, slopes, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_what_comes_once_something_is_there_is_the_same(key):
    """And really waits for it: on a CPU a NaN, which is no number to wait for, is seen."""
    x, there = jax.random.normal(key, (2, 3, 4))
    np.testing.assert_array_equal(jax.jit(once)(there, x)[1], x)
    np.testing.assert_array_equal(jax.jit(once)(there, x)[0], there)
    if jax.default_backend() == "cpu":
        assert not np.array_equal(jax.jit(once)(there.at[0, 0].set(jnp.nan), x)[1], x)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_attention_in_bfloat16_agrees_within_its_digits(rate, key):
    """Values and gradients, with dropout on the probabilities: 8 bits of mantissa, sums in float32."""
    q, k, v = (jax.random.normal(jax.random.fold_in(key, i), (2, 6, 3, 8)) for i in range(3))
    keep = jax.random.bernoulli(key, 1 - rate, (2, 3, 6, 6)) if rate else None

    def both(dtype):
        arrays = [array.astype(dtype) for array in (q, k, v)]
        loss = lambda q, k, v: jnp.sum(attend(q, k, v, keep, rate).astype(jnp.float32) ** 2)  # noqa: E731
        return jax.value_and_grad(loss, argnums=(0, 1, 2))(*arrays)

    for a, b in zip(jax.tree.leaves(both(jnp.bfloat16)), jax.tree.leaves(both(jnp.float32)), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=2**-5 * float(np.abs(b).max()))


def test_gelu_and_its_derivative(key):
    """Against the normal distribution in float64: x P(x) and P(x) + x p(x)."""
    from scipy.stats import norm

    x = jnp.concatenate([jnp.linspace(-6, 6, 49), jnp.array([-40.0, 40.0])])
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(gelu(x), exact * norm.cdf(exact), rtol=1e-6, atol=1e-6)
    slope = jax.vmap(jax.grad(gelu))(x)
    np.testing.assert_allclose(slope, norm.cdf(exact) + exact * norm.pdf(exact), rtol=1e-6, atol=1e-6)


def test_gelu_by_tanh_and_its_derivative():
    """Against JAX's own, and its derivative as JAX finds it, in float64."""
    x = jnp.concatenate([jnp.linspace(-6, 6, 49), jnp.array([-40.0, 40.0])])
    with jax.enable_x64():
        exact = jnp.asarray(np.asarray(x), jnp.float64)
        value, slope = (jax.vmap(f)(exact) for f in (jax.nn.gelu, jax.grad(jax.nn.gelu)))
    np.testing.assert_allclose(gelu_tanh(x), value, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu_tanh))(x), slope, rtol=1e-6, atol=1e-6)
    assert not np.allclose(gelu_tanh(x), gelu(x), atol=1e-4)


def test_attentions_own_backward_pass(key):
    """With dropout on its probabilities, against the derivative that JAX finds of the formula written out."""
    q, k, v = (jax.random.normal(jax.random.fold_in(key, i), (2, 4, 3, 5)) for i in range(3))
    keep = jax.random.bernoulli(key, 0.7, (2, 3, 4, 4))

    def plain(q, k, v):
        scores = jnp.einsum("bqhw,bthw->bhqt", q, k) / np.sqrt(5)
        probs = jnp.exp(scores) / jnp.sum(jnp.exp(scores), axis=-1, keepdims=True)
        return jnp.einsum("bhqt,bthw->bqhw", probs * keep / 0.7, v)

    def cubed(function):
        return jax.value_and_grad(lambda *args: jnp.sum(function(*args) ** 3), argnums=(0, 1, 2))(q, k, v)

    ours, theirs = cubed(lambda q, k, v: attend(q, k, v, keep, 0.3)), cubed(plain)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


@pytest.mark.long
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_bfloat16_computes_the_same_within_its_digits(pool, key):
    """bfloat16 has 8 bits of mantissa. Parameters, gradients and what leaves the transformer stay float32."""
    (value, (grads, _)), (exact, (exact_grads, _)) = (
        loss_of_first_token(Architecture(**(vars(TINY) | {"pool": pool, "dtype": dtype})), key)
        for dtype in ("bfloat16", "float32")
    )
    np.testing.assert_allclose(np.float32(value), exact, rtol=0.05)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(exact_grads), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, atol=0.05 * np.abs(b).max())
    model = make_dblock_vit(Architecture(**(vars(TINY) | {"pool": pool, "dtype": "bfloat16"})), 2, rngs=nnx.Rngs(0))
    features, cond = run_block(model.shared, model.blocks[0], jnp.ones((1, 8, 8, 3)), jnp.ones((1, 12)), jnp.ones(1))
    assert features.dtype == cond.dtype == np.float32


def test_noise_features_are_cosines_then_sines():
    features = sinusoidal_features(jnp.array([0.0, 1.5]))
    np.testing.assert_allclose(features[0], np.repeat([1.0, 0.0], 128), atol=1e-7)
    np.testing.assert_allclose(features[1, [0, 128]], [np.cos(1.5), np.sin(1.5)], rtol=1e-6)
    slowest = 1.5 * 10_000 ** (-127 / 128)
    np.testing.assert_allclose(features[1, 255], np.sin(slowest), rtol=1e-4)


def test_targets_have_unit_norm_and_a_zero_row_no_nan():
    table = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(normalize_rows(table)[0], [0.6, 0.8], rtol=1e-6)
    gradient = jax.grad(lambda t: normalize_rows(t).sum())(table)
    assert np.isfinite(gradient).all()

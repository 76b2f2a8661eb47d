"""Building blocks of both vision transformers. Every dropout takes an explicit key; no key means no dropout."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

# The reference cuts its normal(0.02) draws at +-2.0, which is 100 standard deviations: no cut at all.
init_weights = nnx.initializers.normal(0.02)
init_zeros = nnx.initializers.zeros

NOISE_FEATURES = 256
MAX_PERIOD = 10_000


def linear(features_in: int, features_out: int, *, rngs: nnx.Rngs, init=init_weights) -> nnx.Linear:
    """A dense layer as both models initialise it: normal(0.02) weights, zero bias."""
    return nnx.Linear(features_in, features_out, kernel_init=init, rngs=rngs)


def layer_norm(features: int, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm with the reference's epsilon; the two-pass variance keeps its digits at epsilon 1e-12."""
    return nnx.LayerNorm(features, epsilon=1e-12, use_fast_variance=False, rngs=rngs)


def dropout(x: Array, rate: float, key: Key[Array, ""] | None) -> Array:
    """Zero each entry with probability `rate` and rescale the rest; the identity without a key or at rate 0."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0)


def split_key(key: Key[Array, ""] | None, count: int) -> list[Key[Array, ""] | None]:
    """`count` independent keys, or as many Nones."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def modulate(
    x: Float[Array, "b *t d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]
) -> Float[Array, "b *t d"]:
    """x * (1 + scale) + shift, the same for every token of a sample."""
    if x.ndim == 3:
        shift, scale = shift[:, None], scale[:, None]
    return x * (1 + scale) + shift


def sinusoidal_features(c_noise: Float[Array, " b"]) -> Float[Array, "b 256"]:
    """cos and sin (in this order) of c_noise at 128 frequencies from 1 down to 1 / 10000."""
    half = NOISE_FEATURES // 2
    frequencies = jnp.exp(-jnp.log(float(MAX_PERIOD)) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = c_noise[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class PatchEmbedding(nnx.Module):
    """Cut an image into square patches and project each: a strided convolution, written as one matrix product."""

    def __init__(self, patch_size: int, channels: int, hidden_size: int, *, rngs: nnx.Rngs):
        self.patch_size = patch_size
        self.projection = linear(patch_size * patch_size * channels, hidden_size, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b t d"]:
        b, h, w, c = images.shape
        p = self.patch_size
        patches = images.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
        return self.projection(patches.reshape(b, (h // p) * (w // p), p * p * c))


class NoiseEmbedding(nnx.Module):
    """c_noise -> conditioning vector of hidden_size // 6: sinusoidal features, then two dense layers with SiLU."""

    def __init__(self, hidden_size: int, *, rngs: nnx.Rngs):
        self.linear_1 = linear(NOISE_FEATURES, hidden_size // 6, rngs=rngs)
        self.linear_2 = linear(hidden_size // 6, hidden_size // 6, rngs=rngs)

    def __call__(self, c_noise: Float[Array, " b"]) -> Float[Array, "b k"]:
        return nnx.silu(self.linear_2(nnx.silu(self.linear_1(sinusoidal_features(c_noise)))))


class Modulation(nnx.Module):
    """Conditioning vector -> `chunks` vectors of width `hidden_size` (adaLN): SiLU after a zero-initialised layer."""

    def __init__(self, hidden_size: int, chunks: int, *, rngs: nnx.Rngs):
        self.chunks = chunks
        self.linear = linear(hidden_size // 6, chunks * hidden_size, rngs=rngs, init=init_zeros)

    def __call__(self, cond: Float[Array, "b k"]) -> list[Float[Array, "b d"]]:
        return jnp.split(nnx.silu(self.linear(cond)), self.chunks, axis=-1)


class Attention(nnx.Module):
    """Multi-head self-attention with dropout on its probabilities."""

    def __init__(self, hidden_size: int, num_heads: int, dropout_rate: float, *, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.dropout_rate = dropout_rate
        self.query_key_value = linear(hidden_size, 3 * hidden_size, rngs=rngs)
        self.output = linear(hidden_size, hidden_size, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"], key: Key[Array, ""] | None) -> Float[Array, "b t d"]:
        b, t, d = x.shape
        qkv = self.query_key_value(x).reshape(b, t, 3, self.num_heads, d // self.num_heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(float(d // self.num_heads))
        probs = dropout(jax.nn.softmax(scores, axis=-1), self.dropout_rate, key)
        return self.output(jnp.einsum("bhqk,bkhd->bqhd", probs, v).reshape(b, t, d))


class Mlp(nnx.Module):
    """Dense, exact GELU, dense."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, rngs: nnx.Rngs):
        self.intermediate = linear(hidden_size, intermediate_size, rngs=rngs)
        self.output = linear(intermediate_size, hidden_size, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.output(jax.nn.gelu(self.intermediate(x), approximate=False))


class Layer(nnx.Module):
    """One pre-norm transformer layer; a conditioned one shifts, scales and gates both branches by the noise level."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        dropout_rate: float,
        *,
        conditioned: bool,
        rngs: nnx.Rngs,
    ):
        self.dropout_rate = dropout_rate
        self.norm_attention = layer_norm(hidden_size, rngs=rngs)
        self.attention = Attention(hidden_size, num_heads, dropout_rate, rngs=rngs)
        self.norm_mlp = layer_norm(hidden_size, rngs=rngs)
        self.mlp = Mlp(hidden_size, intermediate_size, rngs=rngs)
        self.modulation = Modulation(hidden_size, 6, rngs=rngs) if conditioned else None

    def __call__(
        self, x: Float[Array, "b t d"], cond: Float[Array, "b k"] | None, key: Key[Array, ""] | None
    ) -> Float[Array, "b t d"]:
        key_probs, key_attention, key_mlp = split_key(key, 3)

        if self.modulation is None:
            x = x + dropout(self.attention(self.norm_attention(x), key_probs), self.dropout_rate, key_attention)
            return x + dropout(self.mlp(self.norm_mlp(x)), self.dropout_rate, key_mlp)

        assert cond is not None
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(cond)
        attended = self.attention(modulate(self.norm_attention(x), shift_a, scale_a), key_probs)
        x = x + gate_a[:, None] * dropout(attended, self.dropout_rate, key_attention)
        mixed = self.mlp(modulate(self.norm_mlp(x), shift_m, scale_m))
        return x + gate_m[:, None] * dropout(mixed, self.dropout_rate, key_mlp)


class Block(nnx.Module):
    """Consecutive layers: what one DiffusionBlocks step trains, or the whole trunk of a plain transformer.

    With `remat` each layer keeps only its input for the backward pass and computes the rest again.
    """

    def __init__(self, layers: list[Layer], *, remat: bool = False):
        self.layers = nnx.List(layers)
        self.remat = remat

    def __call__(
        self, x: Float[Array, "b t d"], cond: Float[Array, "b k"] | None, key: Key[Array, ""] | None
    ) -> Float[Array, "b t d"]:
        def apply(layer: Layer, x, cond, key):
            return layer(x, cond, key)

        apply = jax.checkpoint(apply) if self.remat else apply
        for layer, layer_key in zip(self.layers, split_key(key, len(self.layers)), strict=True):
            x = apply(layer, x, cond, layer_key)
        return x

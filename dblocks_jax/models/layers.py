"""The layers of the vision transformers. Every dropout takes an explicit key; no key means no dropout."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from dblocks_jax.models.chunks import mlp_by_units, self_attend
from dblocks_jax.models.primitives import (
    DENSE_OUTPUT,
    KEPT,
    LayerNorm,
    Linear,
    attend,
    draw_kept,
    dropout,
    gelu,
    init_weights,
    init_zeros,
    split_key,
)

NOISE_FEATURES = 256
MAX_PERIOD = 10_000
SILU_IS_ONE = 1.278464542761074  # silu of it is 1
GATES = (2, 5)  # of the six vectors of a conditioned layer


def modulate(
    x: Float[Array, "b *t d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]
) -> Float[Array, "b *t d"]:
    """x * (1 + scale) + shift, the same for every token of a sample."""
    if x.ndim == 3:
        shift, scale = shift[:, None], scale[:, None]
    return x * (1 + scale).astype(x.dtype) + shift.astype(x.dtype)


def sinusoidal_features(c_noise: Float[Array, " b"]) -> Float[Array, "b 256"]:
    """cos and sin (in this order) of c_noise at 128 frequencies from 1 down to 1 / 10000."""
    half = NOISE_FEATURES // 2
    frequencies = jnp.exp(-jnp.log(float(MAX_PERIOD)) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = c_noise[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class PatchEmbedding(nnx.Module):
    """Cut an image into square patches and project each: a strided convolution, written as one matrix product."""

    def __init__(
        self, patch_size: int, channels: int, hidden_size: int, *, dtype: str, init=init_weights, rngs: nnx.Rngs
    ):
        self.patch_size = patch_size
        self.projection = Linear(patch_size * patch_size * channels, hidden_size, dtype=dtype, init=init, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b t d"]:
        b, h, w, c = images.shape
        p = self.patch_size
        patches = images.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
        return self.projection(patches.reshape(b, (h // p) * (w // p), p * p * c))


class NoiseEmbedding(nnx.Module):
    """c_noise -> conditioning vector of hidden_size // 6: sinusoidal features, then two dense layers with SiLU."""

    def __init__(self, hidden_size: int, *, rngs: nnx.Rngs):
        self.linear_1 = Linear(NOISE_FEATURES, hidden_size // 6, rngs=rngs)
        self.linear_2 = Linear(hidden_size // 6, hidden_size // 6, rngs=rngs)

    def __call__(self, c_noise: Float[Array, " b"]) -> Float[Array, "b k"]:
        return nnx.silu(self.linear_2(nnx.silu(self.linear_1(sinusoidal_features(c_noise)))))


class Modulation(nnx.Module):
    """Conditioning vector -> `chunks` vectors of width `hidden_size` (adaLN): SiLU after a zero-initialised layer."""

    def __init__(self, hidden_size: int, chunks: int, *, rngs: nnx.Rngs, ones: tuple[int, ...] = ()):
        """The vectors start at 0, and those numbered in `ones` at 1."""
        self.chunks = chunks
        self.linear = Linear(hidden_size // 6, chunks * hidden_size, rngs=rngs, init=init_zeros)
        if ones:
            bias = self.linear.bias[...].reshape(chunks, hidden_size).at[jnp.array(ones)].set(SILU_IS_ONE)
            self.linear.bias[...] = bias.reshape(-1)

    def __call__(self, cond: Float[Array, "b k"]) -> list[Float[Array, "b d"]]:
        return jnp.split(nnx.silu(self.linear(cond)), self.chunks, axis=-1)


class Attention(nnx.Module):
    """Multi-head self-attention with dropout on its probabilities."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        dropout_rate: float,
        *,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.dropout_rate = dropout_rate
        self.query_key_value = Linear(hidden_size, 3 * hidden_size, dtype=dtype, rngs=rngs)
        self.output = Linear(hidden_size, hidden_size, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t d"], key: Key[Array, ""] | None, first_only: bool = False
    ) -> Float[Array, "b q d"]:
        """What each token reads from all tokens; with `first_only` what the first one reads (q = 1)."""
        b, t, d = x.shape
        heads, rate = (self.num_heads, d // self.num_heads), self.dropout_rate
        if first_only:
            q = self.query_key_value(x[:, :1], slice(0, d)).reshape(b, 1, *heads)
            k, v = jnp.moveaxis(self.query_key_value(x, slice(d, None)).reshape(b, t, 2, *heads), 2, 0)
            keep = draw_kept(rate, key, (b, self.num_heads, 1, t), after=q)
            attended = attend(q, k, v, keep, rate)
        else:
            qkv = self.query_key_value(x).reshape(b, t, 3, *heads)
            keep = draw_kept(rate, key, (b, self.num_heads, t, t), after=qkv)
            attended = self_attend(qkv, keep, rate)
        return self.output(attended.reshape(b, -1, d))


class Mlp(nnx.Module):
    """Dense, the exact GELU, dense; `remat` as in `mlp_by_units`."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, dtype: str, remat: bool, rngs: nnx.Rngs):
        self.dtype = dtype
        self.remat = remat
        self.intermediate = Linear(hidden_size, intermediate_size, dtype=dtype, rngs=rngs)
        self.output = Linear(intermediate_size, hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        rows = x.astype(self.dtype).reshape(-1, x.shape[-1])
        params = (p[...] for layer in (self.intermediate, self.output) for p in (layer.kernel, layer.bias))
        return checkpoint_name(mlp_by_units(gelu, self.remat, rows, *params), DENSE_OUTPUT).reshape(x.shape)


class Layer(nnx.Module):
    """One pre-norm transformer layer: attention, then an MLP, each added to what it reads."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        dropout_rate: float,
        *,
        remat: bool = False,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        self.dropout_rate = dropout_rate
        self.norm_attention = LayerNorm(hidden_size, dtype=dtype)
        self.attention = Attention(hidden_size, num_heads, dropout_rate, dtype=dtype, rngs=rngs)
        self.norm_mlp = LayerNorm(hidden_size, dtype=dtype)
        self.mlp = Mlp(hidden_size, intermediate_size, dtype=dtype, remat=remat, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t d"], key: Key[Array, ""] | None, first_only: bool = False
    ) -> Float[Array, "b q d"]:
        """All tokens after this layer; with `first_only` the first one alone, at a fraction of the work."""
        key_probs, key_attention, key_mlp = split_key(key, 3)
        kept = x[:, :1] if first_only else x
        attended = self.attention(self.norm_attention(x), key_probs, first_only)
        x = kept + dropout(attended, self.dropout_rate, key_attention)
        return x + dropout(self.mlp(self.norm_mlp(x)), self.dropout_rate, key_mlp)


class ConditionedLayer(nnx.Module):
    """A layer whose two branches are shifted, scaled and gated by the noise level."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        dropout_rate: float,
        *,
        open_gates: bool = False,
        remat: bool = False,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        self.dropout_rate = dropout_rate
        self.norm_attention = LayerNorm(hidden_size, dtype=dtype)
        self.attention = Attention(hidden_size, num_heads, dropout_rate, dtype=dtype, rngs=rngs)
        self.norm_mlp = LayerNorm(hidden_size, dtype=dtype)
        self.mlp = Mlp(hidden_size, intermediate_size, dtype=dtype, remat=remat, rngs=rngs)
        self.modulation = Modulation(hidden_size, 6, rngs=rngs, ones=GATES if open_gates else ())

    def __call__(
        self,
        x: Float[Array, "b t d"],
        cond: Float[Array, "b k"],
        key: Key[Array, ""] | None,
        first_only: bool = False,
    ) -> Float[Array, "b q d"]:
        """All tokens after this layer; with `first_only` the first one alone, at a fraction of the work."""
        key_probs, key_attention, key_mlp = split_key(key, 3)
        kept = x[:, :1] if first_only else x
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(cond)
        attended = self.attention(modulate(self.norm_attention(x), shift_a, scale_a), key_probs, first_only)
        gate_a, gate_m = gate_a[:, None].astype(x.dtype), gate_m[:, None].astype(x.dtype)
        x = kept + gate_a * dropout(attended, self.dropout_rate, key_attention)
        mixed = self.mlp(modulate(self.norm_mlp(x), shift_m, scale_m))
        return x + gate_m * dropout(mixed, self.dropout_rate, key_mlp)


def run_layers(
    layers: Sequence[nnx.Module],
    x: Float[Array, "b t d"],
    conditions: tuple[Float[Array, "b k"], ...],
    key: Key[Array, ""] | None,
    *,
    first_only: bool,
    remat: bool,
) -> Float[Array, "b q d"]:
    """The tokens after all layers; each layer is called with (tokens, *conditions, its key, first_only).

    With `remat` each layer keeps only its input for the backward pass and computes the rest again. With `first_only`
    nothing but the first token is read off the result (q = 1), so the last layer computes no other.
    """

    def apply(layer, x, conditions, key, first_only):
        return layer(x, *conditions, key, first_only)

    apply = jax.checkpoint(apply, static_argnums=4, policy=None if remat else KEPT)
    last = len(layers) - 1
    for i, (layer, layer_key) in enumerate(zip(layers, split_key(key, last + 1), strict=True)):
        x = apply(layer, x, conditions, layer_key, first_only and i == last)
    return x


class Trunk(nnx.Module):
    """All layers of a plain transformer, run as `run_layers` says."""

    def __init__(self, layers: list[Layer], *, first_only: bool, remat: bool = False):
        self.layers = nnx.List(layers)
        self.first_only = first_only
        self.remat = remat

    def __call__(self, x: Float[Array, "b t d"], key: Key[Array, ""] | None) -> Float[Array, "b q d"]:
        return run_layers(self.layers, x, (), key, first_only=self.first_only, remat=self.remat)


class Block(nnx.Module):
    """Consecutive conditioned layers, run as `run_layers` says: what one DiffusionBlocks step trains."""

    def __init__(self, layers: list[ConditionedLayer], *, first_only: bool, remat: bool = False):
        self.layers = nnx.List(layers)
        self.first_only = first_only
        self.remat = remat

    def __call__(
        self, x: Float[Array, "b t d"], cond: Float[Array, "b k"], key: Key[Array, ""] | None
    ) -> Float[Array, "b q d"]:
        return run_layers(self.layers, x, (cond,), key, first_only=self.first_only, remat=self.remat)

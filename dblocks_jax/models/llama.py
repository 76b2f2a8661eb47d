"""The plain decoder of text, Llama's: the baseline, trained end to end to tell the next token."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dblocks_jax.models.causal import attend_cached, causal_attend
from dblocks_jax.models.primitives import KEPT, Projection, init_weights
from dblocks_jax.models.rms import RMSNorm, swiglu
from dblocks_jax.models.rotary import BASE, rotate

# Keys and values of each layer, for generation: slot i is the token's at position i.
Cache = list[Float[Array, "b n 2 h w"]]


@dataclass(frozen=True)
class LlamaArchitecture:
    """Sizes in features; twice `num_heads` divides `hidden_size`, since positions turn pairs of features."""

    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    rope_theta: float = BASE
    rms_norm_eps: float = 1e-6
    gradient_checkpointing: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the layers' computation; parameters are float32


class LlamaAttention(nnx.Module):
    """The dense layers around attention, without biases; queries and keys are turned by position."""

    def __init__(self, arch: LlamaArchitecture, *, rngs: nnx.Rngs):
        self.num_heads = arch.num_heads
        self.rope_theta = arch.rope_theta
        width = arch.hidden_size
        self.query_key_value = Projection(width, 3 * width, dtype=arch.dtype, rngs=rngs)
        self.output = Projection(width, width, dtype=arch.dtype, rngs=rngs)

    def queries_keys_values(
        self, x: Float[Array, "b t d"], positions: Int[Array, " t"] | None = None
    ) -> Float[Array, "b t 3 h w"]:
        """Of each token; positions are 0..t-1 where none are given."""
        return self.turned(self.query_key_value(x), 3, positions)

    def turned(self, flat: Float[Array, "b t f"], kinds: int, positions) -> Float[Array, "b t k h w"]:
        """Heads apart, of all three or of keys and values; everything turned but the values, which come last."""
        b, t, features = flat.shape
        width = features // kinds // self.num_heads
        turned, values = jnp.split(flat.reshape(b, t, kinds * self.num_heads, width), [-self.num_heads], axis=2)
        heads = jnp.concatenate([rotate(turned, positions, self.rope_theta), values], axis=2)
        return heads.reshape(b, t, kinds, self.num_heads, width)

    def read_out(self, attended: Float[Array, "b t h w"]) -> Float[Array, "b t d"]:
        return self.output(attended.reshape(*attended.shape[:2], -1))


class LlamaMlp(nnx.Module):
    """Dense to gates and values, SwiGLU, dense, without biases."""

    def __init__(self, arch: LlamaArchitecture, *, rngs: nnx.Rngs):
        self.gate_up = Projection(arch.hidden_size, 2 * arch.intermediate_size, dtype=arch.dtype, rngs=rngs)
        self.down = Projection(arch.intermediate_size, arch.hidden_size, dtype=arch.dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        # As rows, a gradient can take the place of what it is computed from; reshapes in between prevent that.
        rows = x.reshape(-1, x.shape[-1])
        return self.down(swiglu(self.gate_up(rows))).reshape(x.shape)


class LlamaLayer(nnx.Module):
    """One layer: attention, then an MLP, each after a norm and added to what it reads."""

    def __init__(self, arch: LlamaArchitecture, *, rngs: nnx.Rngs):
        self.norm_attention = RMSNorm(arch.hidden_size, arch.rms_norm_eps, dtype=arch.dtype)
        self.attention = LlamaAttention(arch, rngs=rngs)
        self.norm_mlp = RMSNorm(arch.hidden_size, arch.rms_norm_eps, dtype=arch.dtype)
        self.mlp = LlamaMlp(arch, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.prefill(x)[0]

    def prefill(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], Float[Array, "b t 2 h w"]]:
        """(the tokens after this layer, their keys and values)."""
        qkv = self.attention.queries_keys_values(self.norm_attention(x))
        return self._finish(x, causal_attend(qkv)), qkv[:, :, 1:]

    def step(
        self, x: Float[Array, "b 1 d"], cache: Float[Array, "b n 2 h w"], position: Int[Array, ""]
    ) -> tuple[Float[Array, "b 1 d"], Float[Array, "b n 2 h w"]]:
        """The one token at `position`, and the cache with it."""
        qkv = self.attention.queries_keys_values(self.norm_attention(x), position[None])
        attended, cache = attend_cached(qkv, cache, position)
        return self._finish(x, attended), cache

    def _finish(self, x, attended):
        x = x + self.attention.read_out(attended)
        return x + self.mlp(self.norm_mlp(x))


class Llama(nnx.Module):
    """Tokens -> logits of the next token at each position: embeddings -> layers -> norm -> linear, without biases.

    With gradient checkpointing each layer keeps only its input for the backward pass and computes the rest again.
    """

    def __init__(self, arch: LlamaArchitecture, *, rngs: nnx.Rngs):
        self.dtype = arch.dtype
        self.remat = arch.gradient_checkpointing
        self.embeddings = nnx.Param(init_weights(rngs.params(), (arch.vocab_size, arch.hidden_size)))
        self.layers = nnx.List([LlamaLayer(arch, rngs=rngs) for _ in range(arch.num_layers)])
        self.norm = RMSNorm(arch.hidden_size, arch.rms_norm_eps)
        self.head = Projection(arch.hidden_size, arch.vocab_size, rngs=rngs)

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t v"]:
        """Logits at i are of token i + 1."""
        return self.head(self.features(tokens))

    def features(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """What the head reads: the tokens after the last norm."""

        def apply(layer: LlamaLayer, x):
            return layer(x)

        apply = jax.checkpoint(apply, policy=None if self.remat else KEPT)
        x = self.embed(tokens)
        for layer in self.layers:
            x = apply(layer, x)
        return self.norm(x)

    def embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        return self.embeddings[...][tokens].astype(self.dtype)

    def prefill(self, tokens: Int[Array, "b t"], length: int) -> tuple[Float[Array, "b v"], Cache]:
        """(logits of the token after the last, a cache of so many slots that holds these tokens)."""
        x, cache = prefill_layers(self.layers, self.embed(tokens), length=length)
        return self.head(self.norm(x[:, -1:]))[:, 0], cache

    def step(
        self, token: Int[Array, " b"], cache: Cache, position: Int[Array, ""]
    ) -> tuple[Float[Array, "b v"], Cache]:
        """(logits of the token after the one at `position`, the cache with it)."""
        x, cache = step_layers(self.layers, self.embed(token[:, None]), cache=cache, position=position)
        return self.head(self.norm(x))[:, 0], cache


def prefill_layers(
    layers: Iterable[Any], x: Float[Array, "b t d"], *cond: Float[Array, "b d"], length: int
) -> tuple[Float[Array, "b t d"], Cache]:
    """(the tokens after all layers, a cache of so many slots that holds them); `cond` where layers have a condition."""
    cache = []
    for layer in layers:
        x, kv = layer.prefill(x, *cond)
        cache.append(with_slots(kv, length))
    return x, cache


def step_layers(
    layers: Iterable[Any], x: Float[Array, "b 1 d"], *cond: Float[Array, "b d"], cache: Cache, position: Int[Array, ""]
) -> tuple[Float[Array, "b 1 d"], Cache]:
    """The one token at `position` after all layers, and the cache with it."""
    caches = []
    for layer, of_layer in zip(layers, cache, strict=True):
        x, kv = layer.step(x, *cond, cache=of_layer, position=position)
        caches.append(kv)
    return x, caches


def with_slots(kv: Float[Array, "b t 2 h w"], length: int) -> Float[Array, "b n 2 h w"]:
    """Keys and values with empty slots behind them, `length` in all."""
    return jnp.pad(kv, ((0, 0), (0, length - kv.shape[1]), (0, 0), (0, 0), (0, 0)))

"""The noise-conditioned decoder of text: blocks that each denoise every token, given the clean tokens before it.

Two streams run through a block. The clean one is a Llama's: each token reads itself and what is before it. A noisy
token reads the clean ones before it, and itself. So noisy token i is answered for as it is in generation, where
everything before it is finished, and all tokens are trained in one pass (paper, appendix B). The two are never joined
to one sequence, as Block Diffusion does it under a mask: half of the scores would be masked out, and the last layer
needs no more of the clean stream than keys and values. tests/test_dblock_llama.py shows that the values are equal.

Both are conditioned by adaLN-Zero: the noisy stream on its noise level, the clean one on a level that never changes.
So keys and values of clean tokens are a function of the tokens alone, and a text that is written keeps those it has.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dblocks_jax.models.causal import attend_cached, causal_attend
from dblocks_jax.models.conditioned import make_parts
from dblocks_jax.models.dblock_vit import normalize_rows
from dblocks_jax.models.dit import DiTModulation, DiTNoiseEmbedding
from dblocks_jax.models.llama import Cache, LlamaArchitecture, LlamaAttention, LlamaMlp, step_layers, with_slots
from dblocks_jax.models.primitives import KEPT, Projection, init_weights
from dblocks_jax.models.rms import normalize_rms_modulated

HeadKind = Literal["linear", "denoised", "cosine"]
COSINE_SCALE = 16.0  # a softmax over cosines of less than 10 cannot name one token of thousands


class LinearHead(nnx.Module):
    """Logits as linear functions of the network's output F, whose scale does not depend on the noise level."""

    def __init__(self, arch: LlamaArchitecture, *, rngs: nnx.Rngs):
        self.linear = Projection(arch.hidden_size, arch.vocab_size, rngs=rngs)

    def __call__(
        self, features: Float[Array, "b t d"], denoised: Float[Array, "b t d"], table: Float[Array, "v d"]
    ) -> Float[Array, "b t v"]:
        del denoised, table
        return self.linear(features)


class DenoisedHead(nnx.Module):
    """Logits as linear functions of the estimate D: the released image classifier's reading."""

    def __init__(self, arch: LlamaArchitecture, *, rngs: nnx.Rngs):
        self.linear = Projection(arch.hidden_size, arch.vocab_size, rngs=rngs)

    def __call__(
        self, features: Float[Array, "b t d"], denoised: Float[Array, "b t d"], table: Float[Array, "v d"]
    ) -> Float[Array, "b t v"]:
        del features, table
        return self.linear(denoised)


class CosineHead(nnx.Module):
    """Logits as cosines between the estimate D and each token's embedding, times a learned scale."""

    def __init__(self, arch: LlamaArchitecture, *, rngs: nnx.Rngs):
        del arch, rngs
        self.scale = nnx.Param(jnp.float32(COSINE_SCALE))

    def __call__(
        self, features: Float[Array, "b t d"], denoised: Float[Array, "b t d"], table: Float[Array, "v d"]
    ) -> Float[Array, "b t v"]:
        del features
        return self.scale[...] * (normalize_rows(denoised.reshape(-1, denoised.shape[-1])) @ table.T).reshape(
            *denoised.shape[:2], -1
        )


HEADS = {"linear": LinearHead, "denoised": DenoisedHead, "cosine": CosineHead}


class DBlockLlamaShared(nnx.Module):
    """What every block uses: embeddings of tokens and of the noise level, the last norm, and the head."""

    def __init__(self, arch: LlamaArchitecture, head: HeadKind, *, rngs: nnx.Rngs):
        self.epsilon = arch.rms_norm_eps
        self.dtype = arch.dtype
        self.embeddings = nnx.Param(init_weights(rngs.params(), (arch.vocab_size, arch.hidden_size)))
        self.noise = DiTNoiseEmbedding(arch.hidden_size, rngs=rngs)
        self.modulation = DiTModulation(arch.hidden_size, 2, rngs=rngs)
        self.head = HEADS[head](arch, rngs=rngs)

    def table(self) -> Float[Array, "v d"]:
        """The targets, and what clean tokens are read as: embeddings of unit norm, which so cannot collapse."""
        return normalize_rows(self.embeddings[...])

    def normalize(self, x: Float[Array, "b t d"], cond: Float[Array, "b d"]) -> Float[Array, "b t d"]:
        """F: the last norm, shifted and scaled by the noise level, in float32."""
        return normalize_rms_modulated(x, *self.modulation(cond), self.epsilon)


class DBlockLlamaLayer(nnx.Module):
    """Llama's layer, each branch shifted and scaled after a norm without weights, and gated (adaLN-Zero).

    `six` are the shift, scale and gate of attention, then those of the MLP.
    """

    def __init__(self, arch: LlamaArchitecture, *, rngs: nnx.Rngs):
        self.epsilon = arch.rms_norm_eps
        self.attention = LlamaAttention(arch, rngs=rngs)
        self.mlp = LlamaMlp(arch, rngs=rngs)
        self.modulation = DiTModulation(arch.hidden_size, 6, rngs=rngs)

    def __call__(
        self,
        noisy: Float[Array, "b t d"],
        clean: Float[Array, "b t d"],
        cond: Float[Array, "b d"],
        cond_clean: Float[Array, "b d"],
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t d"]]:
        """Both streams after this layer."""
        clean, before = self.remember(clean, cond_clean)
        return self.denoise(noisy, before, cond), clean

    def remember(
        self, clean: Float[Array, "b t d"], cond: Float[Array, "b d"]
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t 2 h w"]]:
        """The clean stream after this layer, and its keys and values."""
        six = self.modulation(cond)
        qkv = self.attention.queries_keys_values(self._before_attention(clean, six))
        return self._finish(clean, causal_attend(qkv), six), qkv[:, :, 1:]

    def only_keys_values(self, clean: Float[Array, "b t d"], cond: Float[Array, "b d"]) -> Float[Array, "b t 2 h w"]:
        """What `remember` has second, where nobody needs the first."""
        read, width = self._before_attention(clean, self.modulation(cond)), clean.shape[-1]
        return self.attention.turned(self.attention.query_key_value(read, slice(width, None)), 2, None)

    def denoise(
        self, noisy: Float[Array, "b t d"], before: Float[Array, "b t 2 h w"], cond: Float[Array, "b d"]
    ) -> Float[Array, "b t d"]:
        """The noisy stream after this layer, given the keys and values of the clean one."""
        six = self.modulation(cond)
        qkv = self.attention.queries_keys_values(self._before_attention(noisy, six))
        return self._finish(noisy, causal_attend(qkv, before), six)

    def step(
        self,
        x: Float[Array, "b 1 d"],
        cond: Float[Array, "b d"],
        cache: Float[Array, "b n 2 h w"],
        position: Int[Array, ""],
    ) -> tuple[Float[Array, "b 1 d"], Float[Array, "b n 2 h w"]]:
        """The one token at `position`, noisy or clean, and the cache with it."""
        six = self.modulation(cond)
        qkv = self.attention.queries_keys_values(self._before_attention(x, six), position[None])
        attended, cache = attend_cached(qkv, cache, position)
        return self._finish(x, attended, six), cache

    def _before_attention(self, x, six):
        return normalize_rms_modulated(x, six[0], six[1], self.epsilon)

    def _finish(self, x, attended, six):
        _, _, gate_a, shift_m, scale_m, gate_m = six
        gate_a, gate_m = gate_a[:, None].astype(x.dtype), gate_m[:, None].astype(x.dtype)
        x = x + gate_a * self.attention.read_out(attended)
        return x + gate_m * self.mlp(normalize_rms_modulated(x, shift_m, scale_m, self.epsilon))


class DBlockLlamaBlock(nnx.Module):
    """Consecutive layers: what one DiffusionBlocks step trains.

    With `remat` each layer keeps only its input for the backward pass and computes the rest again.
    """

    def __init__(self, layers: list[DBlockLlamaLayer], *, remat: bool = False):
        self.layers = nnx.List(layers)
        self.remat = remat

    def __call__(
        self,
        noisy: Float[Array, "b t d"],
        clean: Float[Array, "b t d"],
        cond: Float[Array, "b d"],
        cond_clean: Float[Array, "b d"],
    ) -> Float[Array, "b t d"]:
        """The noisy stream after all layers, each of its tokens given the clean ones before it."""

        def both(layer: DBlockLlamaLayer, noisy, clean):
            return layer(noisy, clean, cond, cond_clean)

        def last(layer: DBlockLlamaLayer, noisy, clean):
            return layer.denoise(noisy, layer.only_keys_values(clean, cond_clean), cond)

        both, last = (jax.checkpoint(apply, policy=None if self.remat else KEPT) for apply in (both, last))
        for layer in self.layers[:-1]:
            noisy, clean = both(layer, noisy, clean)
        return last(self.layers[-1], noisy, clean)

    def remember(self, clean: Float[Array, "b t d"], cond: Float[Array, "b d"], length: int) -> Cache:
        """A cache of so many slots that holds these tokens."""
        cache = []
        for layer in self.layers:
            clean, kv = layer.remember(clean, cond)
            cache.append(with_slots(kv, length))
        return cache

    def step(
        self, x: Float[Array, "b 1 d"], cond: Float[Array, "b d"], cache: Cache, position: Int[Array, ""]
    ) -> tuple[Float[Array, "b 1 d"], Cache]:
        """The one token at `position`, noisy or clean, after all layers, and the cache with it.

        What a noisy token leaves in its slot nobody else reads: the clean one takes its place before the next.
        """
        return step_layers(self.layers, x, cond, cache=cache, position=position)


def run_block(
    shared: DBlockLlamaShared,
    block: DBlockLlamaBlock,
    clean: Float[Array, "b t d"],
    z_in: Float[Array, "b t d"],
    c_noise: Float[Array, " b"],
    c_noise_clean: float,
) -> Float[Array, "b t d"]:
    """The raw network F at every token: of z_in there, and of the clean tokens before it, through one block alone."""
    cond = shared.noise(c_noise)
    cond_clean = shared.noise(jnp.full(c_noise.shape, c_noise_clean))
    x = block(z_in.astype(shared.dtype), clean.astype(shared.dtype), cond, cond_clean)
    return shared.normalize(x, cond)


def make_dblock_llama(
    arch: LlamaArchitecture, num_blocks: int, *, head: HeadKind, isolated: bool, rngs: nnx.Rngs
) -> dict[str, nnx.Module]:
    """A freshly initialised model by parts; `num_layers` must be a multiple of `num_blocks`. Block 0 is the noisiest.

    See `make_parts`.
    """
    return make_parts(
        num_blocks,
        isolated=isolated,
        shared=lambda: DBlockLlamaShared(arch, head, rngs=rngs),
        block=lambda: DBlockLlamaBlock(
            [DBlockLlamaLayer(arch, rngs=rngs) for _ in range(arch.num_layers // num_blocks)],
            remat=arch.gradient_checkpointing,
        ),
    )

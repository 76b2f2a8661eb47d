"""The masked transformer: tokens of which some are hidden in, logits of every token out.

Bidirectional, with rotary positions; the share that is hidden shifts, scales and gates every branch (adaLN-Zero), as in
SEDD's and MDLM's diffusion transformers. Blocks each run alone between the parts that all blocks share.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dblocks_jax.models.chunks import self_attend
from dblocks_jax.models.conditioned import ConditionedBlock, gated_branches, make_parts
from dblocks_jax.models.dit import DiTMlp
from dblocks_jax.models.layers import NOISE_FEATURES, sinusoidal_features
from dblocks_jax.models.primitives import Linear, init_weights, init_zeros, normalize_modulated
from dblocks_jax.models.rotary import rotate

CONDITION_SIZE = 128  # of the vector that tells a layer which share is hidden (MDLM)
LEVEL_SCALE = 1000.0  # levels in (0, 1] are spread over the sinusoids as MD4 does


@dataclass(frozen=True)
class MaskedArchitecture:
    """`vocabulary` symbols, without the one that hides; `hidden_size` and `intermediate_size` in features.

    2 * `num_heads` divides `hidden_size`.
    """

    vocabulary: int
    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    gradient_checkpointing: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the layers' computation; parameters are float32


class LevelEmbedding(nnx.Module):
    """t -> vector of CONDITION_SIZE: sinusoidal features, dense, SiLU, dense, SiLU."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.linear_1 = Linear(NOISE_FEATURES, CONDITION_SIZE, rngs=rngs)
        self.linear_2 = Linear(CONDITION_SIZE, CONDITION_SIZE, rngs=rngs)

    def __call__(self, level: Float[Array, " b"]) -> Float[Array, "b k"]:
        features = sinusoidal_features(LEVEL_SCALE * level)
        return nnx.silu(self.linear_2(nnx.silu(self.linear_1(features))))


class LevelModulation(nnx.Module):
    """Conditioning vector -> `chunks` vectors as wide as a token: a zero-initialised layer (adaLN-Zero)."""

    def __init__(self, hidden_size: int, chunks: int, *, rngs: nnx.Rngs):
        self.chunks = chunks
        self.linear = Linear(CONDITION_SIZE, chunks * hidden_size, rngs=rngs, init=init_zeros)

    def __call__(self, cond: Float[Array, "b k"]) -> list[Float[Array, "b d"]]:
        return jnp.split(self.linear(cond), self.chunks, axis=-1)


class MaskedShared(nnx.Module):
    """What every block uses: embeddings of tokens and level, and the final layer, untied from the embedding."""

    def __init__(self, arch: MaskedArchitecture, *, rngs: nnx.Rngs):
        self.dtype = arch.dtype
        # The last row stands for a token that is hidden.
        self.tokens = nnx.Param(init_weights(rngs.params(), (arch.vocabulary + 1, arch.hidden_size)))
        self.level = LevelEmbedding(rngs=rngs)
        self.modulation = LevelModulation(arch.hidden_size, 2, rngs=rngs)
        self.head = Linear(arch.hidden_size, arch.vocabulary, rngs=rngs, init=init_zeros)

    def embed(self, tokens: Int[Array, "b t"], is_hidden: Bool[Array, "b t"]) -> Float[Array, "b t d"]:
        """The tokens that are seen; of the hidden ones only where they are. Positions are the attention's business."""
        table = self.tokens[...]
        return table[jnp.where(is_hidden, table.shape[0] - 1, tokens)].astype(self.dtype)

    def read_out(self, tokens: Float[Array, "b t d"], cond: Float[Array, "b k"]) -> Float[Array, "b t v"]:
        """Logits, in float32."""
        shift, scale = self.modulation(cond)
        return self.head(normalize_modulated(tokens, shift, scale))


class RotaryAttention(nnx.Module):
    """Multi-head self-attention among all tokens, with rotary positions."""

    def __init__(self, hidden_size: int, num_heads: int, *, dtype: str, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.query_key_value = Linear(hidden_size, 3 * hidden_size, dtype=dtype, rngs=rngs)
        self.output = Linear(hidden_size, hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        b, t, d = x.shape
        heads = self.query_key_value(x).reshape(b, t, 3 * self.num_heads, d // self.num_heads)
        # Split, not sliced: each slice's gradient would be a padded array as large as all three.
        turned, values = jnp.split(heads, [2 * self.num_heads], axis=2)
        qkv = jnp.concatenate([rotate(turned), values], axis=2).reshape(b, t, 3, self.num_heads, -1)
        return self.output(self_attend(qkv).reshape(b, t, d))


class MaskedLayer(nnx.Module):
    """One transformer layer: attention and MLP, each shifted and scaled after a plain norm, and gated (adaLN-Zero)."""

    def __init__(self, arch: MaskedArchitecture, *, rngs: nnx.Rngs):
        self.attention = RotaryAttention(arch.hidden_size, arch.num_heads, dtype=arch.dtype, rngs=rngs)
        self.mlp = DiTMlp(
            arch.hidden_size,
            arch.intermediate_size,
            dtype=arch.dtype,
            remat=arch.gradient_checkpointing,
            rngs=rngs,
        )
        self.modulation = LevelModulation(arch.hidden_size, 6, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"], cond: Float[Array, "b k"]) -> Float[Array, "b t d"]:
        return gated_branches(x, self.modulation(cond), self.attention, self.mlp)


def run_block(
    shared: MaskedShared,
    block: ConditionedBlock,
    tokens: Int[Array, "b t"],
    is_hidden: Bool[Array, "b t"],
    level: Float[Array, " b"],
) -> Float[Array, "b t v"]:
    """Logits of every token, from those that are not hidden, through the layers of one block alone.

    `level` is t, the share that is hidden as far as the network is told. What `tokens` hold where they are hidden is
    not looked at.
    """
    cond = shared.level(level)
    return shared.read_out(block(shared.embed(tokens, is_hidden), cond), cond)


def make_masked(arch: MaskedArchitecture, num_blocks: int, *, isolated: bool, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
    """A freshly initialised model by parts; `num_layers` must be a multiple of `num_blocks`. Block 0 sees the least.

    See `make_parts`.
    """
    return make_parts(
        num_blocks,
        isolated=isolated,
        shared=lambda: MaskedShared(arch, rngs=rngs),
        block=lambda: ConditionedBlock(
            [MaskedLayer(arch, rngs=rngs) for _ in range(arch.num_layers // num_blocks)],
            remat=arch.gradient_checkpointing,
        ),
    )

"""The diffusion transformer (DiT): an image and a noise level in, an image out, given a class.

Blocks each run alone between the parts that all blocks share. Conditioning is adaLN-Zero: the noise level and the class
shift, scale and gate every branch, and all gates start at zero.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dblocks_jax.models.chunks import mlp_by_units, self_attend
from dblocks_jax.models.conditioned import ConditionedBlock, gated_branches, make_parts
from dblocks_jax.models.layers import (
    MAX_PERIOD,
    NOISE_FEATURES,
    PatchEmbedding,
    sinusoidal_features,
)
from dblocks_jax.models.primitives import (
    DENSE_OUTPUT,
    Linear,
    gelu_tanh,
    init_weights,
    init_xavier,
    init_zeros,
    normalize_modulated,
)


@dataclass(frozen=True)
class DiTArchitecture:
    """Sizes in pixels (or latents), `hidden_size` and `intermediate_size` in features.

    `patch_size` divides `image_size`, and 4 and `num_heads` divide `hidden_size`.
    """

    image_size: int
    channels: int
    num_labels: int  # without the null class
    patch_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    gradient_checkpointing: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the layers' computation; parameters are float32

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size


def sincos_positions(side: int, hidden_size: int) -> Float[np.ndarray, "t d"]:
    """Fixed embeddings of a side x side grid, row by row: float32 [side^2, hidden_size].

    The first half of the features tells the column, the second the row, each by sines, then cosines, of the coordinate
    at hidden_size / 4 frequencies from 1 down to nearly 1 / 10000.
    """
    quarter = hidden_size // 4
    angles = np.arange(side)[:, None] * float(MAX_PERIOD) ** (-np.arange(quarter) / quarter)
    of_one = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    both = np.concatenate([np.tile(of_one, (side, 1)), np.repeat(of_one, side, axis=0)], axis=-1)
    return both.astype(np.float32)


class DiTNoiseEmbedding(nnx.Module):
    """c_noise -> vector of `hidden_size`: sinusoidal features, dense, SiLU, dense."""

    def __init__(self, hidden_size: int, *, rngs: nnx.Rngs):
        self.linear_1 = Linear(NOISE_FEATURES, hidden_size, rngs=rngs)
        self.linear_2 = Linear(hidden_size, hidden_size, rngs=rngs)

    def __call__(self, c_noise: Float[Array, " b"]) -> Float[Array, "b d"]:
        return self.linear_2(nnx.silu(self.linear_1(sinusoidal_features(c_noise))))


class DiTModulation(nnx.Module):
    """Conditioning vector -> `chunks` vectors as wide: a zero-initialised layer after SiLU (adaLN-Zero)."""

    def __init__(self, hidden_size: int, chunks: int, *, rngs: nnx.Rngs):
        self.chunks = chunks
        self.linear = Linear(hidden_size, chunks * hidden_size, rngs=rngs, init=init_zeros)

    def __call__(self, cond: Float[Array, "b d"]) -> list[Float[Array, "b d"]]:
        return jnp.split(self.linear(nnx.silu(cond)), self.chunks, axis=-1)


class DiTShared(nnx.Module):
    """What every block uses: embeddings of patches, positions, noise level and class, and the final layer."""

    def __init__(self, arch: DiTArchitecture, *, rngs: nnx.Rngs):
        self.side = arch.patches_per_side
        self.channels = arch.channels
        self.patches = PatchEmbedding(
            arch.patch_size, arch.channels, arch.hidden_size, dtype=arch.dtype, init=init_xavier, rngs=rngs
        )
        self.noise = DiTNoiseEmbedding(arch.hidden_size, rngs=rngs)
        self.labels = nnx.Param(init_weights(rngs.params(), (arch.num_labels + 1, arch.hidden_size)))
        self.modulation = DiTModulation(arch.hidden_size, 2, rngs=rngs)
        pixels = arch.patch_size * arch.patch_size * arch.channels
        self.head = Linear(arch.hidden_size, pixels, rngs=rngs, init=init_zeros)

    @property
    def null_label(self) -> int:
        """The class that stands for none: the last row of the table."""
        return self.labels.shape[0] - 1

    def embed(self, z_in: Float[Array, "b h w c"]) -> Float[Array, "b t d"]:
        """Patches + positions, which are a constant and no parameter."""
        patches = self.patches(z_in)
        positions = sincos_positions(self.side, patches.shape[-1])
        return (patches + jnp.broadcast_to(positions, patches.shape)).astype(patches.dtype)

    def condition(self, c_noise: Float[Array, " b"], labels: Int[Array, " b"]) -> Float[Array, "b d"]:
        """What the layers know of the noise level and the class: the sum of their embeddings."""
        return self.noise(c_noise) + self.labels[...][labels]

    def read_out(self, tokens: Float[Array, "b t d"], cond: Float[Array, "b d"]) -> Float[Array, "b h w c"]:
        """The final layer, in float32: each token becomes its patch of the image."""
        shift, scale = self.modulation(cond)
        pixels = self.head(normalize_modulated(tokens, shift, scale))
        b, p = tokens.shape[0], self.patches.patch_size
        patches = pixels.reshape(b, self.side, self.side, p, p, self.channels).transpose(0, 1, 3, 2, 4, 5)
        return patches.reshape(b, self.side * p, self.side * p, self.channels)


class DiTAttention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, hidden_size: int, num_heads: int, *, dtype: str, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.query_key_value = Linear(hidden_size, 3 * hidden_size, dtype=dtype, init=init_xavier, rngs=rngs)
        self.output = Linear(hidden_size, hidden_size, dtype=dtype, init=init_xavier, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        b, t, d = x.shape
        qkv = self.query_key_value(x).reshape(b, t, 3, self.num_heads, d // self.num_heads)
        return self.output(self_attend(qkv).reshape(b, t, d))


class DiTMlp(nnx.Module):
    """Dense, GELU by tanh, dense; `remat` as in `mlp_by_units`."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, dtype: str, remat: bool, rngs: nnx.Rngs):
        self.dtype = dtype
        self.remat = remat
        self.intermediate = Linear(hidden_size, intermediate_size, dtype=dtype, init=init_xavier, rngs=rngs)
        self.output = Linear(intermediate_size, hidden_size, dtype=dtype, init=init_xavier, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        rows = x.astype(self.dtype).reshape(-1, x.shape[-1])
        params = (p[...] for layer in (self.intermediate, self.output) for p in (layer.kernel, layer.bias))
        return checkpoint_name(mlp_by_units(gelu_tanh, self.remat, rows, *params), DENSE_OUTPUT).reshape(x.shape)


class DiTLayer(nnx.Module):
    """One transformer layer: attention and MLP, each shifted and scaled after a plain norm, and gated (adaLN-Zero)."""

    def __init__(self, arch: DiTArchitecture, *, rngs: nnx.Rngs):
        self.attention = DiTAttention(arch.hidden_size, arch.num_heads, dtype=arch.dtype, rngs=rngs)
        self.mlp = DiTMlp(
            arch.hidden_size,
            arch.intermediate_size,
            dtype=arch.dtype,
            remat=arch.gradient_checkpointing,
            rngs=rngs,
        )
        self.modulation = DiTModulation(arch.hidden_size, 6, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"], cond: Float[Array, "b d"]) -> Float[Array, "b t d"]:
        return gated_branches(x, self.modulation(cond), self.attention, self.mlp)


def run_block(
    shared: DiTShared,
    block: ConditionedBlock,
    z_in: Float[Array, "b h w c"],
    c_noise: Float[Array, " b"],
    labels: Int[Array, " b"],
) -> Float[Array, "b h w c"]:
    """The raw network F: an image from an image, through the layers of one block alone.

    `labels` are classes, or `shared.null_label` for an image of no class; others are not looked for.
    """
    cond = shared.condition(c_noise, labels)
    return shared.read_out(block(shared.embed(z_in), cond), cond)


def make_dit(arch: DiTArchitecture, num_blocks: int, *, isolated: bool, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
    """A freshly initialised model by parts; `num_layers` must be a multiple of `num_blocks`. Block 0 is the noisiest.

    See `make_parts`.
    """
    return make_parts(
        num_blocks,
        isolated=isolated,
        shared=lambda: DiTShared(arch, rngs=rngs),
        block=lambda: ConditionedBlock(
            [DiTLayer(arch, rngs=rngs) for _ in range(arch.num_layers // num_blocks)], remat=arch.gradient_checkpointing
        ),
    )

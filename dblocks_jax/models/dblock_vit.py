"""The noise-conditioned vision transformer: blocks that each run alone, and the parts that all blocks share."""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from dblocks_jax.models.layers import Block, ConditionedLayer, Modulation, NoiseEmbedding, PatchEmbedding, modulate
from dblocks_jax.models.primitives import LayerNorm, Linear, dropout, init_weights, init_zeros, split_key
from dblocks_jax.models.vit import Architecture, pool_tokens


def normalize_rows(table: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Each row scaled to unit L2 norm; a row shorter than 1e-12 is divided by 1e-12 instead."""
    # sqrt has no derivative at 0: the inner maximum keeps the gradient of a zero row at zero instead of NaN.
    norm = jnp.sqrt(jnp.maximum(jnp.sum(table**2, axis=-1, keepdims=True), 1e-24))
    return table / jnp.broadcast_to(norm, table.shape)


class Shared(nnx.Module):
    """What every block uses: embeddings of patches, positions, labels and noise level, and the readout."""

    def __init__(self, arch: Architecture, *, rngs: nnx.Rngs):
        self.pool = arch.pool
        self.dropout_rate = arch.dropout_rate
        self.patches = PatchEmbedding(arch.patch_size, arch.channels, arch.hidden_size, dtype=arch.dtype, rngs=rngs)
        self.positions = nnx.Param(init_weights(rngs.params(), (1, arch.num_patches + 1, arch.hidden_size)))
        self.labels = nnx.Param(init_weights(rngs.params(), (arch.num_labels, arch.hidden_size)))
        self.noise = NoiseEmbedding(arch.hidden_size, rngs=rngs)
        self.norm = LayerNorm(arch.hidden_size)
        self.modulation = Modulation(arch.hidden_size, 2, rngs=rngs)
        self.head = Linear(arch.hidden_size, arch.num_labels, rngs=rngs, init=init_zeros)

    def embed_labels(self, labels: Int[Array, " b"]) -> Float[Array, "b d"]:
        """The clean target y: L2-normalised embeddings of the true labels."""
        return normalize_rows(self.labels[...][labels])

    def embed(
        self, images: Float[Array, "b h w c"], z_in: Float[Array, "b d"], key: Key[Array, ""] | None
    ) -> Float[Array, "b t d"]:
        """[noisy label token; patches] + positions."""
        patches = self.patches(images)
        tokens = jnp.concatenate([z_in[:, None], patches], axis=1)
        tokens = (tokens + jnp.broadcast_to(self.positions[...], tokens.shape)).astype(patches.dtype)
        return dropout(tokens, self.dropout_rate, key)

    def classify(self, denoised: Float[Array, "b d"], cond: Float[Array, "b k"]) -> Float[Array, "b classes"]:
        """Logits of a denoised estimate: modulate by the noise level, then linear."""
        shift, scale = self.modulation(cond)
        return self.head(modulate(denoised, shift, scale))


def run_block(
    shared: Shared,
    block: Block,
    images: Float[Array, "b h w c"],
    z_in: Float[Array, "b d"],
    c_noise: Float[Array, " b"],
    key: Key[Array, ""] | None = None,
) -> tuple[Float[Array, "b d"], Float[Array, "b k"]]:
    """The raw network F: (pooled features, conditioning vector). A key switches dropout on."""
    key_embedding, key_block = split_key(key, 2)
    cond = shared.noise(c_noise)
    tokens = block(shared.embed(images, z_in, key_embedding), cond, key_block)
    return pool_tokens(shared.norm(tokens), shared.pool), cond


@dataclass
class DBlockViT:
    """A whole model: the shared parts and the blocks, block 0 (the noisiest) first.

    Not a module itself: no computation ever needs all of it at once, and training holds one block at a time.
    """

    shared: Shared
    blocks: list[Block]


@dataclass
class IsolatedDBlockViT:
    """A whole model whose blocks share nothing: block b has embeddings and a head of its own, shared[b]."""

    shared: list[Shared]
    blocks: list[Block]


def make_block(arch: Architecture, num_layers: int, *, rngs: nnx.Rngs) -> Block:
    """`num_layers` fresh layers of this architecture."""
    layers = [
        ConditionedLayer(
            arch.hidden_size,
            arch.num_heads,
            arch.intermediate_size,
            arch.dropout_rate,
            open_gates=arch.open_gates,
            remat=arch.gradient_checkpointing,
            dtype=arch.dtype,
            rngs=rngs,
        )
        for _ in range(num_layers)
    ]
    return Block(layers, first_only=arch.pool == "cls", remat=arch.gradient_checkpointing)


def make_dblock_vit(arch: Architecture, num_blocks: int, *, rngs: nnx.Rngs) -> DBlockViT:
    """A freshly initialised model; `num_layers` must be a multiple of `num_blocks`."""
    layers_per_block = arch.num_layers // num_blocks
    return DBlockViT(
        shared=Shared(arch, rngs=rngs),
        blocks=[make_block(arch, layers_per_block, rngs=rngs) for _ in range(num_blocks)],
    )


def make_isolated_dblock_vit(arch: Architecture, num_blocks: int, *, rngs: nnx.Rngs) -> IsolatedDBlockViT:
    """A freshly initialised model of isolated blocks."""
    arch = dataclasses.replace(arch, num_layers=arch.num_layers // num_blocks)
    each = [make_dblock_vit(arch, 1, rngs=rngs) for _ in range(num_blocks)]
    return IsolatedDBlockViT([model.shared for model in each], [model.blocks[0] for model in each])

"""The plain vision transformer, trained end to end: the baseline."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from dblocks_jax.models.layers import Layer, PatchEmbedding, Trunk
from dblocks_jax.models.primitives import LayerNorm, Linear, dropout, init_weights, split_key


@dataclass(frozen=True)
class Architecture:
    """What both transformers have in common. Sizes in pixels, `intermediate_size` and `hidden_size` in features."""

    image_size: int
    channels: int
    num_labels: int
    patch_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    dropout_rate: float
    pool: Literal["cls", "mean"]
    gradient_checkpointing: bool = False
    open_gates: bool = False  # whether a conditioned layer's branches count from the start, as in a plain one
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the transformer's computation; parameters are float32

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def pool_tokens(tokens: Float[Array, "b t d"], pool: str) -> Float[Array, "b d"]:
    """The first token ("cls"), or the mean of the patch tokens ("mean")."""
    return tokens[:, 0] if pool == "cls" else jnp.mean(tokens[:, 1:], axis=1)


class ViT(nnx.Module):
    """Image -> logits: [CLS; patches] + positions -> layers -> LayerNorm -> pool -> linear."""

    def __init__(self, arch: Architecture, *, rngs: nnx.Rngs):
        self.pool = arch.pool
        self.dropout_rate = arch.dropout_rate
        self.patches = PatchEmbedding(arch.patch_size, arch.channels, arch.hidden_size, dtype=arch.dtype, rngs=rngs)
        self.cls_token = nnx.Param(init_weights(rngs.params(), (1, 1, arch.hidden_size)))
        self.positions = nnx.Param(init_weights(rngs.params(), (1, arch.num_patches + 1, arch.hidden_size)))
        layers = [
            Layer(
                arch.hidden_size,
                arch.num_heads,
                arch.intermediate_size,
                arch.dropout_rate,
                remat=arch.gradient_checkpointing,
                dtype=arch.dtype,
                rngs=rngs,
            )
            for _ in range(arch.num_layers)
        ]
        self.trunk = Trunk(layers, first_only=arch.pool == "cls", remat=arch.gradient_checkpointing)
        self.norm = LayerNorm(arch.hidden_size)
        self.head = Linear(arch.hidden_size, arch.num_labels, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w c"], key: Key[Array, ""] | None = None) -> Float[Array, "b classes"]:
        """Logits of normalised images; a key switches dropout on."""
        return self.head(self.features(images, key))

    def features(self, images: Float[Array, "b h w c"], key: Key[Array, ""] | None = None) -> Float[Array, "b d"]:
        """What the head reads: the pooled tokens after the last norm."""
        key_embedding, key_trunk = split_key(key, 2)
        patches = self.patches(images)
        cls = jnp.broadcast_to(self.cls_token[...], (patches.shape[0], 1, patches.shape[2]))
        tokens = jnp.concatenate([cls, patches], axis=1)
        tokens = (tokens + jnp.broadcast_to(self.positions[...], tokens.shape)).astype(patches.dtype)
        tokens = self.trunk(dropout(tokens, self.dropout_rate, key_embedding), key_trunk)
        return pool_tokens(self.norm(tokens), self.pool)

"""Where masking and network meet: a block's answer to what is hidden, and what that costs."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dblocks_jax.diffusion.loss import cross_entropy
from dblocks_jax.models.conditioned import ConditionedBlock
from dblocks_jax.models.masked_transformer import MaskedShared, run_block


def hidden_cross_entropy(
    shared: MaskedShared,
    block: ConditionedBlock,
    tokens: Int[Array, "b t"],
    is_hidden: Bool[Array, "b t"],
    level: Float[Array, " b"],
) -> Float[Array, " b"]:
    """-sum log p(token) over the hidden tokens of each sample, over the number of all its tokens: nats a token."""
    logits = run_block(shared, block, tokens, is_hidden, level)
    return jnp.mean(jnp.where(is_hidden, cross_entropy(logits, tokens), 0.0), axis=1)

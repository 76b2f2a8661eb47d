"""From hidden symbols to symbols: at each level the block that owns it uncovers some of what is still hidden."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key
from ml_collections import ConfigDict

from dblocks_jax.models.blueprint import Blueprint
from dblocks_jax.models.masked_transformer import run_block
from dblocks_jax.run.devices import to_device
from dblocks_jax.run.streams import stream
from dblocks_jax.tasks.mask.config import corruption

# (parameters by part, tokens, which of them are hidden, number of the first text) -> after each level who uncovered,
# the tokens, and which are hidden still
Sampler = Callable[..., Iterator[tuple[int, Int[Array, "b t"], Bool[Array, "b t"]]]]


def uncover(
    logits: Float[Array, "b t v"],
    tokens: Int[Array, "b t"],
    is_hidden: Bool[Array, "b t"],
    share: Float[Array, ""],
    temperature: float,
    key: Key[Array, ""],
) -> tuple[Int[Array, "b t"], Bool[Array, "b t"]]:
    """Each hidden token is drawn from its logits with probability `share`, and stays hidden otherwise.

    That is the reverse process from t to s for share = (alpha(s) - alpha(t)) / (1 - alpha(t)) = (t - s) / t. Of logits
    that are not finite comes -1.
    """
    key_when, key_what = jax.random.split(key)
    is_due = is_hidden & (jax.random.uniform(key_when, tokens.shape) < share)
    drawn = jax.random.categorical(key_what, logits / temperature).astype(tokens.dtype)
    drawn = jnp.where(jnp.isfinite(logits).all(axis=-1), drawn, -1)
    return jnp.where(is_due, drawn, tokens), is_hidden & ~is_due


def make_sampler(config: ConfigDict, blueprint: Blueprint) -> Sampler:
    """Build the sampler that a config describes. It compiles once for all blocks and levels.

    It starts at the level of the share that is hidden, so that a text with few blanks is for the last blocks alone, and
    goes down evenly in `num_inference_steps` steps. What is not hidden stays.
    """
    masking = corruption(config)

    @jax.jit
    def step(together, tokens, is_hidden, level, share, key):
        shared, block = blueprint.together(together)
        logits = run_block(shared, block, tokens, is_hidden, jnp.full(tokens.shape[0], level))
        return uncover(logits, tokens, is_hidden, share, config.temperature, key)

    def sample(
        params, tokens: Int[np.ndarray, "b t"], is_hidden: Bool[np.ndarray, "b t"], first: int
    ) -> Iterator[tuple[int, Array, Array]]:
        levels = masking.levels(config.num_inference_steps, start=float(is_hidden.mean()))
        nexts = [*levels[1:], 0.0]
        state = jnp.asarray(tokens, jnp.int32), jnp.asarray(is_hidden)
        for i, (owner, level, following) in enumerate(zip(masking.owners(levels), levels, nexts, strict=True)):
            if config.idle_blocks != "device" or config.block_parallel:
                jax.block_until_ready(state)  # else blocks that wait elsewhere would pile up on the device
            together = tuple(to_device(params[name]) for name in blueprint.names(owner))
            share = np.float32(2 if following == 0 else (level - following) / level)  # in the end all, beyond doubt
            state = step(
                together, *state, np.float32(level), share, jax.random.fold_in(stream(config.seed, "uncover", i), first)
            )
            yield owner, *state

    return sample

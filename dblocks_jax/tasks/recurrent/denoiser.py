"""The answers of both models: one pass at a noise level, and K steps or levels that lead to the logits of a token.

All positions are iterated side by side, and position t reads only what is at its own step or level of positions <= t:
so its way depends on tokens <= t alone, from a start that is zero, and the logits at its end are a probability of token
t + 1. With keys and values kept for each step, one position alone takes the same way: the same function runs it.

In training a position of the denoiser reads the noisy targets before it; here it reads what is being made of them.
The paper leaves the layout open. Taken is the one without a second sequence, which is one forward pass. The other would
keep a clean stream beside the noisy one, as `dblocks_jax/models/dblock_llama.py` does, at the cost of a second pass.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dblocks_jax.diffusion.precondition import Preconditioning, precondition
from dblocks_jax.diffusion.sampler import euler_step
from dblocks_jax.models.huginn import DBlockHuginnShared, Huginn, RecurrentTrunk

# What is kept of the tokens before, by stack of the trunk; of what is run for each step with a leading axis for them.
Caches = dict[str, Any]
NOTHING: Caches = {"prelude": None, "core": None, "coda": None}

# (stack of a trunk, tokens, what is kept of those before, condition) -> (tokens after it, what is kept now)
Run = Callable[..., tuple[Float[Array, "b t d"], Any]]


def whole(trunk: RecurrentTrunk) -> Run:
    """All positions, of which nothing is kept."""
    return lambda name, x, cache, *cond: (getattr(trunk, name)(x, *cond), None)


def remembered(trunk: RecurrentTrunk, length: int) -> Run:
    """All positions, kept in caches of `length` slots."""
    return lambda name, x, cache, *cond: getattr(trunk, name).prefill(x, *cond, length=length)


def continued(trunk: RecurrentTrunk, position: Int[Array, ""]) -> Run:
    """The one at `position`, after those in the caches."""
    return lambda name, x, cache, *cond: getattr(trunk, name).step(x, *cond, cache=cache, position=position)


def huginn_logits(
    model: Huginn, run: Run, tokens: Int[Array, "b t"], caches: Caches, num_steps: int
) -> tuple[Float[Array, "b t v"], Caches]:
    """(logits of the tokens behind these after `num_steps` steps from a state of zero, caches)."""
    e, prelude = run("prelude", model.embed(tokens), caches["prelude"])

    def step(state: Array, cache: Any) -> tuple[Array, Any]:
        return run("core", model.trunk.enter(state, e), cache)

    state, core = jax.lax.scan(step, jnp.zeros_like(e), caches["core"], length=num_steps)
    x, coda = run("coda", model.norm(state), caches["coda"])
    return model.head(model.norm(x)), {"prelude": prelude, "core": core, "coda": coda}


def dblock_logits(
    shared: DBlockHuginnShared,
    trunk: RecurrentTrunk,
    run: Run,
    tokens: Int[Array, "b t"],
    caches: Caches,
    levels: Float[Array, " n"],
    sigma_data: float,
) -> tuple[Float[Array, "b t v"], Caches]:
    """(logits of the tokens behind these at the last of the descending `levels`, caches).

    From z = 0, the middle of all noise, by Euler's steps toward the mean of the embeddings under each level's logits.
    """
    e, prelude = run("prelude", shared.embed(tokens), caches["prelude"])
    table = shared.table()

    def level(carry: tuple[Array, Array], at: Any) -> tuple[tuple[Array, Array], Any]:
        z, _ = carry
        sigma, sigma_next, *kept = at
        c = precondition(jnp.broadcast_to(sigma, tokens.shape[:1]), sigma_data)
        features, kept = denoise_at(shared, trunk, run, e, z, c, kept)
        logits = read_out(shared, features, z, c)
        return (euler_step(z, jax.nn.softmax(logits) @ table, sigma, sigma_next), logits), kept

    start = jnp.zeros((*tokens.shape, table.shape[1])), jnp.zeros((*tokens.shape, table.shape[0]))
    following = jnp.concatenate([levels[1:], levels[-1:]])
    (_, logits), (core, coda) = jax.lax.scan(level, start, (levels, following, caches["core"], caches["coda"]))
    return logits, {"prelude": prelude, "core": core, "coda": coda}


def denoise(
    shared: DBlockHuginnShared,
    trunk: RecurrentTrunk,
    tokens: Int[Array, "b t"],
    z: Float[Array, "b t d"],
    c: Preconditioning,
) -> Float[Array, "b t d"]:
    """F of all positions in one pass, each given the tokens up to it."""
    run = whole(trunk)
    e, _ = run("prelude", shared.embed(tokens), None)
    return denoise_at(shared, trunk, run, e, z, c, (None, None))[0]


def denoise_at(
    shared: DBlockHuginnShared,
    trunk: RecurrentTrunk,
    run: Run,
    e: Float[Array, "b t d"],
    z: Float[Array, "b t d"],
    c: Preconditioning,
    kept: Any,
) -> tuple[Float[Array, "b t d"], Any]:
    """(F(c_in z, c_noise; e), what is kept of core and coda): one pass at each sample's level."""
    cond, (core, coda) = shared.noise(c.c_noise), kept
    x, core = run("core", trunk.enter(c.c_in[:, None, None] * z, e), core, cond)
    x, coda = run("coda", shared.norm(x), coda, cond)
    return shared.norm(x), (core, coda)


def read_out(
    shared: DBlockHuginnShared, features: Float[Array, "b t d"], z: Float[Array, "b t d"], c: Preconditioning
) -> Float[Array, "b t v"]:
    """Logits of the estimate D = c_out F + c_skip z."""
    return shared.head(c.c_out[:, None, None] * features + c.c_skip[:, None, None] * z)

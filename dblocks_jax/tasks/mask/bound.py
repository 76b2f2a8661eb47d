"""The bound on how many bits a symbol of held-out data takes: every level asked of the block that owns it."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int
from ml_collections import ConfigDict

from dblocks_jax.diffusion.masking import Masking
from dblocks_jax.models.blueprint import Blueprint, Params
from dblocks_jax.run.devices import to_device
from dblocks_jax.tasks.mask.denoiser import hidden_cross_entropy
from dblocks_jax.tasks.text import scored_at_once

# (parameters by part, split, number of draws, what to call at each batch) -> figures by name
Bound = Callable[[dict[str, Params], Any, int, Callable[[], None]], dict[str, Any]]


def hidden_of_draw(draw: int, count: int, length: int) -> Bool[np.ndarray, "{count} {length}"]:
    """Which tokens of each of `count` sequences are hidden: from 1 to all, all numbers of them as often as can be."""
    rng = np.random.default_rng([0x7E57, draw])
    levels = (np.arange(count) + 1 - rng.random()) / count  # evenly spaced in (0, 1]
    numbers = np.clip(np.ceil(rng.permutation(levels) * length), 1, length)
    return rng.permuted(np.arange(length) < numbers[:, None], axis=1)


def make_bound(config: ConfigDict, corruption: Masking, blueprint: Blueprint, symbols: int) -> Bound:
    """Build the function that estimates {"bits", "bits_error", "bits_by_block", "num_sequences"} of a split.

    In continuous time the bound is the integral over t of E[sum of the hidden tokens' costs] / t, where each token is
    hidden with probability t (Eq. 7). Of n tokens k are hidden with a binomial probability, and t integrates out: it is
    the sum over k = 1 .. n of the mean cost of k hidden tokens, over k. So that is drawn: k uniform, k tokens
    hidden, their mean cost. A model that knows nothing has log2 of the number of symbols in every draw, nothing is cut
    off near t = 0, and the numbers have less noise. The network is told t = k / n, whose owner answers.

    Each of the draws gives every sequence one k, and over a split all k come alike. "bits_error" is the
    standard error of the mean over draws. "bits_by_block" are the means over each block's own levels: weighed with how
    many those are they make the whole. Draws are the same for every model.
    """

    @jax.jit
    def costs_of(together, tokens, is_hidden):
        shared, block = blueprint.together(together)
        level = jnp.mean(is_hidden, axis=1, dtype=jnp.float32)
        return hidden_cross_entropy(shared, block, tokens.astype(jnp.int32), is_hidden, level) / level

    def run(params: dict[str, Params], source: Any, draws: int, at_each_batch: Callable[[], None]) -> dict[str, Any]:
        count, length = len(source), source.take(np.arange(1))["tokens"].shape[1]
        size = min(scored_at_once(config, length, symbols), -(-count // corruption.num_blocks))
        sums = np.zeros((draws, corruption.num_blocks))
        counts = np.zeros_like(sums)
        for draw in range(draws):
            is_hidden = hidden_of_draw(draw, count, length)
            pending, before = [], None
            for block, places in batches_by_block(corruption.owners(is_hidden.sum(axis=1) / length), size):
                at_each_batch()
                padded = np.resize(places, size)  # all batches have one shape
                if block != before:  # where blocks wait on the host, each comes once
                    together, before = tuple(to_device(params[name]) for name in blueprint.names(block)), block
                costs = costs_of(together, source.take(padded)["tokens"], is_hidden[padded])
                pending.append((block, len(places), costs))
            for block, real, costs in pending:
                sums[draw, block] += np.sum(np.asarray(costs, np.float64)[:real])
                counts[draw, block] += real
        bits_of_nats = count * length / source.units / math.log(2)
        of_draws = bits_of_nats * sums.sum(axis=1) / counts.sum(axis=1)
        of_blocks = zip(sums.sum(axis=0), counts.sum(axis=0), strict=True)
        error = np.std(of_draws, ddof=1) / math.sqrt(len(of_draws)) if len(of_draws) > 1 else math.nan
        return {
            "num_sequences": count,
            "bits": float(of_draws.mean()),
            "bits_error": float(error),
            "bits_by_block": [
                float(bits_of_nats * total / number) if number else math.nan for total, number in of_blocks
            ],
        }

    return run


def batches_by_block(owners: Sequence[int], size: int) -> Iterator[tuple[int, Int[np.ndarray, " m"]]]:
    """(block, the places of at most `size` of those that it owns)."""
    for block in range(max(owners) + 1):
        mine = np.flatnonzero(np.asarray(owners) == block)
        for start in range(0, len(mine), size):
            yield block, mine[start : start + size]

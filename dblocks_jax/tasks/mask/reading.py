"""A text that a masked model reads: how many bits it takes, and what its blanks most likely are."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dblocks_jax.diffusion.loss import cross_entropy
from dblocks_jax.diffusion.masking import Masking
from dblocks_jax.models.blueprint import Blueprint, Params
from dblocks_jax.models.masked_transformer import run_block
from dblocks_jax.run.devices import to_device
from dblocks_jax.tasks.mask.bound import batches_by_block, hidden_of_draw
from dblocks_jax.tasks.mask.writing import Template

LOOKS = 32  # at a text in each draw, with other symbols of it hidden
LIKELIEST = 5  # symbols of a blank that are told

Logits = Float[np.ndarray, "t v"]


class Blank(NamedTuple):
    """What a blank is taken for, when it is the surest one that is left."""

    place: int
    token: int
    probability: float
    likeliest: list[tuple[int, float]]  # (token, probability), the most probable first


def bits_of_text(
    template: Template, corruption: Masking, blueprint: Blueprint, params: dict[str, Params], draws: int
) -> tuple[float, float]:
    """(bits that the given tokens take at most, standard error of that over `draws`); nothing of them is hidden yet.

    As in `make_bound`, of n given tokens k are hidden, k uniform, and n times their mean cost is averaged. What is not
    given is hidden all the time: it is unknown, and the model was trained on sequences of this length.
    """
    given, length = template.given, len(template.tokens)
    tokens = jnp.broadcast_to(jnp.asarray(template.tokens), (LOOKS, length))

    @jax.jit
    def costs_of(together, is_hidden, is_counted):
        shared, block = blueprint.together(together)
        logits = run_block(shared, block, tokens, is_hidden, jnp.mean(is_hidden, axis=1, dtype=jnp.float32))
        costs = cross_entropy(logits, tokens)
        return given * jnp.sum(jnp.where(is_counted, costs, 0), axis=1) / jnp.sum(is_counted, axis=1)

    nats = np.zeros((draws, LOOKS))
    for draw in range(draws):
        is_hidden = np.broadcast_to(template.is_hidden, (LOOKS, length)).copy()
        is_hidden[:, :given] = hidden_of_draw(draw, LOOKS, given)
        is_counted = is_hidden & (np.arange(length) < given)
        for block, places in batches_by_block(corruption.owners(is_hidden.mean(axis=1)), LOOKS):
            together = tuple(to_device(params[name]) for name in blueprint.names(block))
            padded = np.resize(places, LOOKS)
            nats[draw, places] = np.asarray(costs_of(together, is_hidden[padded], is_counted[padded]))[: len(places)]
    of_draws = nats.mean(axis=1) / math.log(2)
    error = np.std(of_draws, ddof=1) / math.sqrt(draws) if draws > 1 else math.nan
    return float(of_draws.mean()), float(error)


def fill(
    template: Template, corruption: Masking, blueprint: Blueprint, params: dict[str, Params]
) -> tuple[Int[np.ndarray, " t"], list[Blank]]:
    """(the tokens with the given text's blanks filled in, the blanks in order): the surest one first, then anew."""

    @jax.jit
    def logits_of(together, tokens, is_hidden):
        shared, block = blueprint.together(together)
        level = jnp.mean(is_hidden, dtype=jnp.float32)[None]
        return jax.nn.log_softmax(run_block(shared, block, tokens[None], is_hidden[None], level)[0])

    def ask(tokens: Int[np.ndarray, " t"], is_hidden: Bool[np.ndarray, " t"]) -> Logits:
        [block] = corruption.owners(is_hidden.mean(keepdims=True))
        together = tuple(to_device(params[name]) for name in blueprint.names(block))
        return np.asarray(logits_of(together, tokens, is_hidden))

    return fill_by(ask, template)


def fill_by(
    ask: Callable[[Int[np.ndarray, " t"], Bool[np.ndarray, " t"]], Logits | Array], template: Template
) -> tuple[Int[np.ndarray, " t"], list[Blank]]:
    """`fill` by what a model answers: log-probabilities of every token's symbols."""
    tokens, is_hidden = template.tokens.copy(), template.is_hidden.copy()
    blanks = []
    while is_hidden[: template.given].any():
        answer = np.exp(np.asarray(ask(tokens, is_hidden), np.float64))
        sureness = np.where(is_hidden, answer.max(axis=1), -1.0)[: template.given]
        place = int(np.argmax(sureness))
        order = np.argsort(-answer[place], kind="stable")[:LIKELIEST]
        likeliest = [(int(token), float(answer[place, token])) for token in order]
        token, probability = likeliest[0]
        blanks.append(Blank(place, token, probability, likeliest))
        tokens[place], is_hidden[place] = token, False
    return tokens, blanks

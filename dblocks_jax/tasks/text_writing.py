"""Writing text token by token: how a token is chosen, and the writing of models with one answer for each."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from dblocks_jax.models.blueprint import Blueprint
from dblocks_jax.run.devices import to_device
from dblocks_jax.run.errors import UserError
from dblocks_jax.run.streams import stream
from dblocks_jax.tasks.text import TextCard

# (parameters by part, the tokens before, how many to write, number of each sample) -> after each token: it, its logits
Writer = Callable[..., Iterator[tuple[Int[Array, " b"], Float[Array, "b v"]]]]

# (logits, numbers of the samples, position) -> a token of each
Choose = Callable[[Float[Array, "b v"], Int[Array, " b"], Int[Array, ""]], Int[Array, " b"]]


def choose_token(
    keys: Key[Array, " b"], logits: Float[Array, "b v"], temperature: float, top_p: float
) -> Int[Array, " b"]:
    """A token of each sample from softmax(logits / temperature), cut to its nucleus; at temperature 0 the likeliest.

    The nucleus is the fewest likeliest tokens whose probabilities add up to `top_p`.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / temperature
    order = jnp.argsort(-logits, axis=-1)
    probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    likelier = jnp.cumsum(probs, axis=-1) - probs  # how probable all are that are likelier than this one
    ranks = jax.vmap(jax.random.categorical)(keys, jnp.where(likelier < top_p, jnp.log(probs), -jnp.inf))
    return jnp.take_along_axis(order, ranks[:, None], axis=-1)[:, 0]


def keys_of(seed: int, name: str, samples: Int[Array, " b"], position: Int[Array, ""]) -> Key[Array, " b"]:
    """What is drawn for a token depends on the seed, the sample's number and the token's position alone."""
    return jax.vmap(lambda sample: jax.random.fold_in(stream(seed, name, sample), position))(samples)


def make_choose(config: ConfigDict) -> Choose:
    """Build what chooses tokens as a config says: greedily at temperature 0, else from the nucleus of `top_p`."""
    seed, temperature, top_p = config.seed, config.temperature, config.top_p

    def choose(logits, samples, position):
        return choose_token(keys_of(seed, "text", samples, position), logits, temperature, top_p)

    return jax.jit(choose)


def read_prompt(text: str, card: TextCard, *, if_empty: str) -> Int[np.ndarray, " t"]:
    """The tokens of a text that is to be gone on from.

    Raises:
      UserError: it is empty, and `if_empty` says what to do; too long; or holds what the model does not know.
    """
    prompt = card.vocabulary.encode(text)
    if not len(prompt):
        raise UserError(f"the text is empty: {if_empty}")
    if len(prompt) >= card.length:
        raise UserError(
            f"the text has {len(prompt)} tokens, and with what follows the model sees {card.length}: shorten it"
        )
    return prompt


def least_prompt(card: TextCard) -> str:
    """What a text begins with where none is given: a space, where the model knows one, else its first symbol."""
    vocabulary = card.vocabulary
    return " " if " " in vocabulary.symbols or vocabulary.kind == "bpe" else vocabulary.symbols[0]


def checked(write: Writer) -> Writer:
    """`write`, which when called refuses an empty prompt with a UserError."""

    def refusing(params: Any, prompt: Int[Array, "b t"], count: int, samples: Int[Array, " b"]):
        if prompt.shape[1] == 0:
            raise UserError("a text must begin with at least one token")
        return write(params, prompt, count, samples)

    return refusing


def make_cached_writer(
    blueprint: Blueprint, choose: Choose, prefill: Callable[..., Any], step: Callable[..., Any]
) -> Writer:
    """Build the writing of a model that has one answer for a token. It compiles once for all of them.

    prefill(modules, tokens [b, t], length) and step(modules, token [b], cache, position) give (logits of the token
    behind, a cache of `length` slots that holds what was given).
    """

    @partial(jax.jit, static_argnums=2)
    def read(together, prompt, length):
        return prefill(blueprint.together(together), prompt, length)

    @partial(jax.jit, donate_argnums=2)
    def go_on(together, token, cache, position):
        return step(blueprint.together(together), token, cache, position)

    def write(params, prompt, count, samples):
        together = tuple(to_device(params[name]) for name in blueprint.names(0))
        start, length = prompt.shape[1], prompt.shape[1] + count
        logits, cache = read(together, prompt, length)
        for position in range(start, length):
            token = choose(logits, samples, jnp.int32(position))
            yield token, logits
            if position < length - 1:
                logits, cache = go_on(together, token, cache, jnp.int32(position))

    return write

"""Next-token text as a task: what is scored, and against what."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dblocks_jax.data.arrays import Arrays
from dblocks_jax.data.vocabulary import letters
from dblocks_jax.fields import next_token
from dblocks_jax.models.blueprint import Blueprint
from dblocks_jax.run.errors import UserError
from dblocks_jax.tasks.next_token.chain import Chain, score_chain
from dblocks_jax.tasks.next_token.config import check, plain
from dblocks_jax.tasks.next_token.generation import make_writer, starting_noise
from dblocks_jax.tasks.next_token.task import NextToken
from dblocks_jax.tasks.text import TextCard
from dblocks_jax.tasks.text_order import make_score

LENGTH = 6


def make(*, text_length=LENGTH, **fields):
    config = next_token.get_config()
    config.update({"num_layers": 3, "hidden_size": 8, "num_heads": 2, "intermediate_size": 8} | fields)
    config.update({"text_length": text_length, "eval_batch_size": 4})
    task = NextToken(config, TextCard(letters(), text_length))
    return task, *Blueprint.of(task.modules(jax.random.key(0)))


CHUNKS = Arrays({"tokens": np.random.default_rng(0).integers(0, 27, (10, LENGTH)).astype(np.uint8)})


def test_bits_of_the_plain_model_are_minus_log2_p_of_each_token_given_those_before():
    """Also where the last batch is not full. The chain rule: here token by token, by texts cut behind it."""
    task, blueprint, params = make(model_type="llama")
    found = make_score(task, blueprint)(params, CHUNKS, lambda: None)
    (model,) = blueprint.together((params["model"],))
    tokens = jnp.asarray(CHUNKS.examples["tokens"], jnp.int32)
    answer = jax.jit(lambda cut: jax.nn.log_softmax(model(cut)))
    total = 0.0
    for i in range(1, LENGTH):
        unseen = tokens.at[:, i:].set(0)
        total -= float(answer(unseen)[jnp.arange(10), i - 1, tokens[:, i]].sum())
    assert found["bits"] == pytest.approx(total / (10 * (LENGTH - 1)) / math.log(2), rel=1e-5)


def test_blocks_that_know_nothing_need_log2_27_bits():
    task, blueprint, params = make()
    params["shared"]["head"]["linear"]["kernel"] *= 0.0
    found = make_score(task, blueprint)(params, CHUNKS, lambda: None)
    assert found["bits"] == pytest.approx(math.log2(27), abs=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "dblock"])
def test_probabilities_of_the_next_token_sum_to_one(model_type):
    """2^-bits over all second tokens, the first given. If z told of the token that is scored, it would be more."""
    task, blueprint, params = make(model_type=model_type, text_length=2)
    score = make_score(task, blueprint)
    pairs = [Arrays({"tokens": np.array([[9, last]], np.uint8)}) for last in range(27)]
    assert sum(2 ** -score(params, pair, lambda: None)["bits"] for pair in pairs) == pytest.approx(1, rel=1e-5)


def test_the_plain_model_has_no_blocks():
    config = next_token.get_config()
    config.update({"model_type": "llama", "grow_at": (0.5,)})
    with pytest.raises(UserError, match="are of DiffusionBlocks"):
        check(config)
    check(plain(config))


def test_probabilities_sum_to_one_after_every_step_and_joined():
    """Of the chain and of the blocks' joint judgement, over all second tokens: nothing of the token is told in z."""
    task, blueprint, params = make(num_blocks=3, text_length=2)
    pairs = [Arrays({"tokens": np.array([[9, last]], np.uint8)}) for last in range(27)]
    found = [score_chain(task.config, blueprint, task.card, params, pair) for pair in pairs]
    bits = np.array([[*each["bits_by_step"], each["bits_joined"]] for each in found])
    assert bits.shape == (27, 4)
    np.testing.assert_allclose(np.exp2(-bits).sum(axis=0), 1, rtol=1e-5)


def test_the_chain_goes_through_the_steps_of_the_writer():
    """Each token's last logits, from the noise that it is written from, are those that it is chosen by."""
    task, blueprint, params = make(num_blocks=3, sharing="isolated", temperature=0.0)
    tokens, samples = jnp.asarray(CHUNKS.examples["tokens"][:2], jnp.int32), jnp.array([3, 8])
    written = list(make_writer(task.config, blueprint)(params, tokens[:, :2], LENGTH - 2, samples))
    whole = jnp.concatenate([tokens[:, :2], jnp.stack([token for token, _ in written], axis=1)], axis=1)
    places = map(jnp.int32, range(LENGTH))
    z = jnp.stack([starting_noise(task.config, samples, place) for place in places], axis=1)
    *_, last = Chain(task.config, blueprint).steps(params, whole, z)
    np.testing.assert_allclose(last[:, 2:], jnp.stack([logits for _, logits in written], axis=1), atol=1e-5)

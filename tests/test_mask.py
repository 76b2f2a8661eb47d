"""Masked diffusion: the network, the bound on bits, and the sampler."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dblocks_jax.data.arrays import Arrays
from dblocks_jax.data.vocabulary import letters
from dblocks_jax.fields import mask
from dblocks_jax.models.blueprint import Blueprint
from dblocks_jax.models.masked_transformer import run_block
from dblocks_jax.run.errors import UserError
from dblocks_jax.tasks.mask.bound import hidden_of_draw, make_bound
from dblocks_jax.tasks.mask.sampler import make_sampler
from dblocks_jax.tasks.mask.task import Mask
from dblocks_jax.tasks.mask.writing import read_template, show
from dblocks_jax.tasks.task import Draws
from dblocks_jax.tasks.text import TextCard, crop
from dblocks_jax.tasks.text_scores import distinct_share, known_share, repeated_share

LENGTH = 4


def make(*, num_blocks=3, length=LENGTH, seed=0, shake=0.0, **fields):
    """(task, blueprint, parameters); with `shake` every parameter is moved at random, so that no gate is closed."""
    config = mask.get_config()
    config.update({"num_layers": num_blocks, "hidden_size": 8, "num_heads": 2, "intermediate_size": 8} | fields)
    config.update({"num_blocks": num_blocks, "text_length": length, "eval_batch_size": 16})
    task = Mask(config, TextCard(letters(), length))
    blueprint, params = Blueprint.of(task.modules(jax.random.key(seed)))
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    moved = [
        leaf + np.float32(shake / len(leaf) ** 0.5) * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves
    ]
    return task, blueprint, jax.tree.unflatten(structure, moved)


class Chunks(Arrays):
    """Tokens of a split."""

    @property
    def units(self):
        return self.examples["tokens"].size


def chunks(count, length=LENGTH, seed=0):
    return Chunks({"tokens": np.random.default_rng(seed).integers(0, 27, (count, length)).astype(np.uint8)})


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_a_model_that_knows_nothing_needs_log2_27_bits(num_blocks):
    """In every draw, not on the average alone. A fresh model's head is zero: it answers uniformly."""
    task, blueprint, params = make(num_blocks=num_blocks)
    found = make_bound(task.config, task.corruption, blueprint, 27)(params, chunks(30), 3, lambda: None)
    assert found["bits"] == pytest.approx(math.log2(27), abs=1e-6)
    assert found["bits_by_block"] == pytest.approx([math.log2(27)] * num_blocks, abs=1e-6)
    assert found["bits_error"] < 1e-6


def exact_bits(task, blueprint, params, tokens):
    """The sum over k of the mean cost of all sets of k hidden tokens, over k, each asked of its owner; no sampling."""
    length, total = len(tokens), 0.0
    answer = jax.jit(lambda together, *inputs: jax.nn.log_softmax(run_block(*blueprint.together(together), *inputs)))
    for k in range(1, length + 1):
        (owner,) = task.corruption.owners(np.array([k / length]))
        together = tuple(params[name] for name in blueprint.names(owner))
        sets = list(itertools.combinations(range(length), k))
        sets += sets[:1] * (6 - len(sets))  # one shape for all k
        is_hidden = np.array([[i in hidden for i in range(length)] for hidden in sets])
        log_p = answer(together, np.tile(tokens, (6, 1)), is_hidden, np.full(6, k / length, np.float32))
        number = math.comb(length, k)
        costs = (-np.asarray(log_p)[:, np.arange(length), tokens] * is_hidden)[:number]
        total += costs.sum() / number / k
    return total / length / math.log(2)


def test_the_bound_is_the_sum_over_all_sets_of_hidden_tokens():
    task, blueprint, params = make(shake=1.5)
    tokens = np.array([3, 0, 26, 11], np.int32)
    data = Chunks({"tokens": np.tile(tokens.astype(np.uint8), (200, 1))})
    found = make_bound(task.config, task.corruption, blueprint, 27)(params, data, 8, lambda: None)
    exact = exact_bits(task, blueprint, params, tokens)
    assert abs(exact - math.log2(27)) > 0.3  # else it would tell nothing
    assert abs(found["bits"] - exact) < 4 * found["bits_error"] < 0.2


def test_blocks_make_the_whole():
    task, blueprint, params = make(num_blocks=2, shake=1.5)
    found = make_bound(task.config, task.corruption, blueprint, 27)(params, chunks(40), 4, lambda: None)
    owned = [sum(hidden_of_draw(draw, 40, LENGTH).sum(axis=1) > 2) for draw in range(4)]  # by block 0
    share = sum(owned) / 160
    first, second = found["bits_by_block"]
    assert found["bits"] == pytest.approx(share * first + (1 - share) * second, rel=1e-9)


def test_every_number_of_tokens_is_hidden_as_often():
    is_hidden = hidden_of_draw(5, 7 * LENGTH, LENGTH)
    np.testing.assert_array_equal(np.bincount(is_hidden.sum(axis=1))[1:], [7] * LENGTH)
    assert (hidden_of_draw(6, 28, LENGTH) != is_hidden).any()


def test_what_is_hidden_is_not_looked_at():
    _, blueprint, params = make(shake=1.5)
    together = blueprint.together([params[name] for name in blueprint.names(1)])
    is_hidden, level = jnp.array([[False, True, False, True]]), jnp.array([0.5])
    run = partial(jax.jit(partial(run_block, *together)), is_hidden=is_hidden, level=level)
    logits = run(jnp.array([[1, 2, 3, 4]]))
    np.testing.assert_array_equal(run(jnp.array([[1, 9, 3, 26]])), logits)
    changed = np.abs(np.asarray(run(jnp.array([[1, 2, 5, 4]])) - logits)).max(axis=-1)
    assert (changed > 0).all()  # what is seen is, from both sides


def test_loss_is_minus_log_p_of_the_hidden_over_t():
    """Eq. 7 and 8, token by token, on what the step itself hides."""
    task, blueprint, params = make(shake=1.5)
    together = blueprint.together([params[name] for name in blueprint.names(0)])
    tokens, level = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8]]), jnp.array([0.4, 0.6])
    draws = Draws(*jax.random.split(jax.random.key(3), 4))
    losses = jax.jit(lambda *inputs: task.losses(together, *inputs))(tokens, level, draws)
    is_hidden = np.asarray(jax.random.uniform(draws.noise, (2, 4)) < level[:, None])
    assert 0 < is_hidden.sum() < 8
    log_p = jax.nn.log_softmax(jax.jit(partial(run_block, *together))(tokens, jnp.asarray(is_hidden), level))
    expected = [sum(-float(log_p[i, j, tokens[i, j]]) for j in range(4) if is_hidden[i, j]) / 4 for i in range(2)]
    np.testing.assert_allclose(losses.each, expected, rtol=1e-5)
    np.testing.assert_allclose(losses.weight, 1 / level)


def test_windows_begin_at_every_place():
    rows = jnp.tile(jnp.arange(7, dtype=jnp.uint8), (400, 1))
    windows = np.asarray(crop(jax.random.key(0), rows, LENGTH))
    assert set(windows[:, 0]) == {0, 1, 2, 3}
    np.testing.assert_array_equal(windows, windows[:, :1] + np.arange(LENGTH))
    np.testing.assert_array_equal(crop(jax.random.key(1), rows[:, :LENGTH], LENGTH), rows[:, :LENGTH])


def test_sampler_draws_from_the_model_and_keeps_what_is_given():
    """A model whose answer depends on nothing: its texts are independent draws of that distribution."""
    task, blueprint, params = make(num_inference_steps=5)
    bias = np.linspace(-2, 2, 27).astype(np.float32)
    params["shared"]["head"]["bias"] = jnp.asarray(bias)
    tokens = np.full((2000, LENGTH), 13, np.int32)
    is_hidden = np.broadcast_to(np.array([True, False, True, True]), tokens.shape)
    stages = list(make_sampler(task.config, blueprint)(params, tokens, is_hidden, 0))
    assert [owner for owner, *_ in stages] == [0, 1, 1, 2, 2]  # 0.75, 0.6, 0.45, 0.3, 0.15 are hidden
    hidden = np.array([np.asarray(still).mean() for _, _, still in stages])
    np.testing.assert_allclose(hidden, [0.6, 0.45, 0.3, 0.15, 0], atol=0.02)
    made = np.asarray(stages[-1][1])
    assert (made[:, 1] == 13).all()
    frequencies = np.bincount(made[:, [0, 2, 3]].ravel(), minlength=27) / 6000
    np.testing.assert_allclose(frequencies, np.exp(bias) / np.exp(bias).sum(), atol=0.015)


def test_blanks_are_read_and_shown():
    card = TextCard(letters(), 12)
    template = read_template("a _bc__", card)
    assert template.given == 7
    assert show(template.tokens, template.is_hidden, card) == "a _bc_______"
    for text, message in (("no blank", "nothing to fill in"), ("_" * 13, "13 symbols, of which the model sees 12")):
        with pytest.raises(UserError, match=message):
            read_template(text, card)


def test_scores_of_texts():
    """Words at the edges, which may be cut, do not count."""
    loop, varied = "x a b a b a b y", "x a b c d e f y"
    assert distinct_share([loop], 2) == 2 / 5 and distinct_share([varied], 2) == 1
    assert repeated_share([loop, varied], 4) == 1 / 6  # abab twice among 3, and 3 of their own
    assert known_share([varied], {"a", "b", "c"}) == 0.5


def test_the_network_is_told_the_level_it_is_asked_at():
    """Two levels, the same tokens: with the gates open the answers differ."""
    _, blueprint, params = make(shake=1.5)
    together = blueprint.together([params[name] for name in blueprint.names(0)])
    tokens, is_hidden = jnp.array([[1, 2, 3, 4]]), jnp.array([[True, True, True, False]])
    answer = jax.jit(partial(run_block, *together))
    answers = [answer(tokens, is_hidden, jnp.array([level])) for level in (0.7, 0.9)]
    assert np.abs(np.asarray(answers[0] - answers[1])).max() > 1e-3

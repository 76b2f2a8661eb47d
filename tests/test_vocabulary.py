"""Vocabularies: text comes back from tokens; what text8 and the library do is done; hostile ones are one line."""

import json
import re
import string
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dblocks_jax.data import bpe
from dblocks_jax.data.bpe import SPELLED, encode_bpe, read_pieces, stretches
from dblocks_jax.data.vocabulary import UNKNOWN, Vocabulary, characters_of, letters, to_letters, train_bpe
from dblocks_jax.run.errors import UserError

SPELLED_OUT = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ASCII = st.text("".join(map(chr, range(128))))
# Of one, two, three and four bytes; marks, ligatures, what is longer in lower case, what is a space and what is none.
ANY = st.text("aZ 7'\n\t\x00\x1c\x85\xa0éßİ½ﬁ™\u017f\u0301\u0489\u2028東\ufeff\ufffd🐈\U0010ffff")

TRAINING = "The cat sat on the mat; the rat ate 17 hats.\n\nCafé, naïve — ½ of 東京 🐈!\n" * 20
BPE = train_bpe(TRAINING, 290)
BPE_OF_SPACES = train_bpe("".join(" " * n + "\n" * m + "ab" for n in range(6) for m in range(6)), 262)


def test_letters_are_numbered_as_in_text8():
    assert letters().encode("az b").tolist() == [1, 26, 0, 2]
    assert letters().decode(np.arange(27)) == " " + string.ascii_lowercase


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("In 1776,  the\n\nUnited States!", "in one seven seven six the united states "),
        ("Café NAÏVE Ångström", "cafe naive angstrom"),
        ("ﬁne Straße", "fine strasse"),
        ("x²½", "x two one two "),  # a fraction has a stroke of its own
        ("東京-Tokyo", " tokyo"),
        ("\ud800a\x00b", " a b"),
        ("", ""),
    ],
)
def test_any_text_becomes_letters(text, expected):
    assert to_letters(text) == expected
    assert letters().decode(letters().encode(text)) == expected


@given(ASCII)
def test_ascii_becomes_letters_by_the_rule_that_made_text8(text):
    spelled = re.sub("[0-9]", lambda digit: f" {SPELLED_OUT[int(digit.group())]} ", text.lower())
    assert to_letters(text) == re.sub("[^a-z]+", " ", spelled)


@given(ANY)
def test_letters_stay_as_they_are(text):
    once = to_letters(text)
    assert set(once) <= set(" " + string.ascii_lowercase) and "  " not in once and to_letters(once) == once


@given(ANY, ANY)
def test_characters_come_back_and_what_is_not_known_is_marked(training, other):
    vocabulary = characters_of(training)
    assert vocabulary.decode(vocabulary.encode(training)) == training
    lost = set(other) - set(training) - {UNKNOWN}
    marked = "".join(UNKNOWN if character in lost else character for character in other)
    assert vocabulary.decode(vocabulary.encode_all(other)) == marked
    if lost:
        with pytest.raises(UserError, match="the training text has no "):
            vocabulary.encode(other)


def test_a_prompt_of_other_characters_is_told_what_to_do():
    vocabulary = characters_of("banana")
    assert vocabulary.symbols == ("a", "b", "n", UNKNOWN)
    assert vocabulary.encode("nab" + UNKNOWN).tolist() == [2, 0, 1, 3]
    with pytest.raises(UserError, match=r"no '\\x1b', 'x', '\\udcff', so the model.*without, or with �") as error:
        vocabulary.encode("\x1bax\udcff")
    assert "\n" not in str(error.value)


@given(ANY)
def test_every_text_comes_back_from_bpe(text):
    tokens = BPE.encode(text)
    assert tokens.dtype == np.int32 and BPE.decode(tokens) == text
    assert BPE.count_characters(tokens) == len(text)


def of_library(saved: str) -> Tokenizer:
    """The library's byte-level BPE of these pieces and merges."""
    model = json.loads(saved)["model"]
    tokenizer = Tokenizer(models.BPE(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer


@given(st.lists(st.integers(0, 289)))
def test_bpe_decodes_as_the_library_does(tokens):
    library = of_library(BPE.bpe)
    assert BPE.decode(np.array(tokens, np.int32)) == library.decode(tokens, skip_special_tokens=False)


@given(st.text("ab \n'1é", max_size=80))
def test_a_long_text_is_encoded_as_the_library_encodes_the_whole(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "PIECE", 3)
        assert "".join(stretches(text)) == text
        found = [token for part in encode_bpe(BPE_OF_SPACES.bpe, text) for token in part.tolist()]
    assert found == of_library(BPE_OF_SPACES.bpe).encode(text).ids


def test_bytes_are_spelled_as_the_library_spells_them():
    assert set(SPELLED) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(SPELLED.values()) == list(range(256))
    assert sorted(read_pieces(BPE.bpe)[:256]) == [bytes([byte]) for byte in range(256)]


def test_learning_twice_is_learning_the_same():
    assert train_bpe(TRAINING, 290) == BPE and len(BPE) == 290
    assert " the" in BPE.symbols and len(BPE.encode(" the")) == 1  # the commonest word


def test_a_size_that_the_text_does_not_give_is_one_line():
    with pytest.raises(UserError, match="vocab_size must be at least 256, one piece for each byte, not 255"):
        train_bpe(TRAINING, 255)
    with pytest.raises(UserError, match="the training text gives 257 pieces only: set vocab_size to 257 or less"):
        train_bpe("aa", 300)


def test_a_prompt_that_is_no_text_is_refused_by_bpe():
    with pytest.raises(UserError, match="the prompt holds bytes that are no text"):
        BPE.encode("a\udcff")


def test_without_the_library_a_model_is_read_and_only_encoding_asks_for_it(monkeypatch):
    tokens = BPE.encode("the cat")
    bpe._load.cache_clear()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert Vocabulary.of(json.loads(json.dumps(BPE.to_dict()))).decode(tokens) == "the cat"
    for ask in (lambda: BPE.encode("the cat"), lambda: train_bpe(TRAINING, 290)):
        with pytest.raises(UserError, match="needs the package tokenizers: `uv sync --extra bpe`"):
            ask()


@pytest.mark.parametrize(("count", "dtype"), [(255, "uint8"), (256, "uint16"), (65535, "uint16"), (65536, "int32")])
def test_tokens_take_the_smallest_type(count, dtype):
    text = "".join(map(chr, range(0x10000, 0x10000 + count)))  # and U+FFFD
    vocabulary = characters_of(text)
    assert vocabulary.encode_all(text).dtype == dtype
    assert vocabulary.encode_all(text).tolist() == list(range(count))


@pytest.mark.parametrize("vocabulary", [letters(), characters_of(TRAINING), BPE], ids=lambda each: each.kind)
def test_a_vocabulary_comes_back_from_json(vocabulary):
    assert Vocabulary.of(json.loads(json.dumps(vocabulary.to_dict()))) == vocabulary


def changed(**model: object) -> dict:
    """The saved BPE with another model."""
    saved = json.loads(BPE.bpe)
    return {"bpe": json.dumps(saved | {"model": saved["model"] | model})}


VOCAB = json.loads(BPE.bpe)["model"]["vocab"]
CHARACTERS = {"kind": "characters", "bpe": ""}


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "words"},
        {"kind": ["bpe"]},
        {"symbols": None},
        {"symbols": [1] * 290},
        {"symbols": BPE.symbols[::-1]},
        {"bpe": ""},
        {"bpe": 7},
        {"bpe": "{"},
        {"bpe": "[" * 100_000},
        {"bpe": '{"model": []}'},
        changed(vocab=list(VOCAB)),
        changed(vocab={piece: 0 for piece in VOCAB}),
        changed(vocab=VOCAB | {"a": True}),
        changed(vocab=VOCAB | {"b": 1e400}),
        changed(vocab={piece: number for piece, number in VOCAB.items() if number}),
        changed(vocab=VOCAB | {"a b": 290}),
        changed(vocab=VOCAB | {"": 290}),
        changed(vocab={piece * 2: number for piece, number in VOCAB.items()}),
        changed(merges=[["a", "no such piece"]]),
        changed(merges=[["z", "q"]]),
        changed(merges=[["a"]]),
        changed(merges=[[["a"], ["t"]]]),
        changed(merges=7),
        {"kind": "letters", "symbols": list("abc"), "bpe": ""},
        {"kind": "letters", "symbols": list(" " + string.ascii_lowercase)},
        {**CHARACTERS, "symbols": []},
        {**CHARACTERS, "symbols": ["a", "b"]},
        {**CHARACTERS, "symbols": ["b", "a", UNKNOWN]},
        {**CHARACTERS, "symbols": ["a", "a", UNKNOWN]},
        {**CHARACTERS, "symbols": ["ab", UNKNOWN]},
        {**CHARACTERS, "symbols": ["\ud800", UNKNOWN]},
        {**CHARACTERS, "symbols": "a" + UNKNOWN, "bpe": BPE.bpe},
    ],
)
def test_a_hostile_vocabulary_is_one_line(change):
    with pytest.raises(UserError, match=r"the saved vocabulary.* cannot be used") as error:
        Vocabulary.of(BPE.to_dict() | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("saved", [None, [], "text", {}, {"kind": "letters"}])
def test_what_is_no_vocabulary_is_one_line(saved):
    with pytest.raises(UserError, match="the saved vocabulary cannot be used"):
        Vocabulary.of(saved)


def test_rules_that_a_stranger_adds_are_not_followed():
    saved = json.loads(BPE.bpe) | {
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": None,
        "added_tokens": [{"id": 0}],
    }
    vocabulary = Vocabulary.of(BPE.to_dict() | {"bpe": json.dumps(saved)})
    assert vocabulary.encode("The CAT").tolist() == BPE.encode("The CAT").tolist()

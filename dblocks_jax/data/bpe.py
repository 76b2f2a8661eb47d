"""Byte-level BPE: every text is a sequence of pieces that are bytes joined, so nothing is unknown and nothing is lost.

Pieces are learned and found by the library `tokenizers`, and kept in its JSON, where each byte is one printable
character. What is read from that JSON is its pieces and its merges alone, and both are checked before the library gets
them: a stranger's tokenizer may hold patterns and rules of its own.
"""

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Int32

from dblocks_jax.run.errors import UserError, naming_malformed

FEWEST = 256  # every byte is a piece
PIECE = 1 << 16  # characters that are cut into pieces at once
AT_ONCE = 64  # such stretches handed to the library's threads
BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")  # no piece of the library reaches over it from the left


def _spelled() -> dict[str, int]:
    """The character that stands for each byte in the library's JSON -> the byte.

    Those that print stand for themselves, the others have the characters from 256 on, in their order.
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(others)}


SPELLED = _spelled()


def learn_bpe(text: str, size: int) -> str:
    """Pieces and merges of a tokenizer of `size` pieces, as its JSON has them; the same for the same text.

    Raises:
      UserError: the size is not one that this text gives, or `tokenizers` is not installed.
    """
    if size < FEWEST:
        raise UserError(f"vocab_size must be at least {FEWEST}, one piece for each byte, not {size}")
    library = _library()
    tokenizer = _tokenizer(library.models.BPE())
    trainer = library.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(SPELLED), special_tokens=[], show_progress=False
    )
    tokenizer.train_from_iterator(stretches(text), trainer)
    found = tokenizer.get_vocab_size()
    if found < size:
        raise UserError(f"the training text gives {found} pieces only: set vocab_size to {found} or less, not {size}")
    vocab, merges = _parse(tokenizer.to_str())
    # Only what is read back is kept: another version of the library may write more, and mean the same.
    return json.dumps({"model": {"vocab": vocab, "merges": merges}}, ensure_ascii=False)


def encode_bpe(bpe: str, text: str) -> Iterator[Int32[np.ndarray, " n"]]:
    """The pieces of a text, stretch by stretch.

    Raises:
      UserError: `tokenizers` is not installed.
    """
    tokenizer, parts = _load(bpe), stretches(text)
    while batch := [part for part, _ in zip(parts, range(AT_ONCE), strict=False)]:
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            yield np.array(encoding.ids, np.int32)


def stretches(text: str) -> Iterator[str]:
    """A text in stretches that are encoded as they would be within the whole: the library needs 100 bytes a piece."""
    start = 0
    while start < len(text):
        cut = BETWEEN_WORDS.search(text, min(start + PIECE, len(text)))
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end


@lru_cache(maxsize=4)
def read_pieces(bpe: str) -> tuple[bytes, ...]:
    """The bytes of each piece, in the order of their numbers, from a tokenizer's JSON.

    Raises:
      UserError: it is none of a byte-level BPE.
    """
    vocab, _ = _parse(bpe)
    ordered = sorted(vocab, key=vocab.__getitem__)
    return tuple(bytes(SPELLED[character] for character in piece) for piece in ordered)


def _parse(bpe: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(piece -> number, pairs that are joined, the first first), as the library takes them."""
    with naming_malformed("the saved vocabulary of BPE"):
        model = json.loads(bpe)["model"]
        vocab = dict(model["vocab"])
        merges = [(left, right) for left, right in model["merges"]]
        if not all(type(number) is int for number in vocab.values()):
            raise ValueError("a piece has a number that is none")
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError("the pieces are not numbered from 0 on")
        if not vocab.keys() >= SPELLED.keys():
            raise ValueError("a byte is missing among the pieces")
        if not all(piece and all(character in SPELLED for character in piece) for piece in vocab):
            raise ValueError("a piece is not made of bytes")
        if not all(left in vocab and right in vocab and left + right in vocab for left, right in merges):
            raise ValueError("pieces are joined that are none, or to none")
    return vocab, merges


@lru_cache(maxsize=4)
def _load(bpe: str) -> Any:
    vocab, merges = _parse(bpe)
    return _tokenizer(_library().models.BPE(vocab=vocab, merges=merges))


def _tokenizer(model: Any) -> Any:
    """Text is cut into words, as GPT-2 does, and no piece reaches over a word's end."""
    library = _library()
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UserError("vocabulary=bpe needs the package tokenizers: `uv sync --extra bpe`") from None
    return tokenizers

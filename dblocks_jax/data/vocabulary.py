"""What tokens stand for: the 27 letters of text8, the characters of a text, or pieces that BPE has learned."""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32, Integer

from dblocks_jax.data.bpe import encode_bpe, learn_bpe, read_pieces
from dblocks_jax.run.errors import UserError, naming_malformed

KINDS = ("letters", "characters", "bpe")
LETTERS = " abcdefghijklmnopqrstuvwxyz"  # in text8's order
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
UNKNOWN = "\ufffd"  # Unicode's own mark for a character that could not be represented
NUM_CODES = 0x110000  # of Unicode
AT_ONCE = 1 << 22  # characters that become tokens at once, as four bytes each on the way

MARKS = re.compile("[\u0300-\u036f]+")  # accents, once they stand beside their letters
SPACES = re.compile(rb"  +")
TO_LETTER = bytes(code if chr(code) in LETTERS else ord(" ") for code in range(256))


@dataclass(frozen=True)
class Vocabulary:
    """The text of each token. Of BPE some are parts of a character, shown as U+FFFD; their bytes are in `bpe`."""

    kind: Literal["letters", "characters", "bpe"]
    symbols: tuple[str, ...] = field(repr=False)
    bpe: str = field(default="", repr=False)  # JSON of a tokenizer of the library `tokenizers`, for "bpe"

    @classmethod
    def of(cls, saved: Any) -> "Vocabulary":
        """The vocabulary that `to_dict` gave.

        Raises:
          UserError: it is none.
        """
        with naming_malformed("the saved vocabulary"):
            kind, symbols, bpe = saved["kind"], tuple(saved["symbols"]), saved["bpe"]
            if kind not in KINDS:
                raise ValueError(f"its kind is not one of {', '.join(KINDS)}")
            if not isinstance(bpe, str) or bool(bpe) != (kind == "bpe"):
                raise ValueError("its bpe is not that of its kind")
            if not all(isinstance(symbol, str) for symbol in symbols):
                raise ValueError("a symbol is no text")
            if kind == "letters" and symbols != tuple(LETTERS):
                raise ValueError("its letters are not space and a to z")
            if kind == "characters":
                _check_characters(symbols)
            if kind == "bpe" and symbols != _shown_pieces(bpe):
                raise ValueError("its symbols are not those of its bpe")
        return cls(kind, symbols, bpe)

    def __len__(self) -> int:
        return len(self.symbols)

    @property
    def dtype(self) -> np.dtype:
        """The smallest type that holds every token."""
        return np.dtype(np.uint8 if len(self) <= 1 << 8 else np.uint16 if len(self) <= 1 << 16 else np.int32)

    def encode(self, text: str) -> Int32[np.ndarray, " n"]:
        """The tokens of what a user wrote. For "letters" the text becomes letters first, see `to_letters`.

        Raises:
          UserError: a character is not in the vocabulary, or what is written is no text.
        """
        if self.kind == "characters":
            lost = sorted(set(text) - set(self.symbols))
            if lost:
                raise UserError(
                    f"the training text has no {', '.join(map(repr, lost[:5]))}, so the model knows none: write the "
                    f"prompt without, or with {UNKNOWN} (U+FFFD), which stands for any character that is not known"
                )
        if self.kind == "bpe" and text != text.encode("utf-8", "replace").decode():
            raise UserError("the prompt holds bytes that are no text: write it in UTF-8")
        return self.encode_all(text).astype(np.int32)

    def encode_all(self, text: str) -> Integer[np.ndarray, " n"]:
        """The tokens of a text that may be long, of type `dtype`. A character that is not known becomes U+FFFD."""
        if self.kind == "letters":
            text = to_letters(text)
        parts = encode_bpe(self.bpe, text) if self.kind == "bpe" else self._look_up(text)
        return np.concatenate([np.zeros(0, self.dtype), *(part.astype(self.dtype) for part in parts)])

    def _look_up(self, text: str) -> Iterator[Integer[np.ndarray, " n"]]:
        """Token by token what a table says of each character; the last symbol of all is what is not in it."""
        table = np.full(NUM_CODES, len(self) - 1, self.dtype)
        table[[ord(symbol) for symbol in self.symbols]] = np.arange(len(self))
        for start in range(0, len(text), AT_ONCE):
            part = text[start : start + AT_ONCE].encode("utf-32-le", "surrogatepass")
            yield table[np.frombuffer(part, "<u4")]

    def decode(self, tokens: Integer[np.ndarray, " n"]) -> str:
        """The text of tokens, each of which must be below `len`. Of BPE, bytes that are no text become U+FFFD."""
        if self.kind == "bpe":
            pieces = read_pieces(self.bpe)
            return b"".join(pieces[token] for token in tokens.tolist()).decode("utf-8", "replace")
        return "".join(self.symbols[token] for token in tokens.tolist())

    def count_characters(self, tokens: Integer[np.ndarray, " n"]) -> int:
        """How many characters of text begin in these tokens: what bits per character are shared out among."""
        if self.kind != "bpe":
            return len(tokens)
        begun = np.array([sum(byte & 0xC0 != 0x80 for byte in piece) for piece in read_pieces(self.bpe)])
        return int(np.bincount(tokens, minlength=len(self)) @ begun)

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return {"kind": self.kind, "symbols": list(self.symbols), "bpe": self.bpe}

    def describe(self) -> str:
        """In words."""
        return f"{len(self)} {'pieces of BPE' if self.kind == 'bpe' else self.kind}"


def letters() -> Vocabulary:
    """The 27 symbols of text8: space is 0, a is 1."""
    return Vocabulary("letters", tuple(LETTERS))


def characters_of(training_text: str) -> Vocabulary:
    """The characters of a text in the order of their codes, and at the end U+FFFD for all that it lacks."""
    return Vocabulary("characters", (*sorted(set(training_text) - {UNKNOWN}), UNKNOWN))


def train_bpe(training_text: str, size: int) -> Vocabulary:
    """Byte-level BPE of `size` pieces, learned on a text.

    Raises:
      UserError: the size is not one that this text gives, or `tokenizers` is not installed.
    """
    bpe = learn_bpe(training_text, size)
    return Vocabulary("bpe", _shown_pieces(bpe), bpe)


def to_letters(text: str) -> str:
    """Any text in the letters of text8, made as text8 was made of Wikipedia: lower case, and each digit a word.

    Accents are dropped, ligatures taken apart; every run of other characters becomes one space. A digit is spelled out
    since it was in text8: a model of it has read "one seven seven six", and a year would be a gap otherwise. Letters
    of other alphabets are other characters, as are those that have no a-z below their accent, such as o with a stroke.
    """
    text = MARKS.sub("", unicodedata.normalize("NFKD", text).casefold())
    for digit, word in enumerate(DIGITS):
        text = text.replace(str(digit), f" {word} ")
    return SPACES.sub(b" ", text.encode("ascii", "replace").translate(TO_LETTER)).decode("ascii")


def _shown_pieces(bpe: str) -> tuple[str, ...]:
    return tuple(piece.decode("utf-8", "replace") for piece in read_pieces(bpe))


def _check_characters(symbols: tuple[str, ...]) -> None:
    """Refuse what `characters_of` does not give."""
    if not all(len(symbol) == 1 and symbol == symbol.encode("utf-8", "replace").decode() for symbol in symbols):
        raise ValueError("a symbol is not one character")
    if symbols[-1:] != (UNKNOWN,) or list(symbols[:-1]) != sorted(set(symbols) - {UNKNOWN}):
        raise ValueError("its characters are not in order, with U+FFFD at the end")

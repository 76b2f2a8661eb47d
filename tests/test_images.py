"""Files under an image's name that are none: named as what they are, never run, never waited for."""

import contextlib
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from dblocks_jax.data import folder, images
from dblocks_jax.data.datasets import load_dataset
from dblocks_jax.data.images import check_header, kind_of, read_images
from dblocks_jax.modes.predict import find_images
from dblocks_jax.run.errors import UserError

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 4 4
%%EndComments
showpage
%%EOF
"""


def save(path: Path, value: int = 0, format: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value,) * 3).save(path, format)
    return path


@pytest.fixture
def root(tmp_path) -> Path:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            save(tmp_path / "root" / split / name / "0.png")
    return tmp_path / "root"


def load(root: Path):
    dataset = load_dataset("folder", data_dir=str(root), image_size=4, val_fraction=0.0, seed=0)
    return dataset.split("train")


def assert_refused(path: Path, root: Path, monkeypatch, message: str) -> None:
    """In a class folder, small or large, and in --images; by its name in one line."""
    with pytest.raises(UserError, match=message) as in_memory:
        load(root)
    monkeypatch.setattr(folder, "IN_MEMORY_BYTES", 0)
    with pytest.raises(UserError, match=message) as by_header:
        load(root)
    monkeypatch.undo()
    named = []
    for names in ([str(path)], [str(path.parent)]):
        with pytest.raises(UserError, match=message) as error:
            read_images(find_images(names), (4, 4, 3))
        named.append(error)
    for error in (in_memory, by_header, *named):
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_postscript_under_an_images_name_starts_nothing(root, tmp_path, monkeypatch):
    """A stranger's PostScript is a program. Pillow hands it to Ghostscript, of which this is a fake."""
    mark, fake = tmp_path / "it ran", tmp_path / "bin" / "gs"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\ntouch '{mark}'\n")
    fake.chmod(0o755)
    path = root / "train" / "dog" / "zz.jpg"
    path.write_bytes(EPS)

    def lure() -> None:
        monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
        monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)

    lure()
    with contextlib.suppress(OSError), Image.open(path) as image:
        image.load()
    assert mark.exists()  # so it would run, if the plugin were reached
    mark.unlink()
    for read in (lambda: load(root), lambda: read_images([path], (4, 4, 3)), lambda: check_header(path)):
        with pytest.raises(UserError, match=r"zz.jpg: it is a PostScript file, not JPEG or PNG: convert it"):
            read()
    assert_refused(path, root, monkeypatch, "it is a PostScript file")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("format", "kind"),
    [
        ("GIF", "a GIF file"),
        ("WEBP", "a WEBP file"),
        ("BMP", "a BMP file"),
        ("TIFF", "a TIFF file"),
        ("PPM", "a PNM file"),
    ],
)
def test_another_format_under_an_images_name_is_named(root, monkeypatch, format, kind):
    path = save(root / "train" / "dog" / "zz.jpg", format=format)
    assert_refused(path, root, monkeypatch, f"it is {kind}, not JPEG or PNG: convert it")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"words", "it is neither a JPEG nor a PNG file"),
        (b"\xff\xd8\xff and no more", "it begins like a JPEG file, but is damaged|cannot read the image .*zz.jpg: "),
        (b"%PDF-1.7", "it is a PDF file"),
        (b"<!DOCTYPE html><html>", "it is a web page"),
        (b"PK\3\4", "it is an archive"),
    ],
)
def test_what_is_no_image_is_named(root, monkeypatch, content, message):
    path = root / "train" / "dog" / "zz.jpg"
    path.write_bytes(content)
    assert_refused(path, root, monkeypatch, message)


def test_kinds_are_told_by_the_first_bytes_alone():
    assert kind_of(b"\0\0\0\x1cftypavif") == "an AVIF file" and kind_of(b"\0\0\0\x1cftypheic") == "a HEIC file"
    assert kind_of(b"a GIF89a later on") is None and kind_of(b"") is None


def make_socket(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as server:  # its name may be 100 bytes long
        server.bind(path.name)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a pipe, not a file"),
        (make_socket, "a socket, not a file"),
        (lambda path: path.symlink_to("/dev/zero"), "a device, not a file"),
        (lambda path: path.symlink_to("nowhere"), "a link to nothing"),
        (lambda path: path.symlink_to("/proc/self/status"), "empty"),
    ],
)
def test_what_is_no_regular_file_is_named_and_not_waited_for(root, monkeypatch, make, kind):
    path = root / "train" / "dog" / "zz.jpg"
    make(path)
    assert_refused(path, root, monkeypatch, f"cannot read the image .*zz.jpg: it is {kind}")


def test_links_to_images_are_followed(root, tmp_path):
    (root / "train" / "dog" / "zz.jpg").symlink_to(save(tmp_path / "elsewhere.png", 7))
    assert load(root).images(np.arange(3))[:, 0, 0, 0].tolist() == [0, 0, 7]


def test_a_pipe_that_takes_the_place_of_an_image_is_named(root, monkeypatch):
    monkeypatch.setattr(folder, "IN_MEMORY_BYTES", 0)
    source = load(root)
    (root / "train" / "cat" / "0.png").unlink()
    os.mkfifo(root / "train" / "cat" / "0.png")
    with pytest.raises(UserError, match="it is a pipe, not a file"):
        source.images(np.array([0]))


def test_a_long_check_says_so_first_with_a_count(root, monkeypatch, caplog):
    caplog.set_level("INFO")
    load(root)
    assert not caplog.messages  # of few files
    monkeypatch.setattr(images, "MANY", 2)
    load(root)
    assert caplog.messages == [f"reading 2 images in {root / 'train'}"]
    caplog.clear()
    monkeypatch.setattr(images, "TELL_SECONDS", 0)
    monkeypatch.setattr(folder, "CHUNK", 1)
    monkeypatch.setattr(folder, "IN_MEMORY_BYTES", 0)
    load(root)
    where = f"images in {root / 'train'}"
    assert caplog.messages == [f"checking 2 {where}", f"checking 1 of 2 {where}", f"checking 2 of 2 {where}"]
    assert list(images.telling(range(3), total=1234, each=500, doing="%s")) == [0, 1, 2]
    assert caplog.messages[-4:] == ["1,234", "500 of 1,234", "1,000 of 1,234", "1,234 of 1,234"]

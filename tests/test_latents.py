"""Folders of latents: what numpy saved comes back, scaled; every mistake and every hostile file is one line."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from dblocks_jax.data import latents
from dblocks_jax.data.latents import LatentFiles, load_latents
from dblocks_jax.run.errors import UserError

SHAPE = (3, 3, 2)


def latent(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


def save(path: Path, value: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, value)
    return path


@pytest.fixture
def root(tmp_path) -> Path:
    """Two classes with four training latents and two test latents each."""
    for label, name in enumerate(["cat", "dog"]):
        for i in range(4):
            save(tmp_path / "train" / name / f"{i}.npy", latent(10 * label + i))
        for i in range(2):
            save(tmp_path / "test" / name / f"{i}.npy", latent(100 + 10 * label + i))
    return tmp_path


def load(root: Path, *, scale: float = 1.0, val_fraction: float = 0.0):
    return load_latents(str(root), scale=scale, val_fraction=val_fraction, seed=0)


def everything(source) -> np.ndarray:
    return source.images(np.arange(len(source)))


@pytest.mark.parametrize("in_memory", [True, False])
def test_latents_come_back_scaled_in_the_order_of_their_names(root, in_memory, monkeypatch):
    if not in_memory:
        monkeypatch.setattr(latents, "IN_MEMORY_BYTES", 8 * 4 * np.prod(SHAPE) - 1)
    (root / "train" / "cat" / ".hidden.npy").write_text("an editor's")
    (root / "train" / "notes.txt").write_text("mine")
    dataset = load(root, scale=0.18215)
    assert dataset.class_names == ("cat", "dog") and dataset.image_shape == SHAPE and dataset.name == "latents"
    assert dataset.mean == (0.0, 0.0) and dataset.std == (1.0, 1.0)
    train, test = dataset.split("train"), dataset.split("test")
    assert isinstance(train, LatentFiles) is not in_memory and dataset.split("val") is None
    expected = np.stack([latent(seed) for seed in (0, 1, 2, 3, 10, 11, 12, 13)]) * np.float32(0.18215)
    assert everything(train).dtype == np.float32 and train.labels.dtype == np.int32
    np.testing.assert_array_equal(everything(train), expected)
    np.testing.assert_array_equal(train.images(np.array([6, 1, 6])), expected[[6, 1, 6]])
    batch = train.take(np.array([5, 0]))
    np.testing.assert_array_equal(batch["image"], expected[[5, 0]])
    np.testing.assert_array_equal(batch["label"], [1, 0])
    assert train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1] and test.labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(everything(test)[2], latent(110) * np.float32(0.18215))


@pytest.mark.parametrize("stored", ["<f2", ">f4", "<f8", "F"])
def test_every_float_and_every_layout_that_numpy_saves_is_read(root, stored):
    value = latent(5).astype(np.float16)
    save(root / "train" / "cat" / "1.npy", np.asfortranarray(value) if stored == "F" else value.astype(stored))
    np.testing.assert_array_equal(everything(load(root).split("train"))[1], value)


def test_splits_are_those_of_a_folder_of_images(root):
    shutil.copytree(root / "test", root / "val")
    assert len(load(root).split("val")) == 4 and len(load(root).split("test")) == 4
    shutil.rmtree(root / "test")
    dataset = load(root, val_fraction=0.25)  # val/ alone is the test split
    assert [len(dataset.split(which)) for which in ("train", "val", "test")] == [6, 2, 4]
    together = np.concatenate([everything(dataset.split("train")), everything(dataset.split("val"))])
    assert {value.tobytes() for value in together} == {latent(seed).tobytes() for seed in (0, 1, 2, 3, 10, 11, 12, 13)}


def test_one_class_is_a_distribution_too(root):
    for split in ("train", "test"):
        shutil.rmtree(root / split / "dog")
    assert load(root).class_names == ("cat",)


def test_a_latent_that_changes_under_a_running_job_is_named(root, monkeypatch):
    monkeypatch.setattr(latents, "IN_MEMORY_BYTES", 0)
    source = load(root).split("train")
    path = root / "train" / "dog" / "0.npy"
    now = path.stat().st_mtime_ns
    save(path, latent(99))
    os.utime(path, ns=(now + 10**9, now + 10**9))
    source.images(np.array([0, 5]))
    with pytest.raises(UserError, match=r"dog/0\.npy has changed since training began"):
        source.images(np.array([0, 4]))
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read the latent .*dog/0\.npy: No such file"):
        source.images(np.array([4]))


def header(shape: str, dtype: str = "<f4") -> bytes:
    """The head of an array file that claims what it likes."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


class Bomb:
    def __reduce__(self):
        return os.abort, ()


def object_array() -> bytes:
    return header("(1, 1, 1)", "|O") + pickle.dumps(Bomb())


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (latent(0)[:2], r"has shape \[2, 3, 2\], but .*/train/cat/0.npy has \[3, 3, 2\]: all must have the same"),
        (latent(0)[0], r"has shape \[3, 2\]: it must be \[height, width, channels\]"),
        (latent(0)[:, :0], r"has shape \[3, 0, 2\]: it must be"),
        (latent(0).transpose(2, 0, 1), r"has shape \[2, 3, 3\], which looks like \[channels, height, width\]"),
        (latent(0).astype(np.uint8), "has values of type uint8: they must be floats"),
        (np.full(SHAPE, np.nan, np.float32), "has values that are not finite"),
        (np.full(SHAPE, 1e39), "not finite, or too large for float32"),
        (np.full(SHAPE, 3e38, np.float32), "not finite, or too large for float32"),  # once scaled
        (object_array(), "has values of type object: they must be floats"),
        (header("(3, 3, 2)") + bytes(71), r"is damaged: it has 71 bytes for a shape \[3, 3, 2\]"),
        (header("(3, 3, 2)") + bytes(73), "is damaged: it has 73 bytes"),
        (header("(100000, 100000, 100000)"), "is damaged: it has 0 bytes"),  # 4 PB, if one believed it
        (header("(-3, -3, 2)") + bytes(72), r"has shape \[-3, -3, 2\]: it must be"),
        (header("(3, 3, x)"), "cannot read the latent .*: ValueError: "),
        (header("(" * 60), "cannot read the latent .*: TokenError: "),
        (b"\x93NUMPY\x09\x00", "cannot read the latent .*: ValueError: "),
        (b"", "cannot read the latent .*: ValueError: "),
        (b"PK\x03\x04", "cannot read the latent .*: ValueError: "),
    ],
)
def test_a_file_that_is_no_latent_like_the_others_is_one_line(root, split, content, message):
    path = root / split / "dog" / "1.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save(path, content)
    with pytest.raises(UserError, match=message) as error:
        load(root, scale=2.0).split(split)
    assert f"the latent {path}" in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_mostly_holes_fill_no_memory(root):
    """Either takes a block of the disk, and would have taken gigabytes to read, or to write down a mean by channel."""
    path = root / "train" / "cat" / "0.npy"  # the first: others are compared with it
    for start, size, message in [
        (b"\x93NUMPY\x02\x00" + (2**32 - 1).to_bytes(4, "little"), 2**32 + 11, "EOF: reading array header"),
        (
            header("(1, 1, 1000000000)", "<f2"),
            128 + 2 * 10**9,
            r"\[1, 1, 1000000000\]: it must have at most 16,777,216",
        ),
    ]:
        path.write_bytes(start)
        os.truncate(path, size)
        with pytest.raises(UserError, match=message):
            load(root)


def test_a_home_that_nobody_has_is_a_folder_that_is_not_there():
    for name in ("~nobody-of-this-name/latents", "x" * 300):
        with pytest.raises(UserError, match=f"there is no folder {name}"):
            load(Path(name))


def test_a_pipe_a_folder_or_a_device_is_not_opened(root):
    path = root / "test" / "cat" / "0.npy"
    path.unlink()
    for put in (lambda: os.mkfifo(path), path.mkdir, lambda: path.symlink_to("/dev/zero")):
        put()
        with pytest.raises(UserError, match=r"test/cat/0\.npy is not a regular file"):
            load(root).split("test")
        path.rmdir() if path.is_dir() else path.unlink()
    path.symlink_to(root / "gone")
    with pytest.raises(UserError, match=r"cannot read the latent .*test/cat/0\.npy: No such file"):
        load(root).split("test")


def test_the_values_are_read_in_time_where_they_are_read_late(root, monkeypatch):
    """Headers at once, values batch by batch: a value that is not finite is named when it comes."""
    monkeypatch.setattr(latents, "IN_MEMORY_BYTES", 0)
    save(root / "train" / "cat" / "2.npy", np.full(SHAPE, -np.inf, np.float32))
    source = load(root).split("train")
    with pytest.raises(UserError, match=r"cat/2\.npy has values that are not finite"):
        source.images(np.array([2]))
    save(root / "train" / "cat" / "3.npy", latent(0)[:1])
    with pytest.raises(UserError, match=r"cat/3\.npy has shape \[1, 3, 2\]"):
        load(root).split("train")


def move(root: Path, old: str, new: str) -> None:
    (root / new).parent.mkdir(parents=True, exist_ok=True)
    (root / old).rename(root / new)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "there is no folder .*: set data_dir to the root of your latents"),
        (lambda root: move(root, "train", "trian"), r"train is missing: latents belong in .*/train/<class>/"),
        (lambda root: move(root, "test", "tset"), r"test is missing, and there is no .*val to use instead"),
        (lambda root: move(root, "test/dog", "test/dgo"), "test/dgo is a class that the training latents do not have"),
        (lambda root: [path.unlink() for path in root.glob("train/dog/*")], r"dog has no latent: none ends in \.npy"),
        (lambda root: shutil.rmtree(root / "train" / "cat") or move(root, "train/dog", "dog"), "has no class folders"),
        (lambda root: [shutil.rmtree(path) for path in root.glob("test/*")], "test has no latents: they belong in"),
    ],
)
def test_each_mistake_in_a_folder_is_one_line_with_its_path(root, spoil, message):
    spoil(root)
    with pytest.raises(UserError, match=message):
        load(root)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_a_scale_that_scales_nothing_is_refused(root, scale):
    with pytest.raises(UserError, match="the scale of latents must be a positive number, not"):
        load(root, scale=float(scale))


def test_a_validation_split_is_chosen_once(root):
    shutil.copytree(root / "test", root / "val")
    with pytest.raises(UserError, match=r"val_fraction must be 0, not 0\.5: .*val is the validation split"):
        load(root, val_fraction=0.5)

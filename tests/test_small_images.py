"""The script that makes folders of small images: what it makes is read by the project, and hostile archives end it."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import images as script
from dblocks_jax.data.datasets import load_dataset


def jpeg(level: int, size: int = 4) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (level,) * 3).save(file, "JPEG", quality=100)
    return file.getvalue()


def tar_of(path: Path, files: dict[str, bytes], *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:xz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in members:
            tar.addfile(member)
    return path


def cifar_like() -> dict[str, bytes]:
    """Test images first, as in the real archive; two classes, four training images each."""
    return {
        f"{split}/{name}/{i:04}.jpg": jpeg(100 * label + 10 * i)
        for split, count in (("test", 2), ("train", 4))
        for label, name in enumerate(["cat", "dog"])
        for i in range(count)
    }


def make(archive: Path, out: Path, **options) -> dict[str, int]:
    return dict(script.make_folder(archive, out, **{"size": 2, "grey": True, "classes": 10, "limit": None, **options}))


def test_a_tar_becomes_a_folder_that_the_project_reads(tmp_path):
    archive = tar_of(tmp_path / "a.tar.xz", cifar_like())
    assert make(archive, tmp_path / "new" / "out", limit=6) == {"train": 6, "test": 4}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    dataset = load_dataset("folder", data_dir=str(tmp_path / "new" / "out"), image_size=2, val_fraction=0.0, seed=0)
    train = dataset.split("train")
    assert dataset.class_names == ("cat", "dog") and train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    pixels = train.images(np.arange(6))
    assert pixels.reshape(6, -1).mean(axis=1).tolist() == [0, 10, 20, 100, 110, 120]
    with Image.open(tmp_path / "new" / "out" / "test" / "dog" / "0001.png") as image:
        assert image.mode == "L"
    assert make(archive, tmp_path / "one", classes=1, grey=False) == {"train": 4, "test": 2}
    with pytest.raises(ValueError, match=r"one has something in it: name a new folder"):
        make(archive, tmp_path / "one")
    with pytest.raises(ValueError, match="1 training images cannot be shared out among 2 classes"):
        make(archive, tmp_path / "other", limit=1)


def test_smaller_images_are_means_over_boxes():
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4) * 4
    small = np.asarray(script.shrink(Image.fromarray(pixels), 2, grey=True))
    assert small.tolist() == [[10, 18], [42, 50]]


def link(name: str, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


@pytest.mark.parametrize(
    ("files", "members", "message"),
    [
        ({"train/../../dog/0.jpg": jpeg(0)}, (), "outside the destination"),
        ({}, (link("train/cat/9.jpg", "/etc/passwd"),), "absolute path"),
        ({}, (link("train/cat/9.jpg", "0000.jpg"),), "'train/cat/9.jpg', which is no small JPEG"),
        ({"train/cat/9.png": b""}, (), "'train/cat/9.png', which is no small JPEG"),
        ({"train/cat/9.jpg": bytes(2**20 + 1)}, (), "which is no small JPEG"),
        ({"train/cat/9.jpg": b"GIF89a"}, (), "'train/cat/9.jpg', which is damaged: cannot identify"),
        ({"train/cat/9.jpg": jpeg(0)[:-1]}, (), "'train/cat/9.jpg', which is damaged: .*truncated"),
    ],
)
def test_a_hostile_archive_leaves_nothing(tmp_path, files, members, message):
    archive = tar_of(tmp_path / "a.tar.xz", cifar_like() | files, *members)
    with pytest.raises((ValueError, OSError, tarfile.TarError), match=message):
        make(archive, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [archive]


def test_fashion_mnist_becomes_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "FASHION_FILES", {"train": ("train", 20), "test": ("t10k", 10)})
    for prefix, count in (("train", 20), ("t10k", 10)):
        labels = np.arange(count, dtype=np.uint8) % 10
        pixels = np.broadcast_to(labels[:, None, None] * 20, (count, 28, 28))
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            lengths = np.array(array.shape, ">u4").tobytes()
            content = bytes([0, 0, 8, array.ndim]) + lengths + array.tobytes()
            (tmp_path / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
    assert make(tmp_path, tmp_path / "out", size=14, limit=10) == {"train": 10, "test": 10}
    with Image.open(tmp_path / "out" / "train" / "sandal" / "00005.png") as image:
        assert image.size == (14, 14) and image.getextrema() == (100, 100)
    with gzip.open(tmp_path / "train-labels-idx1-ubyte.gz", "ab") as file:
        file.write(b"\x00")
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte.gz does not hold bytes of shape \[20\]"):
        make(tmp_path, tmp_path / "other")

"""Data sets: real preparation of small archives in the official layout, folders of images, and each mistake named."""

import hashlib
import io
import socket
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dblocks_jax.data import datasets, tfds_builders
from dblocks_jax.data import folder as folder_module
from dblocks_jax.data.datasets import Dataset, FileSource, load_dataset
from dblocks_jax.run.errors import UserError

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
RNG = np.random.default_rng(0)


def load(name: str, data_dir: Path, *, image_size: int = 32, val_fraction: float = 0.0, seed: int = 0) -> Dataset:
    return load_dataset(name, data_dir=str(data_dir), image_size=image_size, val_fraction=val_fraction, seed=seed)


def everything(source) -> np.ndarray:
    return source.images(np.arange(len(source)))


# Archives.


def random_images(count: int, size: int = 32) -> np.ndarray:
    return RNG.integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def cifar_records(images: np.ndarray, *labels: np.ndarray) -> bytes:
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([*(label.astype(np.uint8)[:, None] for label in labels), planes], axis=1).tobytes()


def tar_of(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def cifar10_archive(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Six images in each of the six files, train first."""
    images, labels = random_images(36), np.arange(36) % 10
    files = {"cifar-10-batches-bin/batches.meta.txt": "\n".join([*CIFAR10_NAMES, "", ""]).encode()}
    for i, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        part = slice(6 * i, 6 * i + 6)
        files[f"cifar-10-batches-bin/{name}"] = cifar_records(images[part], labels[part])
    tar_of(path, files)
    return images, labels


def expect_archive(monkeypatch, name: str, path: Path, url: str) -> None:
    """Make the archive at `path` the official one."""
    content = path.read_bytes()
    archive = tfds_builders.Archive(url, path.name, len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(tfds_builders, "ARCHIVES", {**tfds_builders.ARCHIVES, name: archive})


@pytest.fixture
def closed_url(monkeypatch) -> str:
    """An address of this machine where nobody answers, so that no test reaches the network."""
    monkeypatch.setenv("NO_PROXY", "*")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}/archive"


def manual(data_dir: Path, filename: str) -> Path:
    return data_dir / "downloads" / "manual" / filename


def test_cifar10_comes_back_exactly_and_in_order(tmp_path, monkeypatch, closed_url, capfd):
    path = manual(tmp_path, "cifar-10-binary.tar.gz")
    images, labels = cifar10_archive(path)
    expect_archive(monkeypatch, "cifar10", path, closed_url)
    for _ in range(2):  # prepared, then read again
        dataset = load("cifar10", tmp_path)
        assert dataset.class_names == tuple(CIFAR10_NAMES) and dataset.image_shape == (32, 32, 3)
        train, test = dataset.split("train"), dataset.split("test")
        np.testing.assert_array_equal(everything(train), images[:30])
        np.testing.assert_array_equal(train.labels, labels[:30])
        np.testing.assert_array_equal(everything(test), images[30:])
        np.testing.assert_array_equal(test.labels, labels[30:])
        assert train.labels.dtype == np.int32 and dataset.split("val") is None
        assert dataset.split("test") is test
        path.unlink(missing_ok=True)
    assert capfd.readouterr().out == ""


def test_cifar100_has_the_fine_labels(tmp_path, monkeypatch, closed_url):
    path = manual(tmp_path, "cifar-100-binary.tar.gz")
    images, fine, coarse = random_images(12), np.arange(12) * 7, np.arange(12)
    names = [f"fine_{i}" for i in range(100)]
    records = {
        split: cifar_records(images[part], coarse[part], fine[part])
        for split, part in (("train", slice(8)), ("test", slice(8, 12)))
    }
    tar_of(
        path,
        {f"cifar-100-binary/{split}.bin": content for split, content in records.items()}
        | {
            "cifar-100-binary/fine_label_names.txt": "\n".join([*names, ""]).encode(),
            "cifar-100-binary/coarse_label_names.txt": b"coarse\n",
        },
    )
    expect_archive(monkeypatch, "cifar100", path, closed_url)
    dataset = load("cifar100", tmp_path)
    assert dataset.class_names == tuple(names)
    np.testing.assert_array_equal(dataset.split("train").labels, fine[:8])
    np.testing.assert_array_equal(everything(dataset.split("test")), images[8:])


def test_tiny_imagenet_tests_on_its_val_and_makes_grey_images_rgb(tmp_path, monkeypatch, closed_url):
    def jpeg(value: int, mode: str) -> bytes:
        file = io.BytesIO()
        Image.new(mode, (64, 64), value if mode == "L" else (value, value, value)).save(file, "JPEG", quality=100)
        return file.getvalue()

    wnids = [f"n{i:08}" for i in range(200)]
    root, path = "tiny-imagenet-200", manual(tmp_path, "tiny-imagenet-200.zip")
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as files:
        files.writestr(f"{root}/wnids.txt", "\n".join(reversed(wnids)) + "\n")
        files.writestr(f"{root}/words.txt", "".join(f"{wnid}\tcrane, bird\n" for wnid in wnids))
        for i, wnid in enumerate(wnids):
            files.writestr(f"{root}/train/{wnid}/{wnid}_boxes.txt", "")
            files.writestr(f"{root}/train/{wnid}/images/{wnid}_0.JPEG", jpeg(i, "L" if i % 2 else "RGB"))
        files.writestr(f"{root}/val/val_annotations.txt", f"val_0.JPEG\t{wnids[7]}\t0\t0\t1\t1\n")
        files.writestr(f"{root}/val/images/val_0.JPEG", jpeg(99, "RGB"))
        files.writestr(f"{root}/test/images/test_0.JPEG", jpeg(5, "RGB"))
    expect_archive(monkeypatch, "tiny_imagenet", path, closed_url)
    dataset = load("tiny_imagenet", tmp_path, image_size=64)
    assert dataset.class_names[:2] == ("n00000000 crane, bird", "n00000001 crane, bird")
    train, test = dataset.split("train"), dataset.split("test")
    expected = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None, None, None], (200, 64, 64, 3))
    np.testing.assert_array_equal(everything(train), expected)
    np.testing.assert_array_equal(train.labels, np.arange(200))
    assert test.labels.tolist() == [7] and (everything(test) == 99).all()


def test_another_archive_in_its_place_is_named_with_both_checksums(tmp_path, monkeypatch, closed_url):
    path = manual(tmp_path, "cifar-10-binary.tar.gz")
    cifar10_archive(path)
    expect_archive(monkeypatch, "cifar10", path, closed_url)
    expected = tfds_builders.ARCHIVES["cifar10"].sha256
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError) as error:
        load("cifar10", tmp_path)
    for part in (str(path), expected, hashlib.sha256(path.read_bytes()).hexdigest()):
        assert part in str(error.value)


class Server:
    """Serves one answer to every request, or with status None no answer at all."""

    def __init__(self, content: bytes, status: int | None = 200):
        done = self.done = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if status is None:
                    done.wait()
                    return
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

            def finish(self) -> None:
                try:
                    super().finish()
                except OSError:  # the client asked whether we are there, and left
                    self.rfile.close()

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda request, client_address: None
        self.url = f"http://127.0.0.1:{self.server.server_port}/archive"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> "Server":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def test_an_archive_is_downloaded_once(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    archive = tmp_path / "cifar-10-binary.tar.gz"
    images, _ = cifar10_archive(archive)
    data_dir = tmp_path / "data"
    with Server(archive.read_bytes()) as server:
        expect_archive(monkeypatch, "cifar10", archive, server.url)

        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(tfds_builders, "_cifar_examples", interrupted)
            with pytest.raises(KeyboardInterrupt):
                load("cifar10", data_dir)
    assert not (data_dir / "cifar10_binary" / "1.0.0").exists()
    np.testing.assert_array_equal(everything(load("cifar10", data_dir).split("train")), images[:30])


def assert_says_what_to_do(message: str, data_dir: Path) -> None:
    archive = tfds_builders.ARCHIVES["cifar10"]
    known = (archive.filename, str(archive.num_bytes), archive.sha256, str(data_dir / "downloads" / "manual"))
    for part in (*known, "configs/dblock_digits.py", "folder"):
        assert part in message
    assert "\n" not in message


def test_without_network_the_message_comes_at_once(tmp_path, monkeypatch, closed_url):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    cifar10_archive(archive)
    expect_archive(monkeypatch, "cifar10", archive, closed_url)
    start = time.perf_counter()
    with pytest.raises(UserError, match="ConnectionError") as error:
        load("cifar10", tmp_path / "data")
    assert time.perf_counter() - start < 5
    assert_says_what_to_do(str(error.value), tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("status", "content", "reason"),
    [(503, b"", "HTTP 503"), (404, b"", "HTTP 404"), (None, b"", "ReadTimeout"), (200, b"login page", "not the offic")],
)
def test_a_server_that_does_not_deliver_is_no_traceback(tmp_path, monkeypatch, status, content, reason):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(tfds_builders, "CONNECT_SECONDS", 0.3)
    archive = tmp_path / "cifar-10-binary.tar.gz"
    cifar10_archive(archive)
    with Server(content, status) as server:
        expect_archive(monkeypatch, "cifar10", archive, server.url)
        with pytest.raises(UserError, match=reason) as error:
            load("cifar10", tmp_path / "data")
    assert_says_what_to_do(str(error.value), tmp_path / "data")


def test_a_half_copied_data_set_is_not_read(tmp_path, monkeypatch, closed_url):
    path = manual(tmp_path, "cifar-10-binary.tar.gz")
    cifar10_archive(path)
    expect_archive(monkeypatch, "cifar10", path, closed_url)
    load("cifar10", tmp_path)
    (tmp_path / "cifar10_binary" / "1.0.0" / "dataset_info.json").unlink()
    with pytest.raises(UserError, match=r"cifar10_binary/1\.0\.0 is no complete data set"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x00" * 3000, "cannot reshape"),  # shorter than one record
        (b"\x00" * (2 * 3073 - 1), "cannot reshape"),  # the second is cut short
        (b"\x0a" + b"\x00" * 3072, "has the label 10, but there are 10 classes"),
    ],
)
def test_an_archive_with_a_record_that_is_none_is_refused(tmp_path, monkeypatch, closed_url, content, reason):
    path = manual(tmp_path, "cifar-10-binary.tar.gz")
    good = cifar_records(random_images(2), np.arange(2))
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    files = {"batches.meta.txt": "\n".join(CIFAR10_NAMES).encode(), **dict.fromkeys(names, good)}
    tar_of(path, files | {"data_batch_5.bin": content})
    expect_archive(monkeypatch, "cifar10", path, closed_url)
    for _ in range(2):  # nothing half-prepared is left behind that the second could take for whole
        with pytest.raises(UserError, match=f"archive of cifar10 does not hold what it should: .*{reason}"):
            load("cifar10", tmp_path)


def test_an_archive_cannot_write_outside_its_folder(tmp_path, monkeypatch, closed_url):
    """Names with .. or from the root are read by their last part, and nothing is unpacked."""
    path = manual(tmp_path / "data", "cifar-10-binary.tar.gz")
    good = cifar_records(random_images(2), np.arange(2))
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    files = {f"../../{name}": good for name in names} | {f"{tmp_path}/evil": b"evil"}
    tar_of(path, files | {"batches.meta.txt": "\n".join(CIFAR10_NAMES).encode()})
    expect_archive(monkeypatch, "cifar10", path, closed_url)
    assert len(load("cifar10", tmp_path / "data").split("train")) == 10
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]
    assert not list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize("spoil", ["cut", "flip"])
def test_a_prepared_data_set_that_was_damaged_is_named(tmp_path, monkeypatch, closed_url, spoil):
    path = manual(tmp_path, "cifar-10-binary.tar.gz")
    cifar10_archive(path)
    expect_archive(monkeypatch, "cifar10", path, closed_url)
    dataset = load("cifar10", tmp_path)
    [records] = (tmp_path / "cifar10_binary" / "1.0.0").glob("*train*")
    content = bytearray(records.read_bytes())
    middle = len(content.rstrip(b"\x00")) // 2  # the rest is padding
    if spoil == "cut":
        content = content[:middle]
    else:
        content[middle] ^= 1
    records.write_bytes(content)
    with pytest.raises(UserError, match=r"data set in .*cifar10_binary/1\.0\.0 is damaged.*remove it to prepare it"):
        dataset.split("train")


def test_a_label_out_of_range_is_named_with_its_record():
    class Records(list):
        def __getitems__(self, indices):
            return [self[index] for index in indices]

    image = np.zeros((2, 2, 3), np.uint8)
    builder = SimpleNamespace(
        data_path=Path("data/cifar10_binary/1.0.0"),
        info=SimpleNamespace(features={"label": SimpleNamespace(num_classes=10)}),
        as_data_source=lambda _: Records({"image": image, "label": label} for label in (9, 10, -1)),
    )
    with pytest.raises(UserError, match="record 1 of train has the label 10, but there are 10 classes"):
        datasets._read_prepared(builder, "train", (2, 2, 3))


def test_a_data_dir_that_cannot_be_written_is_named(tmp_path, monkeypatch, closed_url):
    path = manual(tmp_path, "cifar-10-binary.tar.gz")
    cifar10_archive(path)
    expect_archive(monkeypatch, "cifar10", path, closed_url)
    (tmp_path / "cifar10_binary").write_text("where a folder should be")
    with pytest.raises(UserError, match=f"cannot prepare cifar10 in {tmp_path}"):
        load("cifar10", tmp_path)


def test_the_official_archives_are_recorded():
    for archive in tfds_builders.ARCHIVES.values():
        assert archive.url.endswith(archive.filename) and len(archive.sha256) == 64


# Names, sizes, validation.


def test_an_unknown_name_gets_the_closest_one(tmp_path):
    with pytest.raises(UserError, match=r"'cifar-10': did you mean 'cifar10'\? Known are digits, cifar10, cifar100, "):
        load("cifar-10", tmp_path)


@pytest.mark.parametrize(("name", "size"), [("digits", 8), ("cifar10", 32), ("cifar100", 32), ("tiny_imagenet", 64)])
def test_the_image_size_must_be_that_of_the_images(tmp_path, name, size):
    with pytest.raises(UserError, match=f"images of {name} have {size}x{size}"):
        load(name, tmp_path, image_size=48)


def test_digits(tmp_path):
    dataset = load("digits", tmp_path, image_size=8)
    train, test = dataset.split("train"), dataset.split("test")
    pixels = everything(train)
    assert (len(train), len(test), dataset.split("val")) == (1437, 360, None)
    assert pixels.shape == (1437, 8, 8, 1) and pixels.dtype == np.uint8 and (pixels.min(), pixels.max()) == (0, 255)
    assert set(np.bincount(test.labels)) <= {35, 36, 37}
    np.testing.assert_allclose((pixels / 255).mean(), dataset.mean[0], atol=5e-5)
    np.testing.assert_allclose((pixels / 255).std(), dataset.std[0], atol=5e-5)
    together = {image.tobytes() for image in pixels} | {image.tobytes() for image in everything(test)}
    assert len(together) == 1797


def test_digits_are_those_of_scikit_learn_as_it_splits_them(tmp_path):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    whole = load_digits()
    parts = train_test_split(np.arange(1797), test_size=360, stratify=whole.target, random_state=0)
    for split, chosen in zip(("train", "test"), map(np.sort, parts), strict=True):
        ours = load("digits", tmp_path, image_size=8).split(split)
        np.testing.assert_array_equal(ours.labels, whole.target[chosen])
        np.testing.assert_array_equal(everything(ours)[..., 0], np.rint(whole.images[chosen] * (255 / 16)))


def test_validation_is_a_stratified_part_of_the_training_images(tmp_path):
    whole = load("digits", tmp_path, image_size=8).split("train")
    dataset = load("digits", tmp_path, image_size=8, val_fraction=0.2)
    train, val = dataset.split("train"), dataset.split("val")
    assert val is not None
    assert len(train) + len(val) == len(whole)
    np.testing.assert_allclose(np.bincount(val.labels) / np.bincount(whole.labels), 0.2, atol=0.01)
    parts = [{image.tobytes() for image in everything(source)} for source in (train, val)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == {image.tobytes() for image in everything(whole)}

    by_image = {image.tobytes(): label for image, label in zip(everything(whole), whole.labels, strict=True)}
    assert [by_image[image.tobytes()] for image in everything(val)] == val.labels.tolist()
    same, other = (load("digits", tmp_path, image_size=8, val_fraction=0.2, seed=s).split("val") for s in (0, 1))
    np.testing.assert_array_equal(everything(same), everything(val))
    assert not np.array_equal(everything(other), everything(val))


# Folders.


def save(path: Path, pixels: np.ndarray | Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


@pytest.fixture
def root(tmp_path) -> Path:
    """Two classes with four training images and one test image each, of 4x4 pixels."""
    for label, name in enumerate(["cat", "dog"]):
        for i in range(4):
            save(tmp_path / "train" / name / f"{i}.png", np.full((4, 4, 3), 10 * label + i, np.uint8))
        save(tmp_path / "test" / name / "0.png", np.full((4, 4, 3), 100 + label, np.uint8))
    return tmp_path


def folder(root: Path, **options) -> Dataset:
    return load("folder", root, **{"image_size": 4, **options})


def test_a_folder_is_read_in_the_order_of_its_names(root):
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "cat" / ".0.png").write_bytes(b"left by a file manager")
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    dataset = folder(root)
    assert dataset.class_names == ("cat", "dog") and dataset.image_shape == (4, 4, 3)
    train, test = dataset.split("train"), dataset.split("test")
    assert dataset.split("val") is None
    assert everything(train)[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert train.labels.tolist() == [0] * 4 + [1] * 4
    assert everything(test)[:, 0, 0, 0].tolist() == [100, 101] and test.labels.tolist() == [0, 1]
    assert train.images(np.array([5, 0]))[:, 0, 0, 0].tolist() == [11, 0]


def test_a_large_folder_is_decoded_by_batch_to_the_same_values(root, monkeypatch):
    expected = everything(folder(root).split("train"))
    monkeypatch.setattr(folder_module, "IN_MEMORY_BYTES", 0)
    train = folder(root).split("train")
    assert isinstance(train, FileSource)
    np.testing.assert_array_equal(everything(train), expected)


@pytest.mark.parametrize("how", ["another image", "no image", "removed"])
def test_a_file_that_changes_under_a_running_job_is_named(root, monkeypatch, how):
    monkeypatch.setattr(folder_module, "IN_MEMORY_BYTES", 0)
    train = folder(root).split("train")
    changed = train.paths[3]
    if how == "another image":
        Image.new("RGB", (5, 5)).save(changed)
    elif how == "no image":
        changed.write_bytes(b"no image")
    else:
        changed.unlink()
    with pytest.raises(UserError, match=f"the image {changed} has changed|cannot read the image {changed}"):
        everything(train)


def test_home_is_expanded(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root))
    assert len(folder(Path("~")).split("train")) == 8


def test_which_folder_is_which_split(root):
    (root / "test").rename(root / "val")
    dataset = folder(root)
    assert len(dataset.split("test")) == 2 and dataset.split("val") is None
    save(root / "test" / "cat" / "0.png", np.zeros((4, 4, 3), np.uint8))
    dataset = folder(root)
    assert (len(dataset.split("test")), len(dataset.split("val") or ())) == (1, 2)
    with pytest.raises(UserError, match=r"val_fraction must be 0, not 0\.1: .*val is the validation split"):
        folder(root, val_fraction=0.1)


def test_a_validation_part_of_a_folder(root):
    dataset = folder(root, val_fraction=0.25)
    assert dataset.split("train").labels.tolist() == [0] * 3 + [1] * 3
    assert (dataset.split("val") or dataset.split("test")).labels.tolist() == [0, 1]
    with pytest.raises(UserError, match=r"val_fraction=0\.1 of the 8 training images"):
        folder(root, val_fraction=0.1).split("val")


@pytest.mark.parametrize(
    ("mode", "pixels", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (10, 20, 30, 0), (10, 20, 30)),
        ("LA", (50, 128), (50, 50, 50)),
        ("I;16", 0x4D00, (77, 77, 77)),
    ],
)
def test_every_kind_of_image_becomes_rgb(root, mode, pixels, expected):
    save(root / "test" / "cat" / "0.png", Image.new(mode, (4, 4), pixels))
    image = everything(folder(root).split("test"))[0]
    np.testing.assert_array_equal(image, np.broadcast_to(np.uint8(expected), (4, 4, 3)))


@pytest.mark.parametrize("options", [{}, {"transparency": 0}, {"transparency": b"\x00\x80"}])
def test_a_palette_becomes_rgb(root, options):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    save(root / "test" / "cat" / "0.png", image, **options)
    found = everything(folder(root).split("test"))[0]
    np.testing.assert_array_equal(found, np.broadcast_to(np.uint8([200, 100, 50]), (4, 4, 3)))


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (8, 8), (9, 31)])
def test_the_shorter_side_is_resized_and_the_centre_kept(root, shape):
    smooth = np.add.outer(np.arange(shape[0]), 3 * np.arange(shape[1])).astype(np.uint8) * 2
    save(root / "test" / "cat" / "0.JPEG", np.repeat(smooth[..., None], 3, axis=2), quality=100, subsampling=0)
    (root / "test" / "cat" / "0.png").unlink()
    found = everything(folder(root).split("test"))[0].astype(int)
    scale = 4 / min(shape)
    with Image.open(root / "test" / "cat" / "0.JPEG") as image:
        whole = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (whole.width - 4) // 2, (whole.height - 4) // 2
    expected = np.asarray(whole.crop((left, top, left + 4, top + 4))).astype(int)
    # Where the resized length is no whole number, resizing first stretches the image a little.
    assert np.abs(found - expected).max() <= (0 if shape[0] % 4 == shape[1] % 4 == 0 else 12)


def make_one_class(root: Path) -> None:
    for split in ("train", "test"):
        for path in (root / split / "dog").iterdir():
            path.unlink()
        (root / split / "dog").rmdir()


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def truncate(path: Path) -> None:
    save(path, random_images(1)[0])
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: root.rename(root.with_name("other")), "there is no folder .*root0?"),
        (lambda root: (root / "train").rename(root / "training"), "train is missing"),
        (lambda root: (root / "test").rename(root / "tests"), "test is missing"),
        (lambda root: (root / "test" / "cow").mkdir(), "cow is a class that the training images do not have"),
        (lambda root: empty(root / "train" / "dog"), "train/dog has no image: none ends in .jpg, .jpeg, .png"),
        (lambda root: empty(root / "test" / "dog"), "test/dog has no image"),
        (make_one_class, "train has the one class 'cat'"),
        (lambda root: (root / "train" / "dog" / "2.png").write_bytes(b"no image"), r"train/dog/2\.png"),
        (lambda root: truncate(root / "train" / "dog" / "2.png"), r"train/dog/2\.png: .*truncated"),
    ],
)
def test_each_mistake_in_a_folder_is_one_line_with_its_path(root, spoil, message):
    spoil(root)
    with pytest.raises(UserError, match=message) as error:
        folder(root).split("train")
    assert "\n" not in str(error.value)


def test_a_folder_without_images_in_classes(tmp_path):
    save(tmp_path / "train" / "0.png", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "test").mkdir()
    with pytest.raises(UserError, match="train has no class folders"):
        folder(tmp_path)
    for name in ("cat", "dog"):
        save(tmp_path / "train" / name / "0.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UserError, match="test has no images"):
        folder(tmp_path)


def test_a_large_folder_has_its_headers_checked_first(root, monkeypatch):
    monkeypatch.setattr(folder_module, "IN_MEMORY_BYTES", 0)
    truncate(root / "train" / "dog" / "2.png")
    train = folder(root).split("train")
    train.images(np.array([0, 1]))
    with pytest.raises(UserError, match=r"train/dog/2\.png"):
        train.images(np.array([0, 6]))
    (root / "train" / "dog" / "3.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"train/dog/3\.png"):
        folder(root).split("train")


def test_evaluation_does_not_touch_the_training_images(root):
    (root / "train" / "dog" / "2.png").write_bytes(b"no image")
    assert len(folder(root).split("test")) == 2


def test_a_run_that_saved_no_classes_is_refused():
    digits = load_dataset("digits", data_dir="", image_size=8, val_fraction=0.0, seed=0)
    with pytest.raises(UserError, match="run has saved no class_names of its data"):
        digits.check_same({"images": 1437}, "run")

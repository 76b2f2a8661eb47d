"""TFDS builders of our own for CIFAR and Tiny ImageNet: TFDS's need TensorFlow to prepare CIFAR, and lack the other.

Importing this module imports TensorFlow Datasets. Examples keep the order of the official archives.
"""

import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums, resource
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.util import DownloadError
from tensorflow_datasets.core.units import Size

from dblocks_jax.run.errors import UserError, brief

CIFAR_SHAPE = (32, 32, 3)
CIFAR_PIXELS = 32 * 32 * 3
CONNECT_SECONDS = 5


@dataclass(frozen=True)
class Archive:
    """An official archive: where it is and what it must be."""

    url: str
    filename: str
    num_bytes: int
    sha256: str


ARCHIVES: Mapping[str, Archive] = MappingProxyType(
    {
        "cifar10": Archive(
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            "cifar-10-binary.tar.gz",
            170052171,
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
        "cifar100": Archive(
            "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            "cifar-100-binary.tar.gz",
            168513733,
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        ),
        "tiny_imagenet": Archive(
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
            "tiny-imagenet-200.zip",
            248100043,
            "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
        ),
    }
)

Examples = Iterator[tuple[int, dict[str, object]]]


class _ArchiveBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # pyright: ignore
    """Splits "train" and "test" of one archive; features "image" and "label"."""

    VERSION = tfds.core.Version("1.0.0")
    ARCHIVE: str
    NUM_CLASSES: int
    HOMEPAGE: str

    @property
    def url_infos(self) -> dict[str, checksums.UrlInfo]:
        """What TFDS checks a download against."""
        archive = ARCHIVES[self.ARCHIVE]
        return {archive.url: checksums.UrlInfo(Size(archive.num_bytes), archive.sha256, archive.filename)}

    def _image_feature(self) -> tfds.features.FeatureConnector:
        # As bytes: a protobuf list of integers is prepared eight times slower and read two times slower.
        return tfds.features.Tensor(shape=CIFAR_SHAPE, dtype=np.uint8, encoding="bytes")

    def _info(self) -> tfds.core.DatasetInfo:
        label = tfds.features.ClassLabel(num_classes=self.NUM_CLASSES)
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.ARCHIVE}, in the order of the official archive.",
            homepage=self.HOMEPAGE,
            features=tfds.features.FeaturesDict({"image": self._image_feature(), "label": label}),
            disable_shuffling=True,
        )

    def _fetch(self, dl_manager: tfds.download.DownloadManager) -> Path:
        return Path(dl_manager.download(ARCHIVES[self.ARCHIVE].url))

    def _set_class_names(self, names: Iterable[str]) -> None:
        features: Any = self.info.features
        features["label"].names = list(names)

    def _generate_examples(self, examples: Callable[[], Examples]) -> Examples:
        return examples()


class Cifar10Binary(_ArchiveBuilder):
    ARCHIVE = "cifar10"
    NUM_CLASSES = 10
    HOMEPAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        files = _read_tar(self._fetch(dl_manager))
        self._set_class_names(files["batches.meta.txt"].decode().split())
        train = b"".join(files[f"data_batch_{i}.bin"] for i in range(1, 6))
        return {
            "train": self._generate_examples(lambda: _cifar_examples(train, 10, num_labels=1)),
            "test": self._generate_examples(lambda: _cifar_examples(files["test_batch.bin"], 10, num_labels=1)),
        }


class Cifar100Binary(_ArchiveBuilder):
    """With the fine labels."""

    ARCHIVE = "cifar100"
    NUM_CLASSES = 100
    HOMEPAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        files = _read_tar(self._fetch(dl_manager))
        self._set_class_names(files["fine_label_names.txt"].decode().split())
        return {
            split: self._generate_examples(lambda data=files[f"{split}.bin"]: _cifar_examples(data, 100, num_labels=2))
            for split in ("train", "test")
        }


class TinyImagenet200(_ArchiveBuilder):
    """Images as JPEG files of 64x64 pixels, grey ones included. "test" is the archive's val, its test has no labels.

    Classes are in the order of their WordNet ids, and named by id and words, for words alone may repeat.
    """

    ARCHIVE = "tiny_imagenet"
    NUM_CLASSES = 200
    HOMEPAGE = "http://cs231n.stanford.edu/"

    def _image_feature(self) -> tfds.features.FeatureConnector:
        return tfds.features.Scalar(np.str_)  # bytes; decoded pixels would need five times the disk

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        archive = self._fetch(dl_manager)
        root = "tiny-imagenet-200/"
        with zipfile.ZipFile(archive) as files:
            wnids = sorted(files.read(f"{root}wnids.txt").decode().split())
            words = dict(line.split("\t") for line in files.read(f"{root}words.txt").decode().splitlines())
            annotations = files.read(f"{root}val/val_annotations.txt").decode().splitlines()
            names = files.namelist()
        self._set_class_names(f"{wnid} {words[wnid]}" for wnid in wnids)
        labels = {wnid: label for label, wnid in enumerate(wnids)}
        train = [(name, labels[name.split("/")[2]]) for name in names if _is_image_in(f"{root}train/", name)]
        val = [(f"{root}val/images/{line.split('\t')[0]}", labels[line.split("\t")[1]]) for line in annotations]
        return {
            "train": self._generate_examples(lambda: _zip_examples(archive, train)),
            "test": self._generate_examples(lambda: _zip_examples(archive, val)),
        }


BUILDERS = {builder.ARCHIVE: builder for builder in (Cifar10Binary, Cifar100Binary, TinyImagenet200)}


def _read_tar(path: Path) -> dict[str, bytes]:
    """File name without folder -> content. In one pass, for going back in a compressed tar means starting again."""
    with tarfile.open(path) as tar:
        members = ((Path(member.name).name, tar.extractfile(member)) for member in tar)
        return {name: file.read() for name, file in members if file is not None}


def _cifar_examples(data: bytes, num_classes: int, *, num_labels: int) -> Examples:
    """Records of `num_labels` label bytes, the finest last, and the pixels plane by plane."""
    records = np.frombuffer(data, np.uint8).reshape(-1, num_labels + CIFAR_PIXELS)
    height, width, channels = CIFAR_SHAPE
    images = records[:, num_labels:].reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
    for index, (image, label) in enumerate(zip(images, records[:, num_labels - 1], strict=True)):
        if label >= num_classes:
            raise ValueError(f"record {index} has the label {label}, but there are {num_classes} classes")
        yield index, {"image": image, "label": int(label)}


def _is_image_in(folder: str, name: str) -> bool:
    return name.startswith(folder) and name.endswith(".JPEG")


def _zip_examples(archive: Path, members: list[tuple[str, int]]) -> Examples:
    with zipfile.ZipFile(archive) as files:
        for index, (name, label) in enumerate(members):
            yield index, {"image": files.read(name), "label": label}


def prepare(name: str, data_dir: Path, *, may_write: bool = True) -> tfds.core.GeneratorBasedBuilder:
    """The prepared data set: downloaded and prepared on first use, all or nothing.

    An archive in <data_dir>/downloads/manual/ is used instead of downloading it.

    Raises:
      UserError: the archive cannot be downloaded or is not the official one, or `data_dir` cannot, or without
        `may_write` must not, be written.
    """
    archive = ARCHIVES[name]
    downloads = data_dir / "downloads"
    manual = downloads / "manual"
    try:
        builder = BUILDERS[name](data_dir=data_dir)
        if builder.data_path.exists():
            if builder.is_prepared():
                return builder
            raise UserError(f"{builder.data_path} is no complete data set: remove it to prepare {name} again")
        if not may_write:
            raise UserError(f"there is no prepared {name} in {data_dir}: set --config.data_dir to where it may be put")
        if (manual / archive.filename).exists():
            _check_archive(manual / archive.filename, archive)
        elif not (downloads / builder.name / resource.get_dl_fname(archive.url, archive.sha256)).exists():
            _check_reachable(archive.url)
        config = tfds.download.DownloadConfig(manual_dir=manual, try_download_gcs=False)
        with redirect_stdout(sys.stderr):  # stdout is for results
            builder.download_and_prepare(file_format="array_record", download_config=config)
    except (requests.RequestException, DownloadError, NonMatchingChecksumError) as error:
        raise UserError(
            f"cannot download {name} from {archive.url} ({_brief(error)}): place {archive.filename} "
            f"({archive.num_bytes} bytes, sha256 {archive.sha256}) in {manual} yourself. Nothing is downloaded by "
            "configs/dblock_digits.py, nor with dataset=folder, which takes your own images"
        ) from error
    except (ValueError, KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise UserError(f"the archive of {name} does not hold what it should: {brief(error)}") from error
    except OSError as error:
        raise UserError(f"cannot prepare {name} in {data_dir}: {error}") from error
    return builder


def _check_reachable(url: str) -> None:
    """Ask for the file with a short patience: TFDS itself tries ten times, for minutes, and waits for ever."""
    with requests.get(url, stream=True, timeout=CONNECT_SECONDS) as response:
        response.raise_for_status()


def _check_archive(path: Path, archive: Archive) -> None:
    found = checksums.compute_url_info(path)
    if (found.size, found.checksum) != (archive.num_bytes, archive.sha256):
        raise UserError(
            f"{path} is not the official archive: expected {archive.num_bytes} bytes with sha256 {archive.sha256}, "
            f"found {int(found.size)} bytes with sha256 {found.checksum}"
        )


def _brief(error: Exception) -> str:
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"HTTP {error.response.status_code}"
    if isinstance(error, NonMatchingChecksumError):
        return "what the server sent is not the official archive"
    return type(error).__name__

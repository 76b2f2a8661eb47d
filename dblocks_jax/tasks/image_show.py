"""What tasks on images show of their data, and of noise that is shared out among blocks."""

import numpy as np

from dblocks_jax.data.datasets import Dataset, Source
from dblocks_jax.pages.findings import DataShown
from dblocks_jax.pages.pictures import data_uri

SAMPLES_OF_A_CLASS, MOST_CLASSES = 6, 20


def images_shown(dataset: Dataset, about: str) -> DataShown:
    """The classes of images, how many each split has of them, and some of their images; then `about`."""
    names, shape = dataset.class_names, " x ".join(map(str, dataset.image_shape))
    found = {name: split for name in ("train", "val", "test") if (split := dataset.split(name)) is not None}
    of_class = {name: count_classes(split, dataset) for name, split in found.items()}
    pictures = samples(found["train"], dataset)
    return DataShown(
        about=f"{len(names)} classes; images of {shape} (height, width, channels). {about}",
        splits={
            name: {"images": sum(counts), "in the smallest class": min(counts), "in the largest class": max(counts)}
            for name, counts in of_class.items()
        },
        result={"images": {name: sum(counts) for name, counts in of_class.items()}, "classes": len(names)},
        pictures=pictures,
        kinds_left=len(names) - len(pictures) if pictures else 0,
        beginning="",
    )


def count_classes(split: Source, dataset: Dataset) -> list[int]:
    """How many images each class has."""
    return np.bincount(split.labels, minlength=len(dataset.class_names)).tolist()


def samples(train: Source, dataset: Dataset) -> dict[str, list[str]]:
    """The first images of the first classes, as pictures for the page. Latents are none."""
    chosen = {}
    if train.take(np.array([0]))["image"].dtype != np.uint8:
        return chosen
    for label, name in enumerate(dataset.class_names[:MOST_CLASSES]):
        indices = np.flatnonzero(train.labels == label)[:SAMPLES_OF_A_CLASS]
        chosen[name] = [data_uri(pixels) for pixels in train.images(indices)]
    return chosen

"""What tasks on images have in common: their data, and augmentation on the device."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key, UInt8
from ml_collections import ConfigDict

from dblocks_jax.data.augment import augment
from dblocks_jax.data.datasets import STORED, Card, Dataset, load_dataset
from dblocks_jax.run.checks import check_divides, check_fields
from dblocks_jax.run.errors import UserError

TYPES = {
    int: ("image_size", "patch_size", "crop_padding"),
    float: ("val_fraction",),
    bool: ("flip",),
    str: ("dataset", "data_dir"),
}
POSITIVE = ("image_size", "patch_size")
NOT_NEGATIVE = ("crop_padding",)
LARGEST = {"image_size": 4096}
NUM_LABELS = {"digits": 10, "cifar10": 10, "cifar100": 100, "tiny_imagenet": 200}


def check_image_fields(config: ConfigDict) -> None:
    """Refuse sizes that do not go together.

    Raises:
      UserError: naming the field.
    """
    check_fields(config, types=TYPES, positive=POSITIVE, not_negative=NOT_NEGATIVE, largest=LARGEST)
    if not 0 <= config.val_fraction <= 0.5:
        raise UserError(f"val_fraction must lie in [0, 0.5], not {config.val_fraction}")
    if config.crop_padding > config.image_size:
        raise UserError(f"crop_padding={config.crop_padding} must be at most image_size={config.image_size}")
    check_divides(config, "patch_size", "image_size")


def find_dataset(config: ConfigDict, *, may_prepare: bool = True) -> Dataset:
    """The data set of a config; see `load_dataset`."""
    return load_dataset(
        config.dataset,
        data_dir=config.data_dir,
        image_size=config.image_size,
        val_fraction=config.val_fraction,
        seed=config.seed,
        may_prepare=may_prepare,
    )


def card_without_images(config: ConfigDict) -> Card:
    """What the images are like, where that is known; folders are looked into.

    Raises:
      UserError: there are none.
    """
    if config.dataset not in STORED:
        return find_dataset(config)
    stored = STORED[config.dataset]
    names = tuple(map(str, range(NUM_LABELS[config.dataset])))
    shape = (config.image_size, config.image_size, stored.image_shape[2])
    return Card(names, shape, stored.mean, stored.std)


def check_card(config: ConfigDict, card: Card) -> None:
    """Refuse images of another size than the config's.

    Raises:
      UserError: naming both.
    """
    if card.image_shape[:2] != (config.image_size, config.image_size):
        raise UserError(f"the data are images of {card.image_shape}, but image_size={config.image_size}")


def image_batch(card: Card, count: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of labelled images."""
    shape = jax.ShapeDtypeStruct
    return {"image": shape((count, *card.image_shape), np.uint8), "label": shape((count,), np.int32)}


def augment_batch(config: Any, key: Key[Array, ""], images: UInt8[Array, "b h w c"]) -> UInt8[Array, "b h w c"]:
    """Training images, changed at random as a config says."""
    return augment(
        key, images,
        crop_padding=config.crop_padding, flip=config.flip,
        resized_crop=config.resized_crop, rand_augment=config.add_rand_aug,
    )  # fmt: skip


def weights_of_transformer(config: ConfigDict) -> int:
    """About how many parameters a transformer on patches has: its layers and patch embedding are nearly all of it."""
    width = config.hidden_size
    of_layer = 4 * width**2 + 2 * width * config.intermediate_size
    num_patches = (config.image_size // config.patch_size) ** 2
    return config.num_layers * of_layer + (config.patch_size**2 + num_patches) * width

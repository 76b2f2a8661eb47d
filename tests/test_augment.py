"""Crops, flips and normalisation: against Pillow where it computes the same, against the definitions elsewhere."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dblocks_jax.data.augment import augment, normalize, random_crop, random_resized_crop, resize_window

OFF = {"crop_padding": 0, "flip": False, "resized_crop": False, "rand_augment": False}


@pytest.fixture
def images():
    return jnp.asarray(np.random.default_rng(0).integers(1, 256, (64, 6, 5, 3), np.uint8))


def test_a_crop_is_a_window_of_the_padded_image(images):
    keys = jax.random.split(jax.random.key(0), 64)
    cropped = np.asarray(jax.vmap(partial(random_crop, padding=2))(keys, images))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    windows = set()
    for before, after in zip(padded, cropped, strict=True):
        found = [
            (top, left) for top in range(5) for left in range(5)
            if np.array_equal(before[top : top + 6, left : left + 5], after)
        ]  # fmt: skip
        assert found
        windows.add(found[0])
    assert len(windows) > 15  # of 25, in 64 draws


def test_flips_mirror_half_of_the_images(images):
    flipped = np.asarray(augment(jax.random.key(0), images, **(OFF | {"flip": True})))
    same = (flipped == images).all(axis=(1, 2, 3))
    mirrored = (flipped == np.asarray(images)[:, :, ::-1]).all(axis=(1, 2, 3))
    assert np.all(same ^ mirrored)
    assert 20 <= same.sum() <= 44  # 64 draws, standard deviation 4


def test_without_options_nothing_happens(images):
    np.testing.assert_array_equal(augment(jax.random.key(0), images, **OFF), images)


@pytest.mark.parametrize("option", ["flip", "rand_augment", "resized_crop"])
def test_an_image_does_not_depend_on_those_around_it(images, option):
    run = jax.jit(partial(augment, jax.random.key(3), **(OFF | {option: True})))
    np.testing.assert_array_equal(run(images)[:2], run(images[:2]))


@pytest.mark.parametrize(("top", "left", "height", "width"), [(0, 0, 6, 5), (1, 2, 3, 2), (2, 0, 1, 5), (0, 1, 5, 4)])
def test_a_window_is_enlarged_as_pillow_does(images, top, left, height, width):
    window = tuple(jnp.int32(value) for value in (top, left, height, width))
    resized = jax.jit(jax.vmap(lambda image: resize_window(image, *window)))(images)
    for before, after in zip(np.asarray(images), resized, strict=True):
        cropped = Image.fromarray(before).crop((left, top, left + width, top + height))
        np.testing.assert_array_equal(after, np.asarray(cropped.resize((5, 6), Image.Resampling.BILINEAR)))


def test_resized_crops_take_the_shares_and_aspects_they_should():
    """A linear ramp survives bilinear resizing, so its steps tell the window's height and width."""
    ramp = jnp.stack([*jnp.meshgrid(jnp.arange(64) * 3, jnp.arange(64) * 3, indexing="ij"), jnp.zeros((64, 64))], -1)
    keys = jax.random.split(jax.random.key(0), 500)
    crops = np.asarray(jax.jit(jax.vmap(lambda key: random_resized_crop(key, ramp.astype(jnp.uint8))))(keys), float)
    height = (crops[:, 40, 30, 0] - crops[:, 24, 30, 0]) / 16 / 3 * 64
    width = (crops[:, 30, 40, 1] - crops[:, 30, 24, 1]) / 16 / 3 * 64
    share, ratio = height * width / 64**2, width / height
    assert 0.05 < share.min() < 0.15 and 0.9 < share.max() < 1.1
    assert 0.65 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.5
    assert np.mean(share) == pytest.approx(0.52, abs=0.05)  # a little less than 0.54: large wide windows do not fit


def test_normalisation_by_channel():
    images = jnp.asarray([[[[0, 255]]]], jnp.uint8)
    np.testing.assert_allclose(normalize(images, (0.5, 0.2), (0.25, 0.4)), [[[[-2.0, 2.0]]]], rtol=1e-6)

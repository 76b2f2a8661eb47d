"""Augmentation on the device: uint8 images in and out, every image by a key of its own."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from dblocks_jax.data.rand_augment import rand_augment as apply_rand_augment

CROP_SCALE = (0.08, 1.0)  # share of the image's area that a resized crop takes
CROP_RATIO = (3 / 4, 4 / 3)  # its width over height
CROP_TRIES = 10
WEIGHT_BITS = 22  # of Pillow's fixed-point interpolation weights


def augment(
    key: Key[Array, ""],
    images: UInt8[Array, "b h w c"],
    *,
    crop_padding: int,
    flip: bool,
    resized_crop: bool,
    rand_augment: bool,
) -> UInt8[Array, "b h w c"]:
    """Crop (or resized crop), flip, RandAugment, in this order; an image's draws depend on its position alone."""

    def one(index: Array, image: UInt8[Array, "h w c"]) -> UInt8[Array, "h w c"]:
        key_crop, key_flip, key_rand_augment = jax.random.split(jax.random.fold_in(key, index), 3)
        if resized_crop:
            image = random_resized_crop(key_crop, image)
        elif crop_padding:
            image = random_crop(key_crop, image, crop_padding)
        if flip:
            image = jnp.where(jax.random.bernoulli(key_flip), image[:, ::-1], image)
        return apply_rand_augment(key_rand_augment, image) if rand_augment else image

    return jax.vmap(one)(jnp.arange(images.shape[0]), images)


def normalize(
    images: UInt8[Array, "b h w c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "b h w c"]:
    """(image / 255 - mean) / std, by channel."""
    shape = (1, 1, 1, len(mean))
    # One multiplication and one addition for each pixel.
    scale = jnp.asarray([1 / (255 * s) for s in std], jnp.float32).reshape(shape)
    offset = jnp.asarray([m / s for m, s in zip(mean, std, strict=True)], jnp.float32).reshape(shape)
    return images.astype(jnp.float32) * scale - offset


def random_crop(key: Key[Array, ""], image: UInt8[Array, "h w c"], padding: int) -> UInt8[Array, "h w c"]:
    """Pad with zeros on all sides, then cut a window of the image's size at a uniform place."""
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)


def random_resized_crop(key: Key[Array, ""], image: UInt8[Array, "h w c"]) -> UInt8[Array, "h w c"]:
    """Cut a random part of random aspect and resize it (bilinear) to the image's size, as torchvision does.

    Up to ten draws of area and aspect until one fits; otherwise the centre, cut to the allowed aspect.
    """
    height, width, _ = image.shape
    key_area, key_ratio, key_place = jax.random.split(key, 3)
    area = height * width * jax.random.uniform(key_area, (CROP_TRIES,), minval=CROP_SCALE[0], maxval=CROP_SCALE[1])
    log_ratio = (math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1]))
    ratio = jnp.exp(jax.random.uniform(key_ratio, (CROP_TRIES,), minval=log_ratio[0], maxval=log_ratio[1]))
    w, h = (jnp.round(jnp.sqrt(side)).astype(jnp.int32) for side in (area * ratio, area / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = jnp.argmax(fits)
    fallback_w, fallback_h = _centre_size(width, height)
    w = jnp.where(fits.any(), w[first], fallback_w)
    h = jnp.where(fits.any(), h[first], fallback_h)
    place = jax.random.uniform(key_place, (2,))
    # A uniform integer in [0, size - h]; the centre where no draw fitted.
    top = jnp.where(fits.any(), jnp.floor(place[0] * (height - h + 1)).astype(jnp.int32), (height - h) // 2)
    left = jnp.where(fits.any(), jnp.floor(place[1] * (width - w + 1)).astype(jnp.int32), (width - w) // 2)
    return resize_window(image, top, left, h, w)


def _centre_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) of the largest centred window whose aspect is allowed."""
    if width / height < CROP_RATIO[0]:
        return width, round(width / CROP_RATIO[0])
    if width / height > CROP_RATIO[1]:
        return round(height * CROP_RATIO[1]), height
    return width, height


def resize_window(
    image: UInt8[Array, "h w c"],
    top: Int[Array, ""],
    left: Int[Array, ""],
    height: Int[Array, ""],
    width: Int[Array, ""],
) -> UInt8[Array, "h w c"]:
    """A window of the image resized to the whole image's size, bilinear, in Pillow's fixed-point arithmetic.

    The window is never larger than the image, so this only enlarges, where Pillow's antialiasing changes nothing.
    """
    wide = _weigh("xw,hwc->hxc", _interpolation(image.shape[1], left, width), image)
    return _weigh("yh,hxc->yxc", _interpolation(image.shape[0], top, height), wide)


def _weigh(equation: str, weights: Int[Array, "out in"], pixels: UInt8[Array, "..."]) -> UInt8[Array, "..."]:
    """Weighted sums, rounded half up to whole pixel values."""
    total = jnp.einsum(equation, weights, pixels.astype(jnp.int32))
    return ((total + (1 << (WEIGHT_BITS - 1))) >> WEIGHT_BITS).astype(jnp.uint8)


def _interpolation(size: int, start: Int[Array, ""], length: Int[Array, ""]) -> Int[Array, "{size} {size}"]:
    """Weights [output, input], in units of 2^-22, of linear interpolation from `length` inputs to `size` outputs.

    Positions are kept as whole multiples of 1 / (2 size), so that weights, and with them ties, come out exactly.
    """
    inputs = jnp.arange(size)
    centre = (2 * jnp.arange(size) + 1) * length - size
    distance = jnp.abs(centre[:, None] - 2 * size * (inputs - start)[None])
    inside = (inputs >= start) & (inputs < start + length)
    weight = jnp.where(inside[None], jnp.maximum(0, 2 * size - distance), 0)
    # Beyond the outer pixel centres of the window one input is left, which gets all the weight.
    total = jnp.sum(weight, axis=1, keepdims=True)
    # Long division, half of the bits at a time: 22 at once would overflow int32.
    half = WEIGHT_BITS // 2
    high, rest = jnp.divmod(weight << half, total)
    return (high << half) + ((rest << (half + 1)) + total) // (2 * total)

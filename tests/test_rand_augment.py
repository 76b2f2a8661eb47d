"""Every operation of RandAugment against Pillow, called as torchvision calls it: equal, to the last bit."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from dblocks_jax.data.rand_augment import (
    OP,
    OPS,
    SIGNED,
    apply_op,
    autocontrast_table,
    blend_table,
    draw_ops,
    level,
    look_up,
    rand_augment,
)

ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}
CASES = [(name, sign) for name in OPS for sign in ((1, -1) if name in SIGNED else (1,))]


def affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=0)


def pillow(name: str, image: Image.Image, magnitude: int, sign: int) -> Image.Image:  # noqa: PLR0911
    """One operation by Pillow, with torchvision's magnitudes."""

    def strength(high: float) -> float:
        return sign * level(magnitude, 0.0, high)

    width, height = image.size
    match name:
        case "identity":
            return image
        case "shear_x":
            return affine(image, 1, math.tan(math.atan(strength(0.3))), 0, 0, 1, 0)
        case "shear_y":
            return affine(image, 1, 0, 0, math.tan(math.atan(strength(0.3))), 1, 0)
        case "translate_x":
            return affine(image, 1, 0, -int(strength(150 / 331 * width)), 0, 1, 0)
        case "translate_y":
            return affine(image, 1, 0, 0, 0, 1, -int(strength(150 / 331 * height)))
        case "rotate":
            return image.rotate(strength(30.0), Image.Resampling.NEAREST)
        case "posterize":
            return ImageOps.posterize(image, 8 - round(magnitude / 7.5))
        case "solarize":
            return ImageOps.solarize(image, level(magnitude, 255.0, 0.0))  # pyright: ignore[reportArgumentType]
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
    return ENHANCERS[name](image).enhance(1 + strength(0.9))


def examples(height: int, width: int, channels: int) -> np.ndarray:
    """Noise of several ranges, a ramp, two values, one value, one constant channel: uint8 [n, h, w, c]."""
    rng = np.random.default_rng(0)
    shape = (height, width, channels)
    images = [
        rng.integers(0, 256, shape),
        rng.integers(90, 140, shape),
        np.clip(rng.normal(120, 60, shape), 0, 255),
        np.broadcast_to(np.linspace(10, 240, height * width).reshape(height, width, 1), shape),
        np.where(rng.random(shape) < 0.3, 50, 200),
        np.full(shape, 77),
        np.where(np.arange(channels) == channels - 1, 130, rng.integers(0, 256, shape)),
    ]
    return np.stack(images).astype(np.uint8)


def as_pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


@partial(jax.jit, static_argnums=3)
def ours(ops, signs, images, magnitude):
    return jax.vmap(lambda op, sign: jax.vmap(lambda image: apply_op(op, sign, image, magnitude))(images))(ops, signs)


@pytest.mark.parametrize(
    ("height", "width", "channels", "magnitude"),
    [(32, 32, 3, 9), (9, 7, 3, 30), (8, 8, 1, 17), (33, 20, 3, 5), (28, 28, 1, 9), (7, 10, 3, 0)],
)
def test_every_operation_is_pillows(height, width, channels, magnitude):
    images = examples(height, width, channels)
    ops = jnp.array([OP[name] for name, _ in CASES])
    negative = jnp.array([sign < 0 for _, sign in CASES])
    results = np.asarray(ours(ops, negative, images, magnitude))
    for (name, sign), result in zip(CASES, results, strict=True):
        expected = np.stack([np.asarray(pillow(name, as_pillow(image), magnitude, sign)) for image in images])
        np.testing.assert_array_equal(result, expected.reshape(images.shape), err_msg=f"{name} {sign}")


@pytest.mark.parametrize("magnitude", range(31))
def test_all_pairs_of_values_blend_as_in_pillow(magnitude):
    value, degenerate = (Image.fromarray(grid.astype(np.uint8)) for grid in np.meshgrid(np.arange(256), np.arange(256)))
    for sign, table in zip((1, -1), blend_table(magnitude), strict=True):
        expected = Image.blend(degenerate, value, 1 + sign * level(magnitude, 0.0, 0.9))
        np.testing.assert_array_equal(table, expected)


@pytest.mark.long
def test_autocontrast_is_pillows_for_all_ranges_of_values():
    """Images of all values from low to high, three ranges at a time as three channels, and every range once."""
    low, high = np.triu_indices(256, 1)  # 32640 ranges, a multiple of three
    values = np.clip(np.arange(256)[None], low[:, None], high[:, None]).astype(np.uint8)
    images = values.reshape(-1, 3, 256, 1).transpose(0, 2, 3, 1)
    stretched = jax.jit(jax.vmap(lambda image: look_up(autocontrast_table(image), image)))(images)
    expected = np.stack([np.asarray(ImageOps.autocontrast(Image.fromarray(image))) for image in images])
    np.testing.assert_array_equal(stretched, expected)


def test_levels_are_torchs():
    """torch.linspace(0, 0.9, 31) and (0, 0.3, 31) at 9, 17 and 20, by torch 2.13."""
    assert [level(i, 0.0, 0.9) for i in (9, 17, 20)] == [0.26999998092651367, 0.5099999904632568, 0.5999999642372131]
    assert [level(i, 0.0, 0.3) for i in (9, 17, 20)] == [0.09000000357627869, 0.17000000178813934, 0.20000000298023224]
    assert level(9, 255.0, 0.0) == 178.5 and level(9, 0.0, 30.0) == 9.0


def test_operations_are_drawn_uniformly_and_signs_evenly():
    ops, negative = jax.jit(jax.vmap(draw_ops))(jax.random.split(jax.random.key(0), 3500))
    counts = np.bincount(np.asarray(ops).reshape(-1), minlength=len(OPS))
    assert np.sum((counts - 500) ** 2 / 500) < 34.5  # chi-square with 13 degrees of freedom, p = 0.001
    assert abs(np.mean(negative) - 0.5) < 0.02  # standard deviation 0.006
    assert np.mean(ops[:, 0] == ops[:, 1]) == pytest.approx(1 / 14, abs=0.02)  # with replacement


def test_an_image_gets_its_two_operations_in_turn():
    image = jnp.asarray(examples(9, 7, 3)[0])
    apply = jax.jit(apply_op)
    for key in jax.random.split(jax.random.key(1), 4):
        (first, second), (sign, next_sign) = draw_ops(key)
        expected = apply(second, next_sign, apply(first, sign, image))
        np.testing.assert_array_equal(jax.jit(rand_augment)(key, image), expected)


def test_compiled_and_step_by_step_agree():
    image = jnp.asarray(examples(9, 7, 3)[0])
    for name in ("rotate", "sharpness", "autocontrast"):
        arguments = (jnp.int32(OP[name]), jnp.bool_(True), image)
        np.testing.assert_array_equal(apply_op(*arguments), jax.jit(apply_op)(*arguments))

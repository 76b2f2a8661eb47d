"""RandAugment (Cubuk et al., 2019) as torchvision applies it to PIL images, bit for bit, as pure functions on arrays.

Every image goes through three families of operations, and its draw selects one result:

- geometry: one nearest-neighbour gather, at coordinates that Pillow computes in 16.16 fixed point;
- enhancement: a blend with a degenerate image (black, mean grey, greyscale or smoothed);
- tone: a table of 256 values for each channel.

What Pillow computes in floating point is computed here on the host, once, into small tables. The device is left with
integers, so a compiler that fuses a multiplication with an addition cannot move a pixel.
"""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, Key, UInt8

# In torchvision's order, which is also geometry (0-5), enhancement (6-9), tone (10-13).
OPS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate",
    "brightness", "color", "contrast", "sharpness",
    "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
OP = {name: index for index, name in enumerate(OPS)}
SIGNED = OPS[OP["shear_x"] : OP["posterize"]]  # magnitudes of these are negated half of the time
MAGNITUDE_BINS = 31

Matrix = tuple[float, float, float, float, float, float]  # 2x3 by rows, from output (x, y, 1) to input (x, y), pixels


def rand_augment(
    key: Key[Array, ""], image: UInt8[Array, "h w c"], *, num_ops: int = 2, magnitude: int = 9
) -> UInt8[Array, "h w c"]:
    """`num_ops` operations in turn, each drawn uniformly with replacement, with a random sign. c is 1 or 3."""
    ops, negative = draw_ops(key, num_ops)
    for i in range(num_ops):
        image = apply_op(ops[i], negative[i], image, magnitude)
    return image


def draw_ops(key: Key[Array, ""], num_ops: int = 2) -> tuple[Int[Array, " n"], Bool[Array, " n"]]:
    """Indices into OPS, and whether each magnitude is negated (which unsigned operations ignore)."""
    key_op, key_sign = jax.random.split(key)
    return jax.random.randint(key_op, (num_ops,), 0, len(OPS)), jax.random.bernoulli(key_sign, shape=(num_ops,))


def apply_op(
    op: Int[Array, ""], negative: Bool[Array, ""], image: UInt8[Array, "h w c"], magnitude: int = 9
) -> UInt8[Array, "h w c"]:
    """The operation OPS[op] at one of 31 magnitudes; `op` and `negative` may be traced."""
    height, width, _ = image.shape
    sign = negative.astype(jnp.int32)
    moved = warp(image, jnp.asarray(warp_table(height, width, magnitude))[sign, jnp.minimum(op, OP["rotate"])])
    enhanced = blend(jnp.asarray(blend_table(magnitude))[sign], degenerate_image(op, image), image)
    toned = look_up(tone_table(op, image, magnitude), image)
    return jnp.where(op <= OP["rotate"], moved, jnp.where(op <= OP["sharpness"], enhanced, toned))


def level(magnitude: int, low: float, high: float) -> float:
    """Entry `magnitude` of torch.linspace(low, high, 31): float32 steps counted from the nearer end, rounded once."""
    low32, high32 = np.float32(low), np.float32(high)
    step = float((high32 - low32) / np.float32(MAGNITUDE_BINS - 1))
    if magnitude < MAGNITUDE_BINS // 2:
        return float(np.float32(float(low32) + step * magnitude))
    return float(np.float32(float(high32) - step * (MAGNITUDE_BINS - 1 - magnitude)))


# Geometry


def inverse_matrices(height: int, width: int, magnitude: int, sign: int) -> list[Matrix]:
    """Output-to-input matrices of the six geometric operations, as torchvision and Pillow's `rotate` build them."""
    shear = math.radians(math.degrees(math.atan(sign * level(magnitude, 0.0, 0.3))))  # about the upper left corner
    right = math.trunc(sign * level(magnitude, 0.0, 150 / 331 * width))
    down = math.trunc(sign * level(magnitude, 0.0, 150 / 331 * height))
    angle = -math.radians(sign * level(magnitude, 0.0, 30.0) % 360)  # counterclockwise, about the image's centre
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return [
        (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
        (1.0, math.tan(shear), 0.0, 0.0, 1.0, 0.0),
        (1.0, 0.0, 0.0, math.sin(shear) / math.cos(shear), 1.0, 0.0),
        (1.0, 0.0, -float(right), 0.0, 1.0, 0.0),
        (1.0, 0.0, 0.0, 0.0, 1.0, -float(down)),
        (cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y),
    ]


def fixed_point(matrix: Matrix) -> list[int]:
    """The matrix in units of 2^-16, taken from the centre of the pixel (0, 0), as Pillow's affine transform rounds it.

    Pillow takes another path for translations, in floating point; for whole pixels both are exact.
    """
    a, b, c, d, e, f = matrix
    return [math.floor(v * 65536 + 0.5) for v in (a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5)]


@cache
def warp_table(height: int, width: int, magnitude: int) -> np.ndarray:
    """Fixed-point matrices int32 [sign, operation, 6]; sign 0 is positive."""
    matrices = [[fixed_point(m) for m in inverse_matrices(height, width, magnitude, sign)] for sign in (1, -1)]
    return np.array(matrices, np.int32)


def warp(image: UInt8[Array, "h w c"], matrix: Int32[Array, "6"]) -> UInt8[Array, "h w c"]:
    """Nearest-neighbour affine transform by a fixed-point inverse matrix; what comes from outside is 0."""
    height, width, channels = image.shape
    x, y = jnp.arange(width)[None], jnp.arange(height)[:, None]
    a, b, c, d, e, f = matrix
    column, row = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16  # the shift rounds down, below zero too
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    pixels = image.reshape(-1, channels)[jnp.where(inside, row * width + column, 0)]
    return jnp.where(inside[..., None], pixels, 0)


# Enhancement


@cache
def blend_table(magnitude: int) -> np.ndarray:
    """Pillow's `Image.blend` at factors 1 + m and 1 - m for all pairs: uint8 [sign, degenerate value, image value].

    The arithmetic is float32 and the result is cut off, not rounded, so the last bit of the product counts.
    """
    strength = level(magnitude, 0.0, 0.9)
    degenerate, value = np.arange(256, dtype=np.float32)[:, None], np.arange(256, dtype=np.float32)[None]
    blends = [degenerate + np.float32(1 + sign * strength) * (value - degenerate) for sign in (1, -1)]
    return np.clip(np.stack(blends), 0, 255).astype(np.uint8)


def blend(
    table: UInt8[Array, "256 256"], degenerate: UInt8[Array, "h w c"], image: UInt8[Array, "h w c"]
) -> UInt8[Array, "h w c"]:
    """Blend pixel by pixel, by one sign's half of `blend_table`."""
    return table.reshape(-1)[degenerate.astype(jnp.int32) * 256 + image]


def degenerate_image(op: Int[Array, ""], image: UInt8[Array, "h w c"]) -> UInt8[Array, "h w c"]:
    """What the enhancement `op` blends with; of any other operation, the image."""
    grey = greyscale(image)
    return jnp.select(
        [op == OP["brightness"], op == OP["color"], op == OP["contrast"], op == OP["sharpness"]],
        [jnp.zeros_like(image), jnp.broadcast_to(grey, image.shape), jnp.full_like(image, mean(grey)), smooth(image)],
        image,
    )


def greyscale(image: UInt8[Array, "h w c"]) -> UInt8[Array, "h w 1"]:
    """Pillow's luma (ITU-R 601-2), in fixed point. One channel is grey already."""
    if image.shape[2] == 1:
        return image
    red, green, blue = jnp.split(image.astype(jnp.int32), 3, axis=2)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(jnp.uint8)


def mean(image: UInt8[Array, "h w 1"]) -> UInt8[Array, ""]:
    """The mean value, rounded half up. Sums to 2^31 / 510 pixels."""
    return ((2 * jnp.sum(image, dtype=jnp.int32) + image.size) // (2 * image.size)).astype(jnp.uint8)


def smooth(image: UInt8[Array, "h w c"]) -> UInt8[Array, "h w c"]:
    """Pillow's SMOOTH: a 3x3 mean in which the middle counts five times; the outermost pixels stay as they are."""
    height, width, _ = image.shape
    wide = image.astype(jnp.int32)
    shifted = [wide[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3)]
    total = sum(shifted, start=4 * wide[1:-1, 1:-1])
    # Thirteen weights, rounded to the nearest. Odd, so there are no ties for Pillow's float32 to break.
    return image.at[1:-1, 1:-1].set(((total + 6) // 13).astype(jnp.uint8))


# Tone


def look_up(table: UInt8[Array, "256 c"], image: UInt8[Array, "h w c"]) -> UInt8[Array, "h w c"]:
    """Map each channel's values by its column of the table."""
    values = image.reshape(-1, image.shape[2]).astype(jnp.int32)
    return jnp.take_along_axis(table, values, axis=0).reshape(image.shape)


def tone_table(op: Int[Array, ""], image: UInt8[Array, "h w c"], magnitude: int) -> UInt8[Array, "256 c"]:
    """The table of the tone operation `op`; of any other operation, some table."""
    fixed = jnp.where(op == OP["posterize"], posterize_table(magnitude), solarize_table(magnitude))
    adaptive = jnp.where(op == OP["autocontrast"], autocontrast_table(image), equalize_table(image))
    return jnp.where(op <= OP["solarize"], fixed[:, None], adaptive)


def posterize_table(magnitude: int) -> UInt8[Array, "256"]:
    """Only the upper bits are kept: 8 down to 4 of them."""
    bits = 8 - round(magnitude / ((MAGNITUDE_BINS - 1) / 4))
    return jnp.arange(256, dtype=jnp.uint8) & jnp.uint8(256 - (1 << (8 - bits)))


def solarize_table(magnitude: int) -> UInt8[Array, "256"]:
    """Values from the threshold on are inverted."""
    threshold = math.ceil(level(magnitude, 255.0, 0.0))
    values = jnp.arange(256)
    return jnp.where(values < threshold, values, 255 - values).astype(jnp.uint8)


def autocontrast_table(image: UInt8[Array, "h w c"]) -> UInt8[Array, "256 c"]:
    """Each channel stretched linearly from its lowest and highest value to 0 and 255; one that is constant stays."""
    low, high = (bound(image, axis=(0, 1)).astype(jnp.int32) for bound in (jnp.min, jnp.max))
    values = jnp.arange(256)[:, None]
    rise, span = 255 * (jnp.clip(values, low[None], high[None]) - low[None]), jnp.maximum(high - low, 1)[None]
    exact = rise // span
    shortfall = jnp.asarray(autocontrast_shortfall())[low, high][None] >> (exact // 15) & 1
    stretched = exact - jnp.where(exact * span == rise, shortfall, 0)
    return jnp.where((low < high)[None], stretched, values).astype(jnp.uint8)


@cache
def autocontrast_shortfall() -> np.ndarray:
    """Where Pillow's doubles end up just below a whole number and are cut off to the one before it.

    Bits of int32 [lowest, highest value]: bit n // 15 for a whole result n. That is unambiguous: the whole results of a
    span are multiples of 255 / gcd(255, span), and nothing falls short where these lie closer together than 15.
    """
    table = np.zeros((256, 256), np.int32)
    for span in range(1, 256):
        rise = np.arange(span + 1)[None]
        rise = rise[:, 255 * rise[0] % span == 0]
        low = np.arange(256 - span)[:, None]
        scale = 255.0 / span
        pillow = ((low + rise) * scale + -low * scale).astype(np.int32)  # in Pillow's order of operations
        exact = 255 * rise // span
        table[low[:, 0], low[:, 0] + span] = np.sum((pillow < exact) << (exact // 15), axis=1)
    return table


def equalize_table(image: UInt8[Array, "h w c"]) -> UInt8[Array, "256 c"]:
    """Each value's rank among the channel's pixels, in 255 steps; unchanged where a step has no whole pixel."""
    below = count_below(image)
    highest = jnp.max(image, axis=(0, 1)).astype(jnp.int32)
    step = jnp.take_along_axis(below, highest[None], axis=0) // 255  # pixels of the highest value do not count
    ranks = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, ranks, jnp.arange(256)[:, None]).astype(jnp.uint8)


def count_below(image: UInt8[Array, "h w c"]) -> Int32[Array, "256 c"]:
    """How many of a channel's pixels lie below each value."""
    channels = jnp.broadcast_to(jnp.arange(image.shape[2])[None, None], image.shape)
    histogram = jnp.zeros((256, image.shape[2]), jnp.int32).at[image.astype(jnp.int32), channels].add(1)
    return jnp.cumsum(histogram, axis=0) - histogram

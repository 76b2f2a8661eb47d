"""The moving picture of the README: digits and a text forming, level by level, each by the block that owns the level.

    python docs/make_picture.py --digits=checkpoints/dit_digits --text=checkpoints/mask_text

leaves docs/blocks.gif, from runs of `configs/dit_digits.py` and `configs/mask_text.py`.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageColor, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dblocks_jax.modes.load import Trained, load_trained
from dblocks_jax.tasks.generate.sampler import make_sampler as image_sampler
from dblocks_jax.tasks.generate.sampler import sampler_plan
from dblocks_jax.tasks.mask.sampler import make_sampler as text_sampler

LEVELS, LINES, LETTERS, LAST_FRAMES = 30, 3, 62, 16
WIDTH, MARGIN, DIGIT, GAP = 860, 24, 72, 10
PAPER, INK, FAINT = "#ffffff", "#1c1c28", "#c4c4ce"
OF_BLOCK = ("#3b6fb6", "#d9822b", "#3f9b5c")


def loaded(folder: str) -> tuple[Trained, ConfigDict]:
    """A run, and its config with as many levels as there are frames."""
    trained = load_trained(folder)
    config = ConfigDict(trained.config.to_dict())
    config.num_inference_steps = LEVELS
    return trained, config


def digits(folder: str) -> Iterator[tuple[float, int, np.ndarray, np.ndarray]]:
    """(sigma, its block, what comes in, what the block believes), images of classes 0..9 in [-1, 1]."""
    trained, config = loaded(folder)
    sigmas, owners = sampler_plan(config)
    steps = image_sampler(config, trained.blueprint, trained.card)(trained.params, np.arange(10), np.arange(10), 2)
    z = None
    for i, (believed, following) in enumerate(steps):
        if z is None:  # where Euler's first step came from
            kept = sigmas[1] / sigmas[0]
            z = (following - (1 - kept) * believed) / kept
        shrink = config.sigma_data / np.hypot(sigmas[i], config.sigma_data)  # noise as bright as images
        yield float(sigmas[i]), owners[i], np.asarray(z) * shrink, np.asarray(believed)
        z = following


def texts(folder: str) -> Iterator[tuple[int, list[str], np.ndarray]]:
    """(block, letters, who uncovered each, -1 where it is hidden) after each level, [lines, letters]."""
    trained, config = loaded(folder)
    shape = (LINES, trained.card.length)
    sample = text_sampler(config, trained.blueprint)
    owner_of = np.full(shape, -1)
    for owner, tokens, is_hidden in sample(trained.params, np.zeros(shape, np.int32), np.ones(shape, bool), 7):
        owner_of[(owner_of < 0) & ~np.asarray(is_hidden)] = owner
        yield owner, [trained.card.vocabulary.decode(row) for row in np.asarray(tokens)], owner_of.copy()


def draw_blocks(draw: ImageDraw.ImageDraw, top: int, active: int, font: ImageFont.FreeTypeFont) -> None:
    """Three boxes, the one at work filled."""
    width = (WIDTH - 2 * MARGIN - 2 * GAP) // 3
    for block, color in enumerate(OF_BLOCK):
        left, is_active = MARGIN + block * (width + GAP), block == active
        box = (left, top, left + width, top + 26)
        draw.rounded_rectangle(box, 6, fill=color if is_active else PAPER, outline=color, width=2)
        draw.text((left + 12, top + 5), f"block {block}", fill=PAPER if is_active else color, font=font)


def draw_digits(image: Image.Image, top: int, pictures: np.ndarray, border: str) -> None:
    """A row of ten."""
    for i, picture in enumerate(pictures[..., 0]):
        pixels = np.clip((picture + 1) * 127.5, 0, 255).astype(np.uint8)
        left = MARGIN + i * (DIGIT + GAP)
        tile = Image.fromarray(255 - pixels).resize((DIGIT, DIGIT), Image.Resampling.NEAREST)
        image.paste(tile.convert("RGB"), (left, top))
        ImageDraw.Draw(image).rectangle((left - 1, top - 1, left + DIGIT, top + DIGIT), outline=border)


def frame(of_digits, of_texts) -> Image.Image:
    """One level of both."""
    image = Image.new("RGB", (WIDTH, 462), PAPER)
    draw, font, mono = ImageDraw.Draw(image), ImageFont.load_default(15), ImageFont.load_default(17)
    sigma, block, z, believed = of_digits
    draw_blocks(draw, 14, block, font)
    draw.text((MARGIN, 48), f"noise in, sigma = {sigma:.3g}", fill=INK, font=font)
    draw_digits(image, 70, z, FAINT)
    draw.text((MARGIN, 152), 'what this block believes, asked for "0", "1", ... "9"', fill=INK, font=font)
    draw_digits(image, 174, believed, OF_BLOCK[block])
    owner, lines, owner_of = of_texts
    draw_blocks(draw, 276, owner, font)
    draw.text((MARGIN, 310), "a text, uncovered: each letter in the color of its block", fill=INK, font=font)
    for row, line in enumerate(lines):
        for column, letter in enumerate(line[:LETTERS]):
            who = owner_of[row, column]
            at = (MARGIN + column * 13.1, 340 + row * 36)
            draw.text(at, "·" if who < 0 else letter, fill=FAINT if who < 0 else OF_BLOCK[who], font=mono)
    return image


def palette() -> Image.Image:
    """Greys, and each block's color with some of its tints: one for all frames, so that nothing flickers."""
    greys = [(level,) * 3 for level in range(0, 256, 17)]
    colors = [np.array(ImageColor.getrgb(color)) for color in (*OF_BLOCK, INK, FAINT)]
    tints = [
        tuple((share * color + (1 - share) * 255).astype(int).tolist()) for color in colors for share in (1, 0.6, 0.3)
    ]
    table = Image.new("P", (1, 1))
    table.putpalette([value for color in greys + tints for value in color])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw docs/blocks.gif.")
    parser.add_argument("--digits", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", default=str(Path(__file__).with_name("blocks.gif")))
    args = parser.parse_args()
    frames = [frame(*both) for both in zip(digits(args.digits), texts(args.text), strict=True)]
    frames = [each.quantize(palette=palette(), dither=Image.Dither.NONE) for each in frames + frames[-1:] * LAST_FRAMES]
    frames[0].save(args.out, save_all=True, append_images=frames[1:], duration=160, loop=0, optimize=True)


if __name__ == "__main__":
    main()

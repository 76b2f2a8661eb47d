"""`--mode=sample`: images by class from a trained model, as a picture, single files, and an array for FID programs."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Num
from ml_collections import ConfigDict

from dblocks_jax.data.images import telling
from dblocks_jax.modes.load import Trained, load_run, only
from dblocks_jax.run.errors import NOT_FINITE, Diverged, UserError
from dblocks_jax.run.files import saving, write_whole
from dblocks_jax.run.naming import shown
from dblocks_jax.tasks.generate.config import LARGEST_SCALE, LATENTS
from dblocks_jax.tasks.generate.pictures import write_grid, write_pictures, write_samples
from dblocks_jax.tasks.generate.pixels import to_pixels
from dblocks_jax.tasks.generate.sampler import make_sampler
from dblocks_jax.tasks.generate.task import GENERATE
from dblocks_jax.training.config import arithmetic

FOLDER, GRID, ARRAY = "samples", "samples.png", "samples.npz"
MOST_IN_GRID = 100
MOST_IMAGES = 1_000_000  # they are in memory until all are made
LONGEST_NUMBER = 20  # digits


def sample(
    config: ConfigDict,
    workdir: Path,
    *,
    classes: Sequence[str],
    count: int,
    cfg_scale: float | None,
    overrides: dict[str, Any],
    checkpoint: str,
) -> dict[str, Any]:
    """Make `count` images of `classes`, shared out evenly, and write GRID, ARRAY and single PNGs into <workdir>/FOLDER.

    `classes` are names or numbers from 0; none means all. The same seed gives the same images, whatever the batch. Of
    latents only ARRAY is written, unscaled, for the decoder that they belong to.

    Raises:
      UserError: there is no such run, class or number of images.
      Diverged: the images are not finite.
      Unsaved: they cannot be written.
    """
    if not 1 <= count <= MOST_IMAGES:
        raise UserError(f"--count must lie in [1, {MOST_IMAGES:,}], not {count}")
    trained, run = load_run(workdir, checkpoint=checkpoint, config=config, overrides=overrides)
    only(trained, workdir, GENERATE)
    labels = share_out(find_classes(classes, trained.card.class_names), count)
    scale = check_scale(trained.config.cfg_scale if cfg_scale is None else cfg_scale)
    trained.entry.warn(ConfigDict(run["config"]), ConfigDict({**trained.config.to_dict(), "cfg_scale": scale}))
    images = make_images(trained, labels, scale)
    folder = workdir / FOLDER
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # The array goes first, which needs the most room, and pictures of before go last: a full disk costs nothing.
        if trained.config.dataset == LATENTS:
            write_latents(folder / ARRAY, images / trained.config.latent_scale)
            written = set()
        else:
            write_samples(folder / ARRAY, images)
            shown_at = np.unique(np.linspace(0, count - 1, min(count, MOST_IN_GRID)).astype(int))
            write_grid(folder / GRID, images[shown_at])
            written = {folder / GRID, *write_pictures(folder, images)}
        for old in set(folder.glob("*.png")) - written:
            old.unlink()
    return {
        "mode": "sample",
        "workdir": str(workdir),
        "checkpoint": trained.step,
        "folder": str(folder),
        "num_images": count,
        "classes": [trained.card.class_names[label] for label in dict.fromkeys(labels.tolist())],
        "cfg_scale": scale,
        "seed": trained.config.seed,
    }


def write_latents(path: Path, latents: np.ndarray) -> None:
    """As `arr_0`, float32 [n, h, w, c]."""
    file = io.BytesIO()
    np.savez(file, latents.astype(np.float32))
    write_whole(path, file.getvalue())


def find_classes(named: Sequence[str], class_names: Sequence[str]) -> list[int]:
    """The numbers of classes given by name or number; all where none is given.

    Raises:
      UserError: there is none of that name, and none of that number.
    """
    found = []
    for name in named:
        if name in class_names:
            found.append(class_names.index(name))
        elif name.isdecimal() and len(name) < LONGEST_NUMBER and int(name) < len(class_names):
            found.append(int(name))
        else:
            known = ", ".join(shown(each) for each in class_names[:20]) + (", ..." if len(class_names) > 20 else "")
            raise UserError(
                f"there is no class {shown(name)}: name some of {known}, or numbers from 0 to {len(class_names) - 1}"
            )
    return found or list(range(len(class_names)))


def share_out(classes: Sequence[int], count: int) -> Int[np.ndarray, " count"]:
    """`count` labels, each class in turn of equal length."""
    return np.array([classes[i * len(classes) // count] for i in range(count)], np.int32)


def check_scale(scale: float) -> float:
    """A strength of guidance.

    Raises:
      UserError: it is none.
    """
    if not (math.isfinite(scale) and 0 <= scale <= LARGEST_SCALE):
        raise UserError(f"cfg_scale must lie in [0, {LARGEST_SCALE:g}], 1 is no guidance: not {scale}")
    return float(scale)


def make_images(
    trained: Trained, labels: Int[np.ndarray, " n"], scale: float, positions: Int[np.ndarray, " n"] | None = None
) -> Num[np.ndarray, "n h w c"]:
    """Images of the classes `labels`: uint8, or latents as the network sees them. Progress is told.

    Raises:
      Diverged: they are not finite.
    """
    config = trained.config
    positions = np.arange(len(labels), dtype=np.int32) if positions is None else positions
    size = min(config.eval_batch_size, len(labels))
    sampler = make_sampler(config, trained.blueprint, trained.card)
    starts = list(range(0, len(labels), size))
    made = []
    with arithmetic(config):
        for start in telling(starts, total=len(labels), each=size, doing="making %s images"):
            places = np.minimum(np.arange(start, start + size), len(labels) - 1)  # the last fills the last batch
            *_, (_, z) = sampler(trained.params, positions[places], labels[places], scale)
            made.append(jax.device_get(z)[: len(labels) - start])
    signal = np.concatenate(made)
    if not np.isfinite(signal).all():
        raise Diverged(f"the images are not finite: {NOT_FINITE}")
    return signal if config.dataset == LATENTS else np.asarray(to_pixels(jnp.asarray(signal)))

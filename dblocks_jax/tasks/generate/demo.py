"""A generator to play with: images of chosen classes, and what the blocks take them for on the way."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from dblocks_jax.data.sources import Source
from dblocks_jax.models.blueprint import Blueprint, Params
from dblocks_jax.pages import charts
from dblocks_jax.pages.pictures import data_uri
from dblocks_jax.run.errors import NOT_FINITE, Diverged, UserError
from dblocks_jax.run.naming import shown
from dblocks_jax.run.streams import LARGEST_SEED
from dblocks_jax.tasks.demo import Demo, Frame, Wanted, kept, number, whole_number
from dblocks_jax.tasks.generate.config import LARGEST_SCALE, LATENTS
from dblocks_jax.tasks.generate.pictures import grid
from dblocks_jax.tasks.generate.pixels import to_pixels
from dblocks_jax.tasks.generate.sampler import make_sampler, sampler_plan
from dblocks_jax.tasks.generate.task import Generate

MOST_IMAGES = 16  # so many are always made, for one program, and as many shown as were asked for
FIRST_CLASSES = 4  # that are chosen when the page opens


def demo(task: Generate, blueprint: Blueprint, params: dict[str, Params], test: Source | None) -> Demo:
    """A request is {"classes", "count", "seed", "cfg_scale"}: the images are those of `--mode=sample`.

    A frame has, after a level of the sampler, the image that its block believes to be behind the noise.

    Raises:
      UserError: the model makes latents, which are no pictures.
    """
    del test
    config, names = task.config, task.card.class_names
    if config.dataset == LATENTS:
        raise UserError("the model makes latents, of which only their decoder makes pictures: use --mode=sample")
    sampler, (sigmas, owners) = make_sampler(config, blueprint, task.card), sampler_plan(config)
    which = kept(len(sigmas))

    def answer(wanted: Wanted) -> Iterator[Frame]:
        classes, count = classes_of(wanted, len(names)), whole_number(wanted, "count", 1, MOST_IMAGES)
        seed = whole_number(wanted, "seed", 0, LARGEST_SEED)
        scale = number(wanted, "cfg_scale", 0.0, LARGEST_SCALE)
        places = np.minimum(np.arange(MOST_IMAGES, dtype=np.int32), count - 1)
        labels = np.array([classes[place * len(classes) // count] for place in places], np.int32)
        chain = sampler(params, places, labels, scale, seed)
        for i, (owner, sigma, (estimate, _)) in enumerate(zip(owners, sigmas, chain, strict=True)):
            if not jnp.isfinite(estimate).all():
                raise Diverged(NOT_FINITE)
            if i in which:
                picture = data_uri(grid(np.asarray(to_pixels(estimate))[:count]))
                about = {"step": i + 1, "of": len(sigmas), "block": owner, "sigma": float(sigma)}
                yield about | {"picture": picture}

    chosen = list(range(min(FIRST_CLASSES, len(names))))
    asked = {"classes": chosen, "count": MOST_IMAGES, "seed": config.seed, "cfg_scale": float(config.cfg_scale)}
    values = {
        "classes": [shown(name) for name in names],
        "most": MOST_IMAGES,
        "asked": asked,
        "tints": charts.tints(config.num_blocks),
    }
    # Guidance 1 is a program of its own.
    return Demo("demo_generate.html", values, [asked | {"cfg_scale": scale} for scale in (1.0, 2.0)], answer)


def classes_of(wanted: Wanted, num_classes: int) -> list[int]:
    """The classes that are asked for, by number.

    Raises:
      UserError: there are none, too many, or one of a number that there is not.
    """
    classes = wanted.get("classes")
    if not isinstance(classes, list) or not 0 < len(classes) <= num_classes:
        raise UserError("choose at least one class")
    if not all(type(label) is int and 0 <= label < num_classes for label in classes):
        raise UserError(f"classes are numbers from 0 to {num_classes - 1}")
    return classes

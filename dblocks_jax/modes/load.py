"""A trained model, ready to use: from a run's folder or from an exported one, without its data."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from logging import LogRecord
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from dblocks_jax.models.blueprint import Blueprint, Params
from dblocks_jax.run.arrays import describe, differences
from dblocks_jax.run.checkpoint import FOLDER, Checkpoints
from dblocks_jax.run.checks import check_fits_host
from dblocks_jax.run.devices import make_mesh, replicated, to_device
from dblocks_jax.run.errors import Unusable, UserError, brief, naming_malformed
from dblocks_jax.run.naming import shown
from dblocks_jax.run.regular import check_regular
from dblocks_jax.run.spilled import spill
from dblocks_jax.run.workdir import CONFIG, read_saved, scores
from dblocks_jax.tasks.classify.task import CLASSIFY, Classify
from dblocks_jax.tasks.table import entry_of
from dblocks_jax.tasks.task import Entry, Task
from dblocks_jax.training.config import (
    LARGEST_STEP,
    arithmetic,
    check_config,
    complete,
    for_evaluation,
    rest_off_device,
    rest_on_disk,
    trained_blocks,
)
from dblocks_jax.training.setting import shapes_of

# An exported folder: parameters, and beside them CONFIG with what is needed to use them.
WEIGHTS = "model.safetensors"
FOLDER_FORMAT = "dblocks_jax 1"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # names there -> names here
MOST_DIFFERING = 20  # arrays that a message names


@dataclass(frozen=True)
class Trained:
    """A model with its numbers."""

    entry: Entry = field(repr=False)
    config: ConfigDict = field(repr=False)
    card: Any  # what a newcomer must know of its data
    step: int  # of training
    task: Task = field(repr=False)
    blueprint: Blueprint = field(repr=False)
    params: dict[str, Params] = field(repr=False)  # by part

    def together(self, block: int) -> tuple[Any, ...]:
        """The modules that answer together at a block's levels, on the device: what is shared, and the block."""
        return self.blueprint.together([to_device(self.params[name]) for name in self.blueprint.names(block)])


@dataclass(frozen=True)
class Classifier:
    """A trained classifier. Call it with a batch of images.

    Images are uint8 [b, h, w, c] as they are in the data set: normalisation is inside, and every batch size compiles
    once. Under `init_noise_scale` > 0 an image's noise depends on the seed and on its place in the batch.
    """

    trained: Trained

    @property
    def config(self) -> ConfigDict:
        """That of its run, with the sampler's fields as they are used here."""
        return self.trained.config

    @property
    def card(self) -> Any:
        """Class names; height, width and channels of the images."""
        return self.trained.card

    @property
    def step(self) -> int:
        """Of training."""
        return self.trained.step

    @property
    def params(self) -> dict[str, Params]:
        """By part."""
        return self.trained.params

    @cached_property
    def classify(self) -> Any:
        """(parameters by part, images, positions) -> logits after each denoising step."""
        task = self.trained.task
        assert isinstance(task, Classify)
        return task.classifier(self.trained.blueprint)

    def __call__(self, images: UInt8[np.ndarray | Array, "b h w c"]) -> Float[Array, "b classes"]:
        """The model's answer: logits.

        Raises:
          UserError: the images have another type or shape than those it was trained on.
        """
        return self.by_step(images)[-1]

    def by_step(self, images: UInt8[np.ndarray | Array, "b h w c"]) -> Float[Array, "n b classes"]:
        """Logits after each denoising step; the last ones are the answer. The plain model has one step.

        Raises:
          UserError: the images have another type or shape than those it was trained on.
        """
        if not isinstance(images, np.ndarray | jax.Array):
            raise UserError("images must be an array: np.stack makes one of a list")
        if images.dtype != np.uint8 or images.shape[1:] != self.card.image_shape:
            raise UserError(
                f"images must be uint8 [b, {', '.join(map(str, self.card.image_shape))}], "
                f"not {images.dtype} {list(images.shape)}"
            )
        with arithmetic(self.config):
            positions = jnp.arange(len(images), dtype=jnp.int32)
            return self.classify(self.params, jnp.asarray(images), positions)


def load_classifier(folder: str | Path, checkpoint: str = "best") -> Classifier:
    """The trained classifier of a run, whose `checkpoint` is "best", "last" or a step; or that of an exported folder.

    Raises:
      UserError: there is no such run or checkpoint, it is damaged, or does not classify.
    """
    return Classifier(only(load_trained(folder, checkpoint), Path(folder), CLASSIFY))


def load_trained(folder: str | Path, checkpoint: str = "best", own: Entry | None = None) -> Trained:
    """The trained model of a run or of an exported folder, whatever its task. A run of your `own` needs its entry.

    Raises:
      UserError: there is no such run or checkpoint, or it is damaged.
    """
    folder = Path(folder)
    with _without_orbax():
        if (folder / WEIGHTS).exists():
            return load_exported(folder)
        return load_run(folder, checkpoint=checkpoint, own=own)[0]


def only(trained: Trained, where: Path, *entries: Entry) -> Trained:
    """`trained`, if it is of one of these tasks.

    Raises:
      UserError: it is of another.
    """
    names = [entry.name for entry in entries]
    if trained.entry.name not in names:
        raise UserError(f"{where} holds a model of the task {trained.entry.name}, not of {' or '.join(names)}")
    return trained


def load_exported(folder: Path) -> Trained:
    """The model that `--mode=export` wrote into a folder.

    Raises:
      UserError: a file is missing or damaged, or the parameters are not those of its config.
    """
    for name in (WEIGHTS, CONFIG):
        check_regular(folder / name, "the exported file")
    about = read_saved(folder, CONFIG)
    if about is None or about.get("format") != FOLDER_FORMAT:
        raise UserError(f"{folder / CONFIG} is not the one that --mode=export writes")
    with naming_malformed(folder / CONFIG):
        config, step = ConfigDict(complete(about["config"])), about["step"]
        if type(step) is not int or not 0 <= step <= LARGEST_STEP:
            raise ValueError("its step is none")
        try:
            entry = entry_of(config)
            check_config(entry, config)
        except UserError as error:
            raise UserError(f"{folder / CONFIG}: {error}") from error
        card = entry.card(about["data"])
        task = entry.make(config, card)
        blueprint, shapes = shapes_of(task)  # nothing is allocated that the file does not hold
    arrays = read_weights(folder / WEIGHTS, {name: describe(array) for name, array in parameter_names(shapes).items()})
    paths, structure = jax.tree_util.tree_flatten_with_path(shapes)
    params = jax.tree.unflatten(structure, [jnp.asarray(arrays[_name(path)]) for path, _ in paths])
    return Trained(entry, config, card, step, task, blueprint, params)


def read_weights(path: Path, expected: dict[str, str]) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file by name, if they have the `expected` types and shapes, such as "float32[2, 3]".

    Raises:
      UserError: it is damaged, or holds other arrays, which are named.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
            found = {
                shown(name): f"{DTYPES.get(header.get_dtype(), header.get_dtype())}{header.get_shape()}"
                for name, header in headers.items()
            }
            # Before they are read: of types that numpy does not have there is nothing that could be read.
            differing = differences(expected=expected, found=found)
            arrays = {} if differing else {name: file.get_tensor(name) for name in expected}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({brief(error)})") from error
    if differing:
        more = [f"and {len(differing) - MOST_DIFFERING} more"] if len(differing) > MOST_DIFFERING else []
        raise UserError(f"{path} does not fit its config:\n  " + "\n  ".join(differing[:MOST_DIFFERING] + more))
    return arrays


def parameter_names(params: dict[str, Params]) -> dict[str, Any]:
    """Every array by its name, such as "block_0.layers.1.mlp.output.kernel"."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def load_run(
    workdir: Path,
    *,
    checkpoint: str,
    config: ConfigDict | None = None,
    overrides: dict[str, Any] | None = None,
    mesh: Mesh | None = None,
    own: Entry | None = None,
) -> tuple[Trained, dict[str, Any]]:
    """(a run's model on every device of the mesh, what its checkpoint tells of the run).

    `config` supplies fields that an older run did not have, `overrides` are what the command line says of the sampler.
    `own` is a task that is none of ours.

    Raises:
      UserError: there is no such run or checkpoint, it is damaged, or an override contradicts it.
    """
    if not (workdir / FOLDER).is_dir():
        raise UserError(f"{workdir} holds no run: train it first, or name its folder with --workdir")
    of_folder = read_saved(workdir, CONFIG) or {}
    with naming_malformed(workdir / CONFIG):
        entry = entry_of(ConfigDict(complete(of_folder)), own)
    with (
        Checkpoints(
            workdir,
            scores=ranking(entry, workdir),
            save_top_k=of_folder.get("save_top_k", 0),
            read_only=True,
        ) as checkpoints,
        _offering_others(checkpoints.steps()),
    ):
        step = checkpoints.find(checkpoint)
        run = checkpoints.run(step)
        with naming_malformed(f"what checkpoint {step} of {workdir} tells of its run"):
            entry = entry_of(ConfigDict(complete(run["config"])), own)
            given = ConfigDict(run["config"]) if config is None else config
            merged = for_evaluation(entry, run["config"], overrides or {}, given, asked=of_folder)
            check_config(entry, merged)
            blocks = trained_blocks(entry, merged)
            if len(blocks) < entry.num_blocks(merged):
                raise UserError(
                    f"{workdir} trained only blocks {list(blocks)} of {merged.num_blocks}: join by --mode=merge"
                )
            card = entry.card(run["data"])
            task = entry.make(merged, card)
            blueprint, shapes = shapes_of(task)
        weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
        check_fits_host(merged, weights, entry.num_blocks(merged))
        if rest_on_disk(entry, merged):
            params = checkpoints.restore_params(step, shapes, partial(spill, folder=workdir))
        else:
            memory = "pinned_host" if rest_off_device(entry, merged) else "device"
            params = checkpoints.restore_params(step, replicated(shapes, mesh or make_mesh(), memory))
    return Trained(entry, merged, card, step, task, blueprint, params), run


def ranking(entry: Entry, workdir: Path) -> dict[int, float]:
    """Step -> main score on the validation split, the more the better, as far as it is on record."""
    sign = 1 if entry.main_score.more_is_better else -1
    return {step: sign * value for step, value in scores(workdir, "val", entry.main_score.name).items()}


@contextmanager
def _without_orbax() -> Iterator[None]:
    """Orbax warns that what is opened to be read is not written. What goes wrong, it raises as well."""

    def is_of_others(record: LogRecord) -> bool:
        return "orbax" not in record.pathname

    logger = logging.get_absl_logger()
    logger.addFilter(is_of_others)
    try:
        yield
    finally:
        logger.removeFilter(is_of_others)


@contextmanager
def _offering_others(steps: list[int]) -> Iterator[None]:
    try:
        yield
    except Unusable as error:
        raise UserError(f"{error}. --checkpoint chooses another; there are {steps}") from error

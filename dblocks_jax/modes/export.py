"""`--mode=export`: a trained model to hand on, as safetensors with a model card and as a StableHLO program."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from ml_collections import ConfigDict

from dblocks_jax.modes.load import (
    CONFIG,
    FOLDER_FORMAT,
    WEIGHTS,
    Classifier,
    Trained,
    load_exported,
    load_run,
    only,
    parameter_names,
)
from dblocks_jax.pages.template import render
from dblocks_jax.run.devices import on_cpu
from dblocks_jax.run.errors import NOT_FINITE, Diverged
from dblocks_jax.run.files import saving, write_whole
from dblocks_jax.run.naming import shown
from dblocks_jax.run.results import read_result
from dblocks_jax.run.workdir import read_saved, write_json
from dblocks_jax.tasks.classify.config import SAMPLER_FIELDS
from dblocks_jax.tasks.classify.task import CLASSIFY
from dblocks_jax.training.config import ARITHMETIC_FIELDS, arithmetic
from dblocks_jax.training.overview import describe_shares, num_parameters

FOLDER, PROGRAM, CARD = "export", "classifier.stablehlo", "README.md"
PLATFORMS = ("cpu", "cuda")
TOLERANCE = 1e-5  # of the logits of what was written, as a share of the largest
TRIED_IMAGES = 3


def export_run(config: ConfigDict, workdir: Path, *, overrides: dict[str, Any], checkpoint: str) -> dict[str, Any]:
    """Write a run's model into <workdir>/export, load both forms back and compare their logits.

    WEIGHTS, with CONFIG beside it, is what `load_classifier` takes. PROGRAM is a function of uint8 images
    [b, h, w, c], for any b, that returns float32 logits [b, classes]: the whole sampler with the weights inside, to be
    called through `jax.export` alone.

    Raises:
      UserError: there is no such run or checkpoint.
      Diverged: its answers are not finite.
      Unsaved: the folder cannot be written; one that was there before still is.
    """
    # One program for all platforms: nothing may wait on the host.
    overrides = overrides | {"idle_blocks": "device"}
    loaded, run = load_run(workdir, checkpoint=checkpoint, config=config, overrides=overrides)
    folder, temporary, old = (workdir / name for name in (FOLDER, f".{FOLDER}", f".{FOLDER}_before"))
    # All of it on a CPU: a GPU rounds products to TF32, and so two programs of one model may differ there by more than
    # TOLERANCE. The weights lie on no device in particular, else the program would ask for as many as they were on.
    with on_cpu(), saving(folder), ExitStack() as at_the_end:
        at_the_end.callback(shutil.rmtree, temporary, ignore_errors=True)  # what failed would keep a full disk full
        on_host = jax.tree.map(jnp.asarray, jax.device_get(loaded.params))
        trained = Classifier(only(CLASSIFY, replace(loaded, params=on_host), workdir))
        for left_over in (temporary, old):
            shutil.rmtree(left_over, ignore_errors=True)
        temporary.mkdir()
        write_weights(trained, temporary)
        write_whole(temporary / PROGRAM, to_program(trained))
        write_whole(temporary / CARD, model_card(trained, accuracy(workdir, trained.trained), run.get("imported")))
        difference = largest_difference(trained, temporary)
        if folder.exists():
            folder.rename(old)  # whoever looks meanwhile sees no half-deleted one
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    return {
        "mode": "export",
        "workdir": str(workdir),
        "checkpoint": trained.step,
        "folder": str(folder),
        "bytes": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        "largest_difference_of_logits": difference,
    }


def write_weights(trained: Trained | Classifier, folder: Path) -> None:
    """The parameters by name, such as block_0.layers.1.mlp.output.kernel, and what is needed to use them."""
    from safetensors.numpy import save

    # Not its `save_file`: that is readable for the owner alone, and raises an error of its own where a disk is full.
    arrays = parameter_names(jax.device_get(trained.params))
    write_whole(folder / WEIGHTS, save(arrays, {"format": FOLDER_FORMAT}))
    about = {"format": FOLDER_FORMAT, "step": trained.step, "data": trained.card.to_dict()}
    config = trained.config.to_dict() | {"data_dir": ""}  # a path of this machine is nobody else's business
    write_json(folder / CONFIG, about | {"config": config})


def to_program(trained: Classifier) -> bytes:
    """The classifier as a serialised StableHLO program for PLATFORMS and any batch size."""

    def classify(images):
        return trained.classify(trained.params, images, jnp.arange(images.shape[0], dtype=jnp.int32))[-1]

    (count,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((count, *trained.card.image_shape), jnp.uint8)
    with arithmetic(trained.config), _no_source_paths():
        return bytes(export.export(jax.jit(classify), platforms=PLATFORMS)(images).serialize())


@contextmanager
def _no_source_paths() -> Iterator[None]:
    """jax notes in a program from which file and line each operation came: paths of this machine, and of its user."""
    limit = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)


def largest_difference(trained: Classifier, folder: Path) -> float:
    """Between the logits of the model and those of what was written of it, on random images."""
    shape = (TRIED_IMAGES, *trained.card.image_shape)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    expected = np.asarray(trained(images))
    if not np.isfinite(expected).all():
        raise Diverged(f"{folder.parent}: {NOT_FINITE}")
    program = export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
    found = [np.asarray(program.call(images)), np.asarray(Classifier(load_exported(folder))(images))]
    difference = max(float(np.abs(logits - expected).max()) for logits in found)
    if not difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise RuntimeError(f"what was exported gives other logits: they differ by {difference}")
    return difference


def accuracy(workdir: Path, trained: Trained) -> float | None:
    """The accuracy on the test split that is on record for a checkpoint, classified as `trained` does it."""
    fields = ARITHMETIC_FIELDS + (SAMPLER_FIELDS if trained.config.model_type == "dblock" else ())
    of_run = read_saved(workdir, CONFIG) or {}
    for name in ("train.json", "eval.json"):
        result = read_result(workdir, name) or {}
        used = of_run | result.get("arithmetic", {}) | result.get("sampler", {})
        is_alike = all(used.get(field, trained.config[field]) == trained.config[field] for field in fields)
        is_alike = is_alike and result.get("data_dir", of_run.get("data_dir")) == of_run.get("data_dir")
        if result.get("checkpoint") == trained.step and "top1" in result and is_alike:
            return result["top1"]
    return None


def model_card(trained: Classifier, top1: float | None, imported: str | None = None) -> str:
    """The page that a model hub shows: facts for its search, then what the model is and how to use it.

    `imported` names the file that the weights came from, if they were not trained here.
    """
    config = trained.config
    is_dblock = config.model_type == "dblock"
    trained_on = "images of one's own" if config.dataset == "folder" else shown(config.dataset)
    facts: dict[str, Any] = {
        "library_name": "dblocks_jax",
        "pipeline_tag": "image-classification",
        "tags": ["jax", "flax", "vision-transformer", *(["diffusion-blocks"] if is_dblock else [])],
    }
    if top1 is not None:
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"type": config.dataset, "name": trained_on, "split": "test"},
            "metrics": [{"type": "accuracy", "value": top1}],
        }
        facts |= {"metrics": ["accuracy"], "model-index": [{"name": "classifier", "results": [result]}]}
    values = {
        "facts": facts,
        "kind": f"DiffusionBlocks of {config.num_blocks} blocks" if is_dblock else "A plain vision transformer",
        "trained_on": trained_on,
        "top1": top1,
        "card": replace(trained.card, class_names=tuple(map(shown, trained.card.class_names))),
        "config": config,
        "step": trained.step,
        "imported": imported and shown(imported),
        "parameters": sum(num_parameters(part) for part in trained.params.values()),
        "noise_ranges": describe_shares(trained.trained.task),
        "program": PROGRAM,
        "weights": WEIGHTS,
    }
    return render("model_card.md", values)

"""`--mode=export`: a trained model to hand on, as safetensors with a model card and as a StableHLO program."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from ml_collections import ConfigDict

from dblocks_jax.config import arithmetic
from dblocks_jax.errors import UserError
from dblocks_jax.load import CONFIG, FOLDER_FORMAT, WEIGHTS, Trained, load_exported, load_run, parameter_names
from dblocks_jax.overview import noise_ranges, num_parameters
from dblocks_jax.pages.template import render
from dblocks_jax.workdir import read_saved, write_json

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
      UserError: there is no such run or checkpoint, or the folder cannot be written.
    """
    # One program for all platforms: nothing may wait on the host.
    overrides = overrides | {"idle_blocks": "device"}
    trained, _ = load_run(workdir, checkpoint=checkpoint, config=config, overrides=overrides)
    folder, temporary = workdir / FOLDER, workdir / f".{FOLDER}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write_weights(trained, temporary)
        (temporary / PROGRAM).write_bytes(to_program(trained))
        (temporary / CARD).write_text(model_card(trained, accuracy(workdir, trained.step)), encoding="utf-8")
        difference = largest_difference(trained, temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error
    return {
        "mode": "export",
        "workdir": str(workdir),
        "checkpoint": trained.step,
        "folder": str(folder),
        "bytes": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        "largest_difference_of_logits": difference,
    }


def write_weights(trained: Trained, folder: Path) -> None:
    """The parameters by name, such as block_0.layers.1.mlp.output.kernel, and what is needed to use them."""
    from safetensors.numpy import save_file

    save_file(parameter_names(jax.device_get(trained.params)), folder / WEIGHTS, {"format": FOLDER_FORMAT})
    about = {"format": FOLDER_FORMAT, "step": trained.step, "data": trained.card.to_dict()}
    config = trained.config.to_dict() | {"data_dir": ""}  # a path of this machine is nobody else's business
    write_json(folder / CONFIG, about | {"config": config})


def to_program(trained: Trained) -> bytes:
    """The classifier as a serialised StableHLO program for PLATFORMS and any batch size."""
    # Weights on no device in particular: else the program would ask for as many devices as they were on.
    params = jax.tree.map(jnp.asarray, jax.device_get(trained.params))

    def classify(images):
        return trained.classify(params, images, jnp.arange(images.shape[0], dtype=jnp.int32))[-1]

    (count,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((count, *trained.card.image_shape), jnp.uint8)
    with arithmetic(trained.config):
        return bytes(export.export(jax.jit(classify), platforms=PLATFORMS)(images).serialize())


def largest_difference(trained: Trained, folder: Path) -> float:
    """Between the logits of the model and those of what was written of it, on random images."""
    shape = (TRIED_IMAGES, *trained.card.image_shape)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    expected = np.asarray(trained(images))
    program = export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
    found = [np.asarray(program.call(images)), np.asarray(load_exported(folder)(images))]
    difference = max(float(np.abs(logits - expected).max()) for logits in found)
    if not difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise RuntimeError(f"what was exported gives other logits: they differ by {difference}")
    return difference


def accuracy(workdir: Path, step: int) -> float | None:
    """The accuracy on the test split that is on record for a checkpoint."""
    for name in ("train.json", "eval.json", "report.json"):
        result = read_saved(workdir, name) or {}
        if result.get("checkpoint") == step and "top1" in result:
            return result["top1"]
    return None


def model_card(trained: Trained, top1: float | None) -> str:
    """The page that a model hub shows: facts for its search, then what the model is and how to use it."""
    config = trained.config
    is_dblock = config.model_type == "dblock"
    trained_on = "images of one's own" if config.dataset == "folder" else config.dataset
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
        "card": trained.card,
        "config": config,
        "step": trained.step,
        "parameters": sum(num_parameters(part) for part in trained.params.values()),
        "noise_ranges": noise_ranges(config),
        "program": PROGRAM,
        "weights": WEIGHTS,
    }
    return render("model_card.md", values)

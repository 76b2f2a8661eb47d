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
    Trained,
    load_exported,
    load_run,
    parameter_names,
)
from dblocks_jax.modes.made import MAKES
from dblocks_jax.pages.template import render
from dblocks_jax.run.devices import on_cpu
from dblocks_jax.run.errors import NOT_FINITE, Diverged
from dblocks_jax.run.files import saving, write_whole
from dblocks_jax.run.naming import shown
from dblocks_jax.run.results import read_result
from dblocks_jax.run.workdir import read_saved, write_json
from dblocks_jax.tasks import text_export as of_decoder
from dblocks_jax.tasks.classify import export as of_classifier
from dblocks_jax.tasks.generate import export as of_generator
from dblocks_jax.tasks.mask import export as of_masked
from dblocks_jax.training.config import ARITHMETIC_FIELDS, arithmetic, complete
from dblocks_jax.training.overview import describe_shares, num_parameters

FOLDER, CARD = "export", "README.md"
PROGRAMS: dict[str, Any] = {  # by task
    "classify": of_classifier,
    "generate": of_generator,
    "mask": of_masked,
    "next_token": of_decoder,
    "recurrent": of_decoder,
}
PLATFORMS = ("cpu", "cuda")
PATHS = ("data_dir", "judge", "begin_from")  # fields that name places on this machine, which are nobody else's business
OF_ONES_OWN = {"folder": "images of one's own", "text_file": "a text of one's own"}  # data set -> in words


def export_run(config: ConfigDict, workdir: Path, *, overrides: dict[str, Any], checkpoint: str) -> dict[str, Any]:
    """Write a run's model into <workdir>/export, load both forms back and compare their answers.

    WEIGHTS, with CONFIG beside it, is what `load_trained` takes. The task's program is its answer with the
    weights inside, for any number of examples, to be called through `jax.export` alone: see tasks/*/export.py.

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
        trained, form = replace(loaded, params=on_host), PROGRAMS[loaded.entry.name]
        for left_over in (temporary, old):
            shutil.rmtree(left_over, ignore_errors=True)
        temporary.mkdir()
        write_weights(trained, temporary)
        write_whole(temporary / form.PROGRAM, to_program(trained))
        write_whole(temporary / CARD, model_card(trained, on_record(workdir, trained), run.get("imported")))
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
        form.DIFFERENCE: difference,
    }


def write_weights(trained: Trained, folder: Path) -> None:
    """The parameters by name, such as block_0.layers.1.mlp.output.kernel, and what is needed to use them."""
    from safetensors.numpy import save

    # Not its `save_file`: that is readable for the owner alone, and raises an error of its own where a disk is full.
    arrays = parameter_names(jax.device_get(trained.params))
    write_whole(folder / WEIGHTS, save(arrays, {"format": FOLDER_FORMAT}))
    about = {"format": FOLDER_FORMAT, "step": trained.step, "data": trained.card.to_dict()}
    config = {field: "" if field in PATHS else value for field, value in trained.config.to_dict().items()}
    write_json(folder / CONFIG, about | {"config": config})


def to_program(trained: Trained) -> bytes:
    """The model's answer as a serialised StableHLO program for PLATFORMS and any batch size."""
    form, task = PROGRAMS[trained.entry.name], trained.task
    answer = form.answerer(task, trained.blueprint)

    def run(*inputs):
        return form.output(task, answer(trained.params, *inputs))

    (count,) = export.symbolic_shape("b")
    with arithmetic(trained.config), _no_source_paths():
        return bytes(export.export(jax.jit(run), platforms=PLATFORMS)(*form.inputs(task, count)).serialize())


@contextmanager
def _no_source_paths() -> Iterator[None]:
    """jax notes in a program from which file and line each operation came: paths of this machine, and of its user."""
    limit = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)


def largest_difference(trained: Trained, folder: Path) -> float:
    """Between the answers of the model and those of what was written of it.

    Raises:
      Diverged: the answers are not finite.
    """
    form, again = PROGRAMS[trained.entry.name], load_exported(folder)
    program = export.deserialize(bytearray((folder / form.PROGRAM).read_bytes()))
    answer, answer_again = (form.answerer(each.task, each.blueprint) for each in (trained, again))
    differences = []
    with arithmetic(trained.config):
        for inputs in form.trials(trained.task):
            expected = np.asarray(answer(trained.params, *inputs))
            if not np.isfinite(expected).all():
                raise Diverged(f"{folder.parent}: {NOT_FINITE}")
            from_weights = np.asarray(answer_again(again.params, *inputs))
            differences.append(float(np.abs(from_weights - expected).max()))
            differences.append(form.difference(trained.task, np.asarray(program.call(*inputs)), expected))
            limit = form.TOLERANCE * max(1.0, float(np.abs(expected).max()))
            largest = float(np.max(differences))  # NaN, if one is
            if not largest <= limit:
                raise RuntimeError(f"what was exported gives other answers: they differ by {largest}")
    return largest


def on_record(workdir: Path, trained: Trained) -> dict[str, Any]:
    """The scores on the test split that are on record for a checkpoint, answering as `trained` does; or nothing."""
    is_sampled = trained.task.corruption is not None or trained.entry.name in MAKES
    fields = ARITHMETIC_FIELDS + (trained.entry.sampler_fields if is_sampled else ())
    saved = read_saved(workdir, CONFIG)
    of_run = {} if saved is None else complete(saved)
    for name in ("train.json", "eval.json"):
        result = read_result(workdir, name) or {}
        used = of_run | result.get("arithmetic", {}) | result.get("sampler", {})
        is_alike = all(used.get(field, trained.config[field]) == trained.config[field] for field in fields)
        is_alike = is_alike and result.get("data_dir", of_run.get("data_dir")) == of_run.get("data_dir")
        if result.get("checkpoint") == trained.step and trained.entry.main_score.name in result and is_alike:
            return result
    return {}


def model_card(trained: Trained, scores: dict[str, Any], imported: str | None = None) -> str:
    """The page that a model hub shows: facts for its search, then what the model is and how to use it.

    `imported` names the file that the weights came from, if they were not trained here.
    """
    config, form = trained.config, PROGRAMS[trained.entry.name]
    trained_on = OF_ONES_OWN.get(config.dataset, shown(config.dataset))
    values = {
        "facts": form.facts(config, trained_on, scores),
        "kind": form.describe(config),
        "trained_on": trained_on,
        "scores": scores,
        "card": form.safe(trained.card),
        "config": config,
        "step": trained.step,
        "imported": imported and shown(imported),
        "parameters": sum(num_parameters(part) for part in trained.params.values()),
        "shares": describe_shares(trained.task),
        "program": form.PROGRAM,
        "weights": WEIGHTS,
    }
    return render(f"model_card_{trained.entry.name}.md", values)

"""`--mode=import`: a run made of a checkpoint of the released PyTorch program."""

import pickletools
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from dblocks_jax.models.blueprint import Blueprint
from dblocks_jax.models.reference import CLS_TOKEN, LABELS, from_reference, read_architecture
from dblocks_jax.models.vit import Architecture
from dblocks_jax.run import workdir as run_folder
from dblocks_jax.run.checkpoint import Checkpoints, saved_steps
from dblocks_jax.run.devices import on_cpu
from dblocks_jax.run.errors import Unsaved, UserError, brief
from dblocks_jax.run.naming import shown
from dblocks_jax.run.regular import check_regular
from dblocks_jax.tasks.classify.config import architecture
from dblocks_jax.tasks.classify.parts import to_modules
from dblocks_jax.tasks.classify.task import CLASSIFY
from dblocks_jax.tasks.images import find_dataset
from dblocks_jax.training.config import LARGEST_STEP, check_config
from dblocks_jax.training.optimizer import new_part

NO_PARAMETERS = ("sigmas",)  # entries of the file that are computed, not learned
SIZES = ("image_size", "channels", "num_labels", "patch_size", "num_layers", "hidden_size", "intermediate_size")
# Hyper-parameters that tell what the model learned, under the same names as here.
SAME_FIELDS = ("num_blocks", "gamma", "sigma_min", "sigma_max", "sigma_data")


class Released(NamedTuple):
    """What a checkpoint of the released program holds."""

    weights: dict[str, np.ndarray]
    fields: dict[str, Any]  # its hyper-parameters
    step: int


def import_released(
    config: ConfigDict, workdir: Path, source: Path, *, command: list[str], overrides: dict[str, Any]
) -> dict[str, Any]:
    """Make a run of a released checkpoint, to be scored, reported and exported, but not trained on: the moments of its
    optimizer are not taken over.

    Raises:
      UserError: the file cannot be read, or its model is not the one that `config` describes: each field is named.
      Unsaved: the run could not be written.
    """
    if config.task != CLASSIFY.name:
        raise UserError(f"--mode=import makes a run of the task {CLASSIFY.name}, not of {config.task}")
    check_config(CLASSIFY, config)
    if saved_steps(workdir):
        raise UserError(f"{workdir} holds a run already: name another --workdir for the imported one, or delete it")
    if config.sharing == "isolated":
        raise UserError("sharing=isolated: the released program's blocks share embeddings and head")
    released = read_checkpoint(source)
    dataset = find_dataset(config)
    check_fields(config, released, architecture(config, dataset), source)
    with on_cpu():
        _, params = Blueprint.of(to_modules(from_reference(released.weights, config)))
        parts = {name: new_part(part) for name, part in jax.device_get(params).items()}
    card = dataset.to_dict() | {"images": len(dataset.split("train"))}
    with run_folder.claim(workdir):
        was = run_folder.read_saved(workdir, run_folder.CONFIG)
        run_folder.open_run(workdir, config.to_dict(), card, was=was, command=command, overrides=overrides)
        with Checkpoints(workdir) as checkpoints:
            run = {"config": config.to_dict(), "data": card, "imported": source.name}
            checkpoints.save(released.step, parts, run)
            checkpoints.wait()
            if why := checkpoints.failed.get(released.step):
                raise Unsaved(f"the imported model could not be saved in {workdir}: {why}")
    count = sum(value.size for value in released.weights.values())
    return {"mode": "import", "workdir": str(workdir), "checkpoint": released.step, "parameters": count}


def read_checkpoint(source: Path) -> Released:
    """Weights and hyper-parameters of a Lightning checkpoint. Nothing in the file is run.

    Raises:
      UserError: the file is not there or not such a checkpoint, or PyTorch is not installed.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "--mode=import reads with PyTorch, of which the CPU build is enough: "
            "`uv pip install torch --torch-backend=cpu`, or `uv sync --extra import`"
        ) from None
    check_regular(source, "the checkpoint")
    try:
        with warnings.catch_warnings(action="ignore"):  # of formats that are refused below
            content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # of the file system, of zip files, of the unpickler that refuses what is no weight
        raise UserError(f"cannot read the checkpoint {shown(source)}: {_why_unread(source, error)}") from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise UserError(f"{shown(source)} is no checkpoint of the released program: it has no state_dict of tensors")
    if not state:
        raise UserError(f"{shown(source)} holds no weights: its state_dict is empty")
    for name in state:
        if not isinstance(name, str):
            raise UserError(f"{shown(source)}: its state_dict has {shown(repr(name))[:80]} where a name should be")
    weights = {
        name.removeprefix("model."): _to_numpy(value, name, source)
        for name, value in state.items()
        if name not in NO_PARAMETERS
    }
    fields, step = content.get("hyper_parameters", {}), content.get("global_step", 0)
    if not isinstance(fields, dict):
        raise UserError(f"{shown(source)}: its hyper_parameters are no table of names and values")
    for name in SAME_FIELDS:
        if name in fields and type(fields[name]) not in (int, float):
            raise UserError(f"{shown(source)}: its hyper-parameter {name} is no number")
    if type(step) is not int or not 0 <= step <= LARGEST_STEP:
        raise UserError(f"{shown(source)}: its global_step is no number of steps")
    return Released(weights, dict(fields), step)


def _why_unread(source: Path, error: Exception) -> str:
    """PyTorch answers with a page of advice, some of which would run the file."""
    text = str(error)
    if refused := re.search(r"GLOBAL ([\w.]+)", text):
        return f"the file holds code ({refused[1]}), which is never run"
    if "TorchScript" in text or _holds_code(source):
        return "the file holds code, which is never run"
    return "it is no checkpoint of PyTorch" if type(error).__name__ == "UnpicklingError" else brief(error)


def _holds_code(source: Path) -> bool:
    """Whether a bare pickle names functions to be called. It is listed, not run."""
    try:
        with source.open("rb") as file:
            names = (operation.name for operation, _, _ in pickletools.genops(file))
            return any(name in ("GLOBAL", "STACK_GLOBAL", "INST") for name in names)
    except Exception:  # it is no pickle, or a damaged one
        return False


def _to_numpy(value: Any, name: str, source: Path) -> np.ndarray:
    """A tensor of the file as float32.

    Raises:
      UserError: it is of another kind than the released program's weights, or not finite.
    """
    where = f"{shown(source)}: {shown(name)}"
    is_whole = str(value.layout) == "torch.strided" and value.device.type == "cpu" and value.is_floating_point()
    # One number may stand for a tensor of any size, which would fill the memory when it is written out.
    if not is_whole or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise UserError(f"{where} is no dense array of floating-point numbers")
    array = value.detach().float().numpy()
    if not np.isfinite(array).all():
        raise UserError(f"{where} holds numbers that are not finite")
    return array


def check_fields(config: ConfigDict, released: Released, wanted: Architecture, source: Path) -> None:
    """Refuse a model other than the config's.

    Raises:
      UserError: naming each field that differs, with both values.
    """
    if not {LABELS, CLS_TOKEN} & released.weights.keys():
        raise UserError(f"{shown(source)} holds no model of the released program: neither {LABELS} nor {CLS_TOKEN}")
    is_dblock = LABELS in released.weights
    if is_dblock != (config.model_type == "dblock"):
        kind = "dblock" if is_dblock else "vit"
        raise UserError(f"{shown(source)} holds a model of another kind: set --config.model_type={kind}")
    found = read_architecture(released.weights, config)
    differing = {name: (getattr(found, name), getattr(wanted, name)) for name in SIZES}
    if is_dblock:
        differing |= {name: (released.fields[name], config[name]) for name in SAME_FIELDS if name in released.fields}
    lines = [f"{name} is {there}, not {here}" for name, (there, here) in differing.items() if there != here]
    if lines:
        raise UserError(
            f"{shown(source)} is of another model than the config: {'; '.join(lines)}. "
            "Set them by --config.FIELD=VALUE; channels and num_labels are those of the data set"
        )

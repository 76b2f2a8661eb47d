"""Join blocks that were trained apart into one run that can be evaluated."""

from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from dblocks_jax.run import workdir as run_folder
from dblocks_jax.run.checkpoint import FOLDER, Checkpoints, saved_steps
from dblocks_jax.run.devices import on_cpu
from dblocks_jax.run.errors import Unsaved, UserError, naming_malformed
from dblocks_jax.tasks.table import entry_of
from dblocks_jax.training.config import FREE_TO_CHANGE, check_config, complete, count_steps, trained_blocks
from dblocks_jax.training.optimizer import Part, new_part
from dblocks_jax.training.setting import new_model

OF_A_PART = ("train_blocks", "begin_from", *FREE_TO_CHANGE)  # in which the parts of one model may differ


def merge(
    sources: list[Path], workdir: Path, *, command: list[str], overrides: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write the last checkpoints of the runs in `sources`, which together trained every block once, as one run.

    All of it happens in host memory: the whole model may not fit on a device. Of the `overrides` those count that no
    parameter depends on, such as where the data lie on this machine.

    Raises:
      UserError: a part is missing, double, unfinished or of another model; or `workdir` holds a run already.
    """
    if saved_steps(workdir):
        raise UserError(f"{workdir} holds a run already: name another --workdir for the merged one, or delete it")
    runs = {source: _read(source) for source in sources}
    first, (config, card, _) = next(iter(runs.items()))
    entry = entry_of(config)
    owner: dict[int, Path] = {}
    for source, (other, other_card, step) in runs.items():
        _check_same_model(first, (config, card), source, (other, other_card))
        expected = count_steps(entry, other, card["images"]).steps
        if step != expected:
            raise UserError(f"{source} is not finished: it stands at step {step} of {expected}")
        for block in trained_blocks(entry, other):
            if block in owner:
                raise UserError(f"block {block} is double: both {owner[block]} and {source} trained it")
            owner[block] = source
    missing = sorted(set(range(config.num_blocks)) - owner.keys())
    if missing:
        raise UserError(f"nobody trained block {', '.join(map(str, missing))} of {config.num_blocks}: add its run")

    free = {field: value for field, value in (overrides or {}).items() if field in FREE_TO_CHANGE}
    whole = ConfigDict({**config.to_dict(), **free, "train_blocks": ()})
    # The data are only looked at: whether this machine has them, of the same classes.
    entry.find_data(whole, may_prepare="data_dir" in free).check_same(card, str(first))
    parts: dict[str, Part] = {}
    with on_cpu():
        blueprint, params = new_model(entry.make(whole, entry.card(card)), whole.seed)
        for source in runs:
            names = [name for block, owned_by in owner.items() if owned_by == source for name in blueprint.names(block)]
            with Checkpoints(source, read_only=True) as checkpoints:
                parts |= checkpoints.restore(
                    runs[source][2], {name: new_part(params[name], averaged=whole.ema_decay > 0) for name in names}
                )
    steps = count_steps(entry, whole, card["images"]).steps
    with run_folder.claim(workdir):
        was = run_folder.read_saved(workdir, run_folder.CONFIG)
        run_folder.open_run(workdir, whole.to_dict(), card, was=was, command=command, overrides={})
        with Checkpoints(workdir) as checkpoints:
            checkpoints.save(steps, parts, {"config": whole.to_dict(), "data": card})
            checkpoints.wait()
            if why := checkpoints.failed.get(steps):
                raise Unsaved(f"the merged model could not be saved in {workdir}: {why}")
    count = sum(leaf.size for part in parts.values() for leaf in jax.tree.leaves(part.params))
    blocks = {str(block): str(owner[block]) for block in sorted(owner)}
    return {"mode": "merge", "workdir": str(workdir), "checkpoint": steps, "parameters": count, "blocks": blocks}


def _read(source: Path) -> tuple[ConfigDict, dict[str, Any], int]:
    """(config, data card, last step) of a run."""
    if not (source / FOLDER).is_dir():
        raise UserError(f"{source} holds no run")
    with Checkpoints(source, read_only=True) as checkpoints:
        step = checkpoints.find("last")
        run = checkpoints.run(step)
    with naming_malformed(f"what checkpoint {step} of {source} tells of its run"):
        config, card = ConfigDict(complete(run["config"])), run["data"]
        entry = entry_of(config)
        check_config(entry, config)
        entry.card(card)
        if type(card["images"]) is not int:
            raise ValueError("its number of images is none")
    if entry.num_blocks(config) == 1 or config.sharing != "isolated":
        raise UserError(f"{source} is not a run of isolated blocks (sharing=isolated): there is nothing to merge")
    return config, card, step


def _check_same_model(
    first: Path, model: tuple[ConfigDict, dict[str, Any]], source: Path, other: tuple[ConfigDict, dict[str, Any]]
) -> None:
    fields, others = (config.to_dict() for config, _ in (model, other))
    for field in sorted(fields.keys() | others.keys()):
        if field not in OF_A_PART and fields.get(field) != others.get(field):
            raise UserError(
                f"{source} is of another model than {first}: "
                f"{field} is {others.get(field, 'absent')!r}, not {fields.get(field, 'absent')!r}"
            )
    if model[1] != other[1]:
        raise UserError(f"{source} was trained on other data than {first}")

"""Checkpoints through Orbax: latest and best, written while training goes on, explained when they do not fit."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dblocks_jax.errors import UserError
from dblocks_jax.optimizer import Params, Part, params_of

FOLDER = "state"  # inside the workdir
# Items of a checkpoint, apart so that evaluation reads the parameters alone.
PARAMS, ADAM, RUN = "params", "adam", "run"
LATEST_KEPT = 2  # should the newest be damaged, a person can delete it and go on from the one before


class Checkpoints:
    """The checkpoints of one workdir, by step. As a context manager it waits for writes and raises their errors.

    The `save_top_k` best by `top1` of the metrics they were saved with are kept besides the latest.
    """

    def __init__(self, workdir: Path, *, save_top_k: int = 0, read_only: bool = False):
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        def top1(metrics: dict[str, float]) -> float:
            return metrics["top1"]

        best = policies.BestN(get_metric_fn=top1, n=save_top_k, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            read_only=read_only,
            best_fn=top1 if read_only or save_top_k else None,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(LATEST_KEPT), best]),
            save_decision_policy=policies.FixedIntervalPolicy(1),
        )
        self._ocp = ocp
        self._workdir = workdir
        handlers = {
            PARAMS: ocp.StandardCheckpointHandler(),
            ADAM: ocp.StandardCheckpointHandler(),
            RUN: ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager((workdir / FOLDER).absolute(), options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint; None where there is none."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Step of the best checkpoint, or the newest where none has metrics."""
        best = self._manager.best_step()
        return self.latest() if best is None else best

    def find(self, which: str) -> int:
        """The step that "best", "last" or a number names.

        Raises:
          UserError: there is no checkpoint, or not that one.
        """
        steps = self._manager.all_steps()
        if not steps:
            raise UserError(f"{self._workdir} holds no checkpoint yet: train it first")
        found = {"best": self.best(), "last": self.latest()}.get(which, int(which) if which.isdecimal() else None)
        if found is None or found not in steps:
            raise UserError(f"{self._workdir} has no checkpoint {which!r}; choose best, last or one of {steps}")
        return found

    def wait(self) -> None:
        """Return when everything is on disk; raises what went wrong."""
        self._manager.wait_until_finished()

    def save(self, step: int, parts: dict[str, Part], run: dict[str, Any], metrics: dict[str, float] | None) -> None:
        """Write parameters, optimizer state and what `run` tells; returns before all is on disk.

        Data and random numbers are functions of the step, so nothing of them is kept.

        The arrays may be donated as soon as this returns. A step that is there already is left as it is.
        """
        if step in self._manager.all_steps():
            return
        save = self._ocp.args.StandardSave
        items = {
            PARAMS: save(params_of(parts)),
            ADAM: save({name: part.adam for name, part in parts.items()}),
            RUN: self._ocp.args.JsonSave(run),
        }
        self._manager.save(step, args=self._ocp.args.Composite(**items), metrics=metrics)

    def restore(self, step: int, parts: dict[str, Part]) -> dict[str, Part]:
        """The parts as saved at `step`, shaped and placed like `parts`.

        Raises:
          UserError: the checkpoint holds other parameters.
        """
        params = params_of(parts)
        adam = {name: part.adam for name, part in parts.items()}
        self._check_fits(step, params)
        items = {PARAMS: self._like(params), ADAM: self._like(adam)}
        restored = self._read(step, **items)
        return {name: Part(restored[PARAMS][name], restored[ADAM][name]) for name in parts}

    def run(self, step: int) -> dict[str, Any]:
        """What a checkpoint knows of its run: the `run` it was saved with."""
        return self._read(step, **{RUN: self._ocp.args.JsonRestore()})[RUN]

    def restore_params(self, step: int, params: dict[str, Params]) -> dict[str, Params]:
        """The parameters alone, shaped and placed like `params`.

        Raises:
          UserError: the checkpoint holds other parameters.
        """
        self._check_fits(step, params)
        return self._read(step, **{PARAMS: self._like(params)})[PARAMS]

    def _read(self, step: int, **items: Any) -> Any:
        with self._naming_what_is_damaged(step):
            return self._manager.restore(step, args=self._ocp.args.Composite(**items))

    @contextmanager
    def _naming_what_is_damaged(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
            folder = self._workdir / FOLDER / str(step)
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise UserError(
                f"the checkpoint {folder} cannot be read: delete the folder to go on from the one before ({reason})"
            ) from error

    def _like(self, tree: Any) -> Any:
        return self._ocp.args.StandardRestore(jax.tree.map(self._ocp.utils.to_shape_dtype_struct, tree))

    def _check_fits(self, step: int, params: dict[str, Params]) -> None:
        with self._naming_what_is_damaged(step):
            found = _shapes(self._manager.item_metadata(step)[PARAMS].tree)
        differing = differences(expected=_shapes(params), found=found)
        if differing:
            raise UserError(
                f"checkpoint {step} of {self._workdir} does not fit this model:\n  " + "\n  ".join(differing)
            )


def _shapes(tree: Any) -> dict[str, str]:
    """Path of each leaf -> its dtype and shape. Orbax turns list indices and integer keys into strings: so do we."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))
    return {
        "/".join(str(getattr(entry, "key", getattr(entry, "idx", entry))) for entry in path): (
            f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        )
        for path, leaf in leaves
    }


def differences(*, expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """One line for each parameter that is missing, unexpected, or of another shape or type."""
    return [
        f"{path}: expected {expected.get(path, 'nothing')}, found {found.get(path, 'nothing')}"
        for path in sorted(expected.keys() | found.keys())
        if expected.get(path) != found.get(path)
    ]

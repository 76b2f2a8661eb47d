"""Checkpoints through Orbax: latest and best, written while training goes on, verified when they are read."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import jax
from absl import logging

from dblocks_jax.run.arrays import checksum_of_json, checksums_of, differences, shapes_by_path
from dblocks_jax.run.errors import Unusable, UserError, brief
from dblocks_jax.run.kept import LatestAndBest, ranked
from dblocks_jax.run.processes import are_several, first_process_first, is_first
from dblocks_jax.run.regular import check_only_regular

FOLDER, DAMAGED = "state", "damaged"  # inside the workdir
# Items of a checkpoint, apart so that evaluation reads the parameters alone, or their averages.
PARAMS, ADAM, AVERAGE, RUN = "params", "adam", "average", "run"
Part = Any  # what trains together: a NamedTuple with the fields PARAMS, ADAM and AVERAGE, each a tree, or () for none
Params = Any
Settle = Callable[[Any], Any]  # arrays in host memory -> the same, where they are to wait
STEP = re.compile("0|[1-9][0-9]{0,18}")  # a checkpoint's folder, as it is written; 007 is nobody's
FILE_BYTES = 2**25  # of a file of a checkpoint, about: what goes into it is in memory until it is full
FORMAT = 3  # of checkpoints; format 1 had no checksums, format 2 not what an image is like


class Checkpoints:
    """The checkpoints of one workdir, by step. As a context manager it waits for writes.

    A save that fails is logged at once and listed in `failed`; training may go on, and the checkpoints before it are
    intact. Besides the latest, the `save_top_k` best by `scores` (step -> on the validation split; the more the better;
    may grow) are kept.
    """

    def __init__(
        self, workdir: Path, *, scores: Mapping[int, float] | None = None, save_top_k: int = 0, read_only: bool = False
    ):
        self.failed: dict[int, str] = {}  # step -> why it could not be saved
        self._workdir = workdir
        self._folder = (workdir / FOLDER).absolute()
        self._scores = {} if scores is None else scores
        self._save_top_k = save_top_k
        self._read_only = read_only
        self._taken_over: set[int] = set()  # steps that were saved or restored here
        self._latest_save = 0
        self._opened: Any = None
        assert self._manager

    @property
    def _manager(self) -> Any:
        """Orbax's, opened anew after a save that failed: it may take that checkpoint for one that is there."""
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> Any:
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        for step in self.steps():  # Orbax reads this of each at once
            path = self._folder / str(step) / "_CHECKPOINT_METADATA"
            if path.exists() and not path.is_file():
                raise UserError(f"{path} is damaged: _CHECKPOINT_METADATA is not a regular file. Remove its folder")
        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(
            create=not self._read_only,
            read_only=self._read_only,
            cleanup_tmp_directories=not self._read_only,  # what a killed process left behind
            preservation_policy=LatestAndBest(self._scores, self._save_top_k),
            save_decision_policy=policies.FixedIntervalPolicy(1),
            # Asynchronously, Orbax waits 20 minutes for a folder that cannot be made.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        handlers = {
            PARAMS: ocp.PyTreeCheckpointHandler(),
            ADAM: ocp.PyTreeCheckpointHandler(),
            AVERAGE: ocp.PyTreeCheckpointHandler(),
            RUN: ocp.JsonCheckpointHandler(),
        }
        return ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        if self._opened is not None:
            self._opened.close()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return saved_steps(self._workdir)

    def holds(self, step: int) -> bool:
        """Whether the state at `step` is safe: on disk, or that of the start. From any thread."""
        return step == 0 or (self._folder / str(step)).is_dir()

    def best(self) -> list[int]:
        """Steps of the checkpoints that have a score, the best first; none where none is kept for its score.

        Which are left then beside the latest depends on when the run was interrupted.
        """
        return ranked(self.steps(), self._scores) if self._save_top_k else []

    def find(self, which: str) -> int:
        """The step that "best", "last" or a number names.

        Raises:
          UserError: there is no checkpoint, or not that one.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"{self._workdir} holds no checkpoint yet: train it first")
        found = {"best": [*self.best(), steps[-1]][0], "last": steps[-1]}.get(
            which, int(which) if which.isdecimal() and len(which) < 20 else None
        )
        if found not in steps:
            raise UserError(f"{self._workdir} has no checkpoint {which!r}; choose best, last or one of {steps}")
        return found

    def save(self, step: int, parts: dict[str, Part], run: dict[str, Any]) -> None:
        """Write parameters, optimizer state and what `run` tells; returns before all is on disk.

        Data and random numbers are functions of the step, so nothing of them is kept. The arrays may be donated as soon
        as this returns. A step that was saved or restored here is left as it is.
        """
        if step in self._taken_over:
            return
        self.wait()
        self._taken_over.add(step)
        trees = _items(parts)
        run = json.loads(json.dumps(run))  # a copy: it is written later, and its counts go on
        checksums = {item: checksums_of(tree) for item, tree in trees.items()} | {RUN: checksum_of_json(run)}
        record = {"format": FORMAT, "checksums": checksums, "run": run}
        items = {
            item: self._ocp.args.PyTreeSave(tree, ocdbt_target_data_file_size=FILE_BYTES)
            for item, tree in trees.items()
        }
        with self._noting_failure(step):
            self._latest_save = step
            args = self._ocp.args.Composite(**items, **{RUN: self._ocp.args.JsonSave(record)})
            if not self._manager.save(step, args=args):
                raise RuntimeError("Orbax did not begin to save")

    def look(self) -> None:
        """Notice a save that has failed meanwhile. Does not wait."""
        # Not Orbax's `check_for_errors`: who asks takes the error away from the thread that would remove older
        # checkpoints only after a success.
        if not self.is_saving():
            self.wait()

    def is_saving(self) -> bool:
        """Whether something is being written or removed. From any thread."""
        opened = self._opened  # which another thread may let go of
        return opened is not None and opened.is_saving_in_progress()

    def wait(self) -> None:
        """Return when nothing is being written any more."""
        if self._opened is not None:
            with self._noting_failure(self._latest_save):
                self._opened.wait_until_finished()

    @contextmanager
    def _noting_failure(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of the file system, by way of Orbax or TensorStore, which raise many types
            if self._read_only or are_several():  # of several processes some may have succeeded: they must all end
                raise
            reason = brief(error)
            self.failed[step] = reason
            logging.error("cannot save step %d in %s; what was saved before is intact (%s)", step, self._folder, reason)
            with suppress(Exception):
                self._opened.close()
            self._opened = None
            self._taken_over.discard(step)

    def resume(
        self, like: Callable[[int], dict[str, Part]], start: dict[str, Part], settle: Settle | None = None
    ) -> tuple[int, dict[str, Part], dict[str, Any]]:
        """(step, parts, run) of the newest checkpoint that is sound, shaped and placed like those of its step.

        Step 0, `start` and {} where there is none. Newer ones that cannot be used are moved to DAMAGED, and named.
        With `settle` parts are read one at a time, and each is what `settle` makes of its arrays.

        Raises:
          UserError: none of the checkpoints can be used.
        """
        unusable: dict[int, Unusable] = {}
        for step in reversed(self.steps()):
            try:
                run = self.run(step)
                restored = self.restore(step, like(step), settle)
            except Unusable as error:
                unusable[step] = error
                continue
            for newer, error in unusable.items():
                logging.error("%s. It is moved to %s", error, self._set_aside(newer))
            self._taken_over.add(step)
            return step, restored, run
        if unusable:
            raise UserError(
                "; ".join(map(str, unusable.values()))
                + f". No other is left: restore one, or delete {self._workdir} to start anew"
            )
        return 0, start, {}

    def _set_aside(self, step: int) -> Path:
        folder = self._workdir / DAMAGED
        place = next(place for i in count() if not (place := folder / f"{step}_{i}").exists())
        with first_process_first("damaged"):
            if is_first():
                folder.mkdir(exist_ok=True)
                (self._folder / str(step)).rename(place)
        self._manager.reload()
        return place

    def restore(self, step: int, parts: dict[str, Part], settle: Settle | None = None) -> dict[str, Part]:
        """The parts as saved at `step`, shaped and placed like `parts`; `settle` as in `resume`.

        Raises:
          Unusable: the checkpoint is damaged, or holds other parameters.
        """
        restored = self._restore(step, _items(parts), settle)
        return {
            name: part._replace(**{item: trees[name] for item, trees in restored.items()})
            for name, part in parts.items()
        }

    def restore_params(self, step: int, params: dict[str, Params], settle: Settle | None = None) -> dict[str, Params]:
        """What the model answers with, shaped and placed like `params`: averages where they were kept, else parameters.

        `settle` is as in `resume`.

        Raises:
          Unusable: the checkpoint is damaged, or holds other parameters.
        """
        item = AVERAGE if AVERAGE in self._record(step)["checksums"] else PARAMS
        return self._restore(step, {item: params}, settle)[item]

    def run(self, step: int) -> dict[str, Any]:
        """What a checkpoint knows of its run: the `run` it was saved with.

        Raises:
          Unusable: it is damaged, or of another format.
        """
        return self._record(step)["run"]

    def _record(self, step: int) -> dict[str, Any]:
        with self._naming_what_is_damaged(step):
            check_only_regular(self._folder / str(step))
            item = self._ocp.args.Composite(**{RUN: self._ocp.args.JsonRestore()})
            record = self._manager.restore(step, args=item)[RUN]
            found = record.get("format", 1)
            if found == FORMAT and checksum_of_json(record["run"]) != record["checksums"][RUN]:
                raise ValueError("what it tells of its run is not what was saved")
        if found != FORMAT:
            raise Unusable(
                f"the checkpoint {self._folder / str(step)} has format {found}, but this version of the program reads "
                f"format {FORMAT}: use the version that wrote it"
            )
        return record

    def _restore(
        self, step: int, wanted: dict[str, dict[str, Any]], settle: Settle | None
    ) -> dict[str, dict[str, Any]]:
        checksums = self._record(step)["checksums"]
        with self._naming_what_is_damaged(step):
            metadata = self._manager.item_metadata(step)
            found = {item: shapes_by_path(metadata[item].tree) for item in wanted}
        for item, tree in wanted.items():
            differing = differences(expected=shapes_by_path(tree), found=found[item])
            if differing:
                raise Unusable(
                    f"checkpoint {step} of {self._workdir} does not fit this model:\n  " + "\n  ".join(differing)
                )
        if settle is None:
            return self._read(step, wanted, checksums)
        restored: dict[str, dict[str, Any]] = {item: {} for item in wanted}
        for name in {name: None for tree in wanted.values() for name in tree}:
            of_part = {item: {name: tree[name]} for item, tree in wanted.items()}
            for item, tree in settle(self._read(step, of_part, checksums)).items():
                restored[item] |= tree
        return restored

    def _read(self, step: int, wanted: dict[str, dict[str, Any]], checksums: Any) -> dict[str, dict[str, Any]]:
        """`wanted`, which may be a part of all that there is."""
        ocp = self._ocp
        with self._naming_what_is_damaged(step):
            items = {}
            for item, tree in wanted.items():
                like = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
                how = ocp.checkpoint_utils.construct_restore_args(like)
                items[item] = ocp.args.PyTreeRestore(like, restore_args=how, partial_restore=True)
            read = self._manager.restore(step, args=ocp.args.Composite(**items))
            restored = {item: read[item] for item in wanted}
            for item in wanted:
                for name, checksum in checksums_of(restored[item]).items():
                    if checksum != checksums[item][name]:
                        raise ValueError(f"{item} of {name} are not what was saved")
        return restored

    @contextmanager
    def _naming_what_is_damaged(self, step: int) -> Iterator[None]:
        try:
            yield
        except (MemoryError, jax.errors.JaxRuntimeError):  # no room to read it
            raise
        except Exception as error:  # Orbax and TensorStore raise many types
            raise Unusable(f"the checkpoint {self._folder / str(step)} is damaged ({brief(error)})") from error


def saved_steps(workdir: Path) -> list[int]:
    """Steps of the complete checkpoints in a workdir, ascending. What is being written has another name."""
    folder = workdir / FOLDER
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if STEP.fullmatch(name))


def _items(parts: dict[str, Part]) -> dict[str, dict[str, Any]]:
    """Item -> tree of each part."""
    trees = {item: {name: getattr(part, item) for name, part in parts.items()} for item in (PARAMS, ADAM, AVERAGE)}
    return {item: tree for item, tree in trees.items() if jax.tree.leaves(tree)}

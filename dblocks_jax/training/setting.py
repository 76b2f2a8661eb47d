"""All that is known of a run before its folder is touched: data, length, stages, and a fresh model."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dblocks_jax.data.source import Data
from dblocks_jax.models.blueprint import Blueprint, Params
from dblocks_jax.run import workdir as run_folder
from dblocks_jax.run.checkpoint import FOLDER
from dblocks_jax.run.devices import (
    check_batch_size,
    from_file,
    make_mesh,
    on_cpu,
    replicate,
    replicated,
    spread,
    to_device,
    to_host,
)
from dblocks_jax.run.errors import UserError, naming_malformed
from dblocks_jax.run.processes import check_alike, first_process_first
from dblocks_jax.run.spilled import spill
from dblocks_jax.run.streams import stream
from dblocks_jax.tasks.task import Entry, Scorer, Task
from dblocks_jax.training.config import (
    Length,
    check_resumable,
    count_steps,
    curriculum,
    rest_off_device,
    rest_on_disk,
    trained_blocks,
)
from dblocks_jax.training.heldout import scorer_of
from dblocks_jax.training.optimizer import Part, new_part
from dblocks_jax.training.residence import Away
from dblocks_jax.training.stages import Stage, divide, make_stages
from dblocks_jax.training.step import Parallel, TrainStep, make_train_step


@dataclass(frozen=True)
class Model:
    """The task, structure and scores of one stage."""

    stage: Stage
    task: Task
    blueprint: Blueprint
    score: Scorer


@dataclass(frozen=True)
class Setting:
    """A run before it is opened. `card` is what is saved of the data, with the number of training examples."""

    entry: Entry
    config: ConfigDict
    workdir: Path
    saved: dict[str, Any] | None  # the config that lies in the folder
    mesh: Mesh
    data: Data
    card: dict[str, Any]
    length: Length
    stages: list[Stage]

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """Those that are trained here, in the end."""
        return trained_blocks(self.entry, self.config)

    @cached_property
    def is_whole(self) -> bool:
        """Whether all blocks are trained here. Some alone answer nothing: they are merged before they are scored."""
        return len(self.blocks) == self.entry.num_blocks(self.config)

    @cached_property
    def watched(self) -> str:
        """The split that is scored while it trains; nothing is chosen by the test split."""
        return "test" if self.data.split("val") is None else "val"

    @property
    def memory(self) -> str:
        """Where parts are placed that are not at work, if that is no disk."""
        return "pinned_host" if rest_off_device(self.entry, self.config) else "device"

    @property
    def away(self) -> Away | None:
        """How parts come and go that are not at work."""
        if not rest_off_device(self.entry, self.config):
            return None
        if self.settle is None:
            return Away(to_host, to_device)
        # In memory of their own, not in the pages of the file: a step writes its result where its parameters lay.
        return Away(self.settle, partial(from_file, place=lambda array: jnp.copy(self._on(array, "device"))))

    @property
    def settle(self) -> Callable[[Any], Any] | None:
        """Where parts wait on disk: how they get there, from the host or a device."""
        return partial(spill, folder=self.workdir) if rest_on_disk(self.entry, self.config) else None

    def stage_of(self, step: int) -> Stage:
        """The one that made a step (from 1); the first for the start, the last for a step beyond the run's length."""
        return next((stage for stage in self.stages if step <= stage.end), self.stages[-1])

    def model(self, stage: Stage) -> Model:
        """The model of a stage, without numbers."""
        task = self.entry.make(stage.config, self.entry.card(self.card))
        blueprint = shapes_of(task)[0]
        return Model(stage, task, blueprint, scorer_of(task, blueprint, self.mesh))

    def fresh(self, stage: Stage) -> dict[str, Part]:
        """New parts of a stage, as far as they are trained here, placed where they wait."""
        task = self.entry.make(stage.config, self.entry.card(self.card))
        if self.settle is not None:
            parts = fresh_one_by_one(self.entry, stage.config, task)
            return {name: self.settle(part) for name, part in parts}
        return self._on(fresh_parts(self.entry, stage.config, task), self.memory)

    def like(self, stage: Stage) -> dict[str, Part]:
        """Shapes of a stage's parts, and where each waits, if that is no disk. Nothing is allocated."""
        task = self.entry.make(stage.config, self.entry.card(self.card))
        blueprint, shapes = shapes_of(task)
        parts = part_shapes(stage.config, {name: shapes[name] for name in mine(self.entry, stage.config, blueprint)})
        if self.settle is not None:
            return parts
        if not self.config.shard_parameters:
            return replicated(parts, self.mesh, self.memory)
        places = spread(parts, self.mesh, self.memory)
        return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), parts, places)

    def grow(
        self, parts: dict[str, Part], names: Iterable[str], *, before: ConfigDict, after: ConfigDict
    ) -> dict[str, Part]:
        """The parts `names` of the model `after`, each a copy, with moments and average, of what it is in `before`."""
        origin = divide(parts, names, before=self.entry.num_blocks(before), after=self.entry.num_blocks(after))
        if self.settle is not None:
            return {name: self.settle(parts[origin[name]]) for name in origin}
        on_host = jax.device_get(parts)
        return {name: self._on(on_host[origin[name]], self.memory) for name in origin}

    def _on(self, on_host: Any, memory: str) -> Any:
        """Arrays on every device, or shared out among them, in memory of this kind."""
        if not self.config.shard_parameters:
            return replicate(on_host, self.mesh, memory)
        return jax.device_put(on_host, spread(on_host, self.mesh, memory))


def new_model(task: Task, seed: int) -> tuple[Blueprint, dict[str, Params]]:
    """(structure, parameters by part) of a fresh model, a function of (task, seed) alone."""
    return Blueprint.of(task.modules(stream(seed, "init", 0)))


def fresh_parts(entry: Entry, config: ConfigDict, task: Task) -> dict[str, Part]:
    """New parts of the blocks that a config trains, in host memory: a whole model may not fit on a device."""
    with on_cpu():
        blueprint, params = new_model(task, config.seed)
        names = mine(entry, config, blueprint)
        return jax.device_get({name: new_part(params[name], averaged=config.ema_decay > 0) for name in names})


def fresh_one_by_one(entry: Entry, config: ConfigDict, task: Task) -> Iterator[tuple[str, Part]]:
    """What `fresh_parts` returns, bit for bit, a part at a time: a whole model may not fit on the host either.

    The operations that make a model are recorded, and for each part those are done that it needs, one after the other
    as they would be otherwise: compiled together they could round differently.
    """
    with on_cpu():
        blueprint = shapes_of(task)[0]
        program, shapes = jax.make_jaxpr(lambda: new_model(task, config.seed)[1], return_shape=True)()
        owners = [path[0].key for path, _ in jax.tree.leaves_with_path(shapes)]
        for name in mine(entry, config, blueprint):
            needed, _ = dce_jaxpr(program.jaxpr, [owner == name for owner in owners])
            leaves = jaxpr_as_fun(program.replace(jaxpr=needed))()
            params = jax.tree.unflatten(jax.tree.structure(shapes[name]), leaves)
            yield name, jax.device_get(new_part(params, averaged=config.ema_decay > 0))
            del leaves, params


def mine(entry: Entry, config: ConfigDict, blueprint: Blueprint) -> list[str]:
    """The parts that a config trains here."""
    return sorted({name for block in trained_blocks(entry, config) for name in blueprint.names(block)})


def shapes_of(task: Task) -> tuple[Blueprint, dict[str, Any]]:
    """A model of which nothing is computed: (structure, shapes of the parameters by part)."""
    blueprints = []

    def params() -> dict[str, Params]:
        blueprint, params = new_model(task, 0)
        blueprints.append(blueprint)
        return params

    shapes = jax.eval_shape(params)
    return blueprints[0], shapes


def part_shapes(config: ConfigDict, params: dict[str, Any]) -> dict[str, Part]:
    """Shapes of the parts whose parameters have these."""
    averaged = config.ema_decay > 0
    return {name: jax.eval_shape(partial(new_part, averaged=averaged), part) for name, part in params.items()}


def prepare(entry: Entry, config: ConfigDict, workdir: Path) -> Setting:
    """Check a run against its folder and its data.

    Raises:
      UserError: they do not fit, or the data cannot be had.
    """
    mesh = make_mesh(config.num_blocks if config.block_parallel else 1)
    check_shares(config, mesh)
    check_batch_size("batch_size", config.batch_size, mesh)
    check_alike("config", config.to_dict())
    saved = run_folder.read_saved(workdir, run_folder.CONFIG)
    if saved is not None:
        with naming_malformed(workdir / run_folder.CONFIG):
            check_resumable(saved, config, str(workdir))
    elif (workdir / FOLDER).exists():
        raise UserError(f"{workdir} holds checkpoints but no {run_folder.CONFIG}: restore it, or use another --workdir")
    with first_process_first("data"):
        data = entry.find_data(config)
    count = len(data.split("train"))
    length = count_steps(entry, config, count)
    saved_card = run_folder.read_saved(workdir, run_folder.DATA)
    if saved_card is not None:
        data.check_same(saved_card, str(workdir))
        if saved_card["images"] != count:
            raise UserError(f"{workdir} was trained on {saved_card['images']} examples, but now there are {count}")
    for split in ("val", "test"):
        data.split(split)  # what is missing there is said before anything is written
    stages = make_stages(entry, config, partial(curriculum, entry), length.steps)
    card = data.to_dict() | {"images": count}  # by the name that it has had since there were images alone
    return Setting(entry, config, workdir, saved, mesh, data, card, length, stages)


def check_shares(config: ConfigDict, mesh: Mesh) -> None:
    """Refuse to share parameters out among the devices of several processes.

    Raises:
      UserError: saying what to do.
    """
    if config.shard_parameters and len({device.process_index for device in mesh.devices.flat}) > 1:
        raise UserError("shard_parameters is for the devices of one process: leave it out, or --distributed")


def make_step(config: ConfigDict, task: Task, blueprint: Blueprint, mesh: Mesh) -> TrainStep:
    """The jitted training step that a config describes, on the devices of `mesh`; see `make_train_step`."""
    placed = None
    if config.shard_parameters:
        shapes = part_shapes(config, shapes_of(task)[1])
        placed = spread(tuple(shapes[name] for name in blueprint.names(0)), mesh)
    return make_train_step(
        task,
        blueprint,
        seed=config.seed,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        ema_decay=config.ema_decay,
        accumulate=config.accumulate_grad_batches,
        mesh=mesh,
        placed=placed,
        parallel=Parallel(mesh, isolated=config.sharing == "isolated") if config.block_parallel else None,
    )


def memoized(build: Callable[[Stage], Model]) -> Callable[[Stage], Model]:
    """`build`, once for each stage."""
    built: dict[int, Model] = {}

    def get(stage: Stage) -> Model:
        if stage.start not in built:
            built[stage.start] = build(stage)
        return built[stage.start]

    return get

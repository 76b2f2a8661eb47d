"""A config's training step as a program: its shapes on given devices, and what the compiler says of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dblocks_jax.data.feed import Streamed
from dblocks_jax.run.devices import BLOCK, DATA, check_batch_size, make_mesh, replicated, spread
from dblocks_jax.tasks.task import Entry
from dblocks_jax.training.config import arithmetic, check_config, trained_blocks
from dblocks_jax.training.setting import check_shares, make_step, part_shapes, shapes_of
from dblocks_jax.training.step import Steps, TrainStep, stack_shares

# (row of a table, whether it is of the plain network, whether with gradient checkpointing)
ROWS = (
    ("plain", True, False),
    ("plain + remat", True, True),
    ("DiffusionBlocks", False, False),
    ("DiffusionBlocks + remat", False, True),
)


@dataclass(frozen=True)
class WantedStep:
    """The step that a config describes, and shapes for its arguments, each with its place. Nothing is allocated."""

    config: ConfigDict
    mesh: Mesh
    step: TrainStep
    parts: tuple[Any, ...]  # what it trains
    data: Streamed
    steps: Steps  # of the first block, or of all
    idle: Any  # the parts that wait

    def lower(self) -> Any:
        """The program that training would run, before it is compiled."""
        with arithmetic(self.config):
            return self.step.lower(self.parts, self.data, _placed(self.steps, self.mesh, PartitionSpec()))

    def compile(self) -> Any:
        """The compiled program."""
        return self.lower().compile()

    def zeros(self) -> tuple[tuple[Any, ...], Streamed, Steps]:
        """Arguments to run it with, where the devices are here."""
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), (self.parts, self.data)
        )
        return *zeros, self.steps


def variant(entry: Entry, config: ConfigDict, *, plain: bool, remat: bool, num_blocks: int | None = None) -> ConfigDict:
    """`config` with another model; its training of some blocks only, or of all side by side, is for blocks alone."""
    config = entry.plain(config) if plain else ConfigDict(config.to_dict())
    config.update(gradient_checkpointing=remat, grow_at=(), begin_from="")
    if num_blocks is not None:
        config.update(num_blocks=num_blocks, train_blocks=())
    check_config(entry, config)
    return config


def wanted_step(entry: Entry, config: ConfigDict, card: Any, devices: Sequence[Any] | None = None) -> WantedStep:
    """The step of a config on all devices, or on these, which need not be here.

    Raises:
      UserError: the devices cannot be shared out among blocks or examples.
    """
    mesh = make_mesh(config.num_blocks if config.block_parallel else 1, devices)
    check_batch_size("batch_size", config.batch_size, mesh)
    check_shares(config, mesh)
    task = entry.make(config, card)
    blueprint, params = shapes_of(task)
    shapes = part_shapes(config, params)
    blocks = trained_blocks(entry, config)
    mine = {name: shapes[name] for block in blocks for name in blueprint.names(block)}
    active = tuple(mine.pop(name) for name in blueprint.names(blocks[0]))
    shares = None if task.corruption is None else task.corruption.shares
    lie = _spread if config.shard_parameters else replicated
    block, share, parts = np.int32(0), None if shares is None else shares[0], lie(active, mesh)
    if config.block_parallel:
        assert shares is not None
        block, share = np.arange(config.num_blocks, dtype=np.int32), stack_shares(shares)
        both = (config.sharing == "isolated", True)
        parts = tuple(_of_blocks(p, mesh) if own else q for p, q, own in zip(active, parts, both, strict=True))
    steps = Steps(np.int32(1), block, np.int32(0), np.zeros(1, np.float32), share)
    batch = Streamed(task.batch_shapes(config.batch_size * config.accumulate_grad_batches))
    return WantedStep(
        config=config,
        mesh=mesh,
        step=make_step(config, task, blueprint, mesh),
        parts=parts,
        data=_placed(batch, mesh, PartitionSpec(DATA)),
        steps=steps,
        idle=lie(mine, mesh),
    )


def _of_blocks(shapes: Any, mesh: Mesh) -> Any:
    """Shapes of one block's part as those of all of them, as `stack_over_blocks` places them."""
    count = mesh.shape[BLOCK]
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), shapes)
    return _placed(stacked, mesh, PartitionSpec(BLOCK))


def _spread(shapes: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        spread(shapes, mesh),
    )


def _placed(shapes: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def bytes_on_device(shapes: Any) -> int:
    """What placed arrays of these shapes take on one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)
    )


def total_bytes(analysis: Any) -> int:
    """What a compiled program holds at its peak, by the account that is its `memory_analysis()`."""
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes  # results that take the place of arguments
        + analysis.temp_size_in_bytes
    )

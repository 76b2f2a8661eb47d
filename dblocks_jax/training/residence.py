"""Where the parts of a model live while they are trained: the active block on the device, idle ones where you say."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from dblocks_jax.data.feed import Resident, Streamed
from dblocks_jax.run.devices import replicate, stack_over_blocks, unstack
from dblocks_jax.training.optimizer import Part
from dblocks_jax.training.step import Log, Steps, TrainStep


class Away(NamedTuple):
    """Where idle parts wait, if not on the device: how a part gets there, and how it comes back."""

    leave: Callable[[Part], Part]
    come: Callable[[Part], Part]


class OneAtATime:
    """Trains one block at a time. With `away` the others' parameters and optimizer state leave the device."""

    def __init__(
        self,
        step: TrainStep,
        parts: dict[str, Part],
        names: Callable[[int], tuple[str, ...]],
        *,
        away: Away | None = None,
    ):
        """`parts` are taken over: they are donated to the step. `names` tells the parts that train with a block."""
        self._step = step
        self._names = names
        self._away = away
        self._active: tuple[str, ...] = ()
        self._parts = {name: away.leave(part) for name, part in parts.items()} if away else dict(parts)

    def train(self, block: int, data: Resident | Streamed, steps: Steps) -> Log:
        """Make `steps` and return their metrics, each [k]; does not wait for them unless a block must move out."""
        names = self._names(block)
        if self._away and names != self._active:
            leaving = [name for name in self._active if name not in names]
            self._parts |= {name: self._away.leave(self._parts[name]) for name in leaving}
            jax.block_until_ready([self._parts[name] for name in leaving])  # else blocks would pile up on the device
            self._parts |= {name: self._away.come(self._parts[name]) for name in names}
        self._active = names
        active = tuple(self._parts.pop(name) for name in names)  # donated: nothing else may hold them
        active, metrics = self._step(active, data, steps)
        self._parts.update(zip(names, active, strict=True))
        return metrics

    def parts(self) -> dict[str, Part]:
        """Every part, wherever it lives, for evaluation and checkpoints."""
        return dict(self._parts)

    def wait(self) -> None:
        """Return when all steps are done."""
        jax.block_until_ready(self._parts)


class SideBySide:
    """Trains all blocks at once, each on its own group of devices, which holds no other block."""

    def __init__(
        self,
        step: TrainStep,
        parts: dict[str, Part],
        names: Callable[[int], tuple[str, ...]],
        mesh: Mesh,
        *,
        isolated: bool,
    ):
        """`parts` as in `OneAtATime`, on the host; `step` is a parallel one, with `isolated` as here."""
        self._step = step
        self._mesh = mesh
        count = mesh.shape["block"]
        self._names = [names(block) for block in range(count)]
        self._isolated = isolated
        firsts, blocks = zip(*([parts[name] for name in pair] for pair in self._names), strict=True)
        first = stack_over_blocks(firsts, mesh) if self._isolated else replicate(jax.device_get(firsts[0]), mesh)
        self._active = (first, stack_over_blocks(blocks, mesh))

    def train(self, data: Resident | Streamed, steps: Steps) -> Log:
        """Make `steps` of all blocks and return their metrics, each [blocks, k]; does not wait for them."""
        self._active, metrics = self._step(self._active, data, steps)
        return metrics

    def parts(self) -> dict[str, Part]:
        """Every part, copied to the host, for evaluation and checkpoints."""
        first, blocks = self._active
        of_blocks = zip(self._names, unstack(blocks, self._mesh), strict=True)
        parts = {names[1]: block for names, block in of_blocks}
        if self._isolated:
            return parts | {names[0]: part for names, part in zip(self._names, unstack(first, self._mesh), strict=True)}
        return {self._names[0][0]: first} | parts

    def wait(self) -> None:
        """Return when all steps are done."""
        jax.block_until_ready(self._active)

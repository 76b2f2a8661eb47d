"""Where the parts of a model live while they are trained: the active block on the device, idle ones where you say."""

from collections.abc import Callable
from typing import Any

import jax

from dblocks_jax.devices import to_device, to_host
from dblocks_jax.optimizer import Part
from dblocks_jax.step import Log, Resident, Steps, Streamed

TrainStep = Callable[[tuple[Part, ...], Resident | Streamed, Steps], tuple[tuple[Part, ...], Log]]


class OneAtATime:
    """Trains one block at a time. With `idle_on_host` the others' parameters and optimizer state leave the device."""

    def __init__(
        self, step: TrainStep, parts: dict[str, Part], names: Callable[[int], tuple[str, ...]], *, idle_on_host: bool
    ):
        """`parts` are taken over: they are donated to the step. `names` tells the parts that train with a block."""
        self._step = step
        self._names = names
        self._idle_on_host = idle_on_host
        self._active: tuple[str, ...] = ()
        self._parts = {name: to_host(part) for name, part in parts.items()} if idle_on_host else dict(parts)

    def train(self, block: int, data: Resident | Streamed, steps: Steps) -> Log:
        """Make `steps` and return their metrics, each [k]; does not wait for them unless a block must move out."""
        names = self._names(block)
        if self._idle_on_host and names != self._active:
            leaving = [name for name in self._active if name not in names]
            self._parts |= {name: to_host(self._parts[name]) for name in leaving}
            jax.block_until_ready([self._parts[name] for name in leaving])  # else blocks would pile up on the device
            self._parts |= {name: to_device(self._parts[name]) for name in names}
        self._active = names
        active = tuple(self._parts.pop(name) for name in names)  # donated: nothing else may hold them
        active, metrics = self._step(active, data, steps)
        self._parts.update(zip(names, active, strict=True))
        return metrics

    def parts(self) -> dict[str, Part]:
        """Every part, wherever it lives, for evaluation and checkpoints."""
        return dict(self._parts)

    def params(self) -> dict[str, Any]:
        """Every part's parameters."""
        return {name: part.params for name, part in self._parts.items()}

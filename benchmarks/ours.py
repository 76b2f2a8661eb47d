"""Our training step for the benchmark, built as the trainer builds it. All that touches our API is here."""

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import dblock_cifar100, vit_cifar100
from dblocks_jax.data.datasets import Card
from dblocks_jax.data.feed import Resident
from dblocks_jax.run.devices import make_mesh, replicate, shard
from dblocks_jax.tasks.classify.task import CLASSIFY, Classify
from dblocks_jax.training.config import arithmetic, check_config
from dblocks_jax.training.loop import make_step
from dblocks_jax.training.optimizer import new_part
from dblocks_jax.training.residence import OneAtATime
from dblocks_jax.training.setting import new_model
from dblocks_jax.training.step import Steps

CIFAR100 = Card(
    class_names=tuple(str(label) for label in range(100)),
    image_shape=(32, 32, 3),
    mean=(0.5071, 0.4867, 0.4408),
    std=(0.2675, 0.2565, 0.2761),
)


def get_config(model_type: str, overrides: dict[str, Any]) -> ConfigDict:
    """The released program's settings on CIFAR-100 for "dblock" or "vit", with `overrides`."""
    config = {"dblock": dblock_cifar100, "vit": vit_cifar100}[model_type].get_config()
    config.lock()
    config.update(overrides)
    check_config(CLASSIFY, config)
    return config


class OurSteps:
    """Training steps of one model on random images that live on the device. Called, it makes one and waits for it."""

    def __init__(self, config: ConfigDict):
        self._config = config
        mesh = make_mesh()
        task = Classify(config, CIFAR100)
        blueprint, params = new_model(task, config.seed)
        parts = replicate(jax.device_get({name: new_part(value) for name, value in params.items()}), mesh)
        self._shares = [None] if task.corruption is None else task.corruption.shares
        train_step = make_step(config, task, blueprint, mesh)
        self._model = OneAtATime(train_step, parts, blueprint.names)
        rng = np.random.default_rng(0)
        count = 16 * config.batch_size
        images = rng.integers(0, 256, (count, *CIFAR100.image_shape), np.uint8)
        labels = rng.integers(0, len(CIFAR100.class_names), count, np.int32)
        indices = rng.integers(0, count, (config.steps_per_call, config.batch_size), np.int32)
        self._data = Resident(replicate({"image": images, "label": labels}, mesh), shard(indices, mesh, axis=1))
        self._position = 0

    def __call__(self) -> None:
        """One step of block 0, or of the plain model, to its end."""
        self.enqueue()
        self.wait()

    def enqueue(self, block: int = 0, count: int = 1) -> None:
        """Start `count` steps, at most `steps_per_call`, in one call as the trainer does; does not wait for them."""
        steps = Steps(
            count=np.int32(count),
            block=np.int32(block),
            position=np.int32(self._position),
            lr=np.full(self._config.steps_per_call, self._config.lr, np.float32),
            share=self._shares[block],
        )
        self._position += count
        with arithmetic(self._config):
            self._model.train(block, self._data, steps)

    def wait(self) -> None:
        """Wait for all steps to be done."""
        self._model.wait()

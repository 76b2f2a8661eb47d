"""The frozen classifier whose features and answers score generated images: one of ours, trained if it is not there."""

import hashlib
import os
import time
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Float, Int, UInt8
from ml_collections import ConfigDict

from dblocks_jax.data.augment import normalize
from dblocks_jax.data.datasets import Card
from dblocks_jax.modes.load import Trained, load_trained, only
from dblocks_jax.run.errors import InUse, UserError
from dblocks_jax.run.files import saving, write_json
from dblocks_jax.run.workdir import CONFIG, read_saved
from dblocks_jax.tasks.classify.task import CLASSIFY
from dblocks_jax.training import loop
from dblocks_jax.training.config import arithmetic

STEPS, FEWEST_EPOCHS, BATCH = 1200, 10, 128
MOST_PATCHES = 7  # to a side
SECONDS_BETWEEN_LOOKS = 5.0  # at a judge that another run trains
# The plain transformer that judges: small, and the same whatever is judged.
FIELDS: dict[str, Any] = {
    "task": "classify", "model_type": "vit", "pool": "mean", "open_gates": False, "dropout": 0.0,
    "num_layers": 4, "hidden_size": 64, "num_heads": 4, "intermediate_size": 256, "num_blocks": 1,
    "gamma": 0.05, "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "p_mean": -1.2, "p_std": 1.2,
    "weighting": "none", "answer": "sampler", "num_inference_steps": 0, "sampler_spacing": "cdf", "label_table": "raw",
    "init_noise_scale": 1.0, "cfg_scale": 0.0, "class_dropout_prob": 0.0, "resized_crop": False, "add_rand_aug": False,
    "flip": False, "batch_size": BATCH, "accumulate_grad_batches": 1, "gradient_checkpointing": False, "lr": 3e-3,
    "weight_decay": 0.01, "clip_norm": 1.0, "scheduler_type": "cosine", "scheduler_specific_kwargs": "{}",
    "num_warmup_steps": 100, "max_steps": 0, "ema_decay": 0.0, "seed": 0, "dtype": "float32",
    "prng_impl": "threefry2x32", "block_schedule": "random", "idle_blocks": "device", "sharing": "shared",
    "train_blocks": (), "block_parallel": False, "shard_parameters": False, "grow_at": (), "begin_from": "",
    "val_fraction": 0.0, "wandb": False, "postfix": "", "log_every_n_steps": 100, "eval_batch_size": 500,
}  # fmt: skip
# Of what is generated.
TAKEN = ("dataset", "data_dir", "image_size", "chunk_steps", "steps_per_call", "matmul_precision", "max_bad_steps")


@dataclass(frozen=True)
class Judge:
    """A plain classifier of ours. Images are uint8 [n, h, w, c]."""

    trained: Trained
    folder: Path

    @cached_property
    def look(self) -> Any:
        """(parameters, images) -> (features, answers), compiled."""
        card, blueprint = self.trained.card, self.trained.blueprint

        @jax.jit
        def look(params, images):
            (model,) = blueprint.together((params["model"],))
            features = model.features(normalize(images, card.mean, card.std))
            return features, jax.numpy.argmax(model.head(features), axis=-1)

        return look

    def __call__(self, images: UInt8[np.ndarray, "n h w c"]) -> tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"]]:
        """(what its head reads of each, its answer)."""
        size = min(len(images), self.trained.config.eval_batch_size)
        found = []
        with arithmetic(self.trained.config):
            for start in range(0, len(images), size):
                places = np.minimum(np.arange(start, start + size), len(images) - 1)
                found.append(jax.device_get(self.look(self.trained.params, images[places])))
        features, answers = (np.concatenate(each)[: len(images)] for each in zip(*found, strict=True))
        return features, answers

    def describe(self) -> dict[str, Any]:
        """Which one it is: where it lies, a hash of its parameters, and how well it does on the test split."""
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(jax.device_get(self.trained.params)):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        result = read_saved(self.folder, "train.json") or {}
        return {"run": self.folder.name, "sha256": digest.hexdigest()[:16], "top1": result.get("top1")}


def judge_config(config: ConfigDict, num_images: int) -> ConfigDict:
    """The config of the judge of a data set."""
    size = config.image_size
    patch = next(patch for patch in range(1, size + 1) if size % patch == 0 and size // patch <= MOST_PATCHES)
    devices = jax.device_count()
    batch = max(1, min(BATCH, num_images) // devices) * devices
    epochs = max(FEWEST_EPOCHS, STEPS // max(1, num_images // batch))
    mine = {
        "patch_size": patch, "crop_padding": max(1, size // 8), "batch_size": batch, "num_epochs": epochs,
        "save_every_n_epochs": epochs, "save_top_k": 0,
    }  # fmt: skip
    return ConfigDict(FIELDS | {field: config[field] for field in TAKEN} | mine)


def check_judge(config: ConfigDict) -> None:
    """Refuse a judge that is none of such images, as far as is known before anything is trained.

    Raises:
      UserError: the folder that is named holds no plain classifier, or one of images of another size.
    """
    if config.judge:
        folder = Path(os.path.expanduser(config.judge))
        if read_saved(folder, CONFIG) is None:
            raise UserError(f"judge={config.judge} holds no run: name a plain classifier's, or none for ours")
        _load(folder, (config.image_size, config.image_size))


def _load(folder: Path, size: tuple[int, ...]) -> Trained:
    """A plain classifier of images that have these sizes first."""
    trained = only(load_trained(folder), folder, CLASSIFY)
    if trained.config.model_type != "vit" or trained.card.image_shape[: len(size)] != size:
        raise UserError(f"judge={folder} must be a plain classifier (model_type=vit) of images of {size}")
    return trained


def _place(config: ConfigDict) -> str:
    """What tells images of one's own from others."""
    if config.dataset != "folder":
        return ""
    return f"_{zlib.crc32(os.path.realpath(os.path.expanduser(config.data_dir)).encode()):08x}"


def find_judge(config: ConfigDict, card: Card, num_images: int, beside: Path) -> Judge:
    """The judge that a config names, or the one of its data set, which lies `beside`; it is trained if need be.

    Raises:
      UserError: the run that is named is no plain classifier of such images.
    """
    if config.judge:
        folder = Path(os.path.expanduser(config.judge))
    else:
        folder = beside / f"judge_{config.dataset}_{config.image_size}{_place(config)}"
        wanted = judge_config(config, num_images)
        while "top1" not in (read_saved(folder, "train.json") or {}):  # it is not there, or was ended early
            logging.log_every_n_seconds(logging.INFO, "training the classifier that judges, in %s", 60, folder)
            try:
                result = loop.train(CLASSIFY, wanted, folder)
            except InUse as error:
                logging.log_every_n_seconds(logging.INFO, "waiting for the classifier that judges: %s", 60, error)
                time.sleep(SECONDS_BETWEEN_LOOKS)
                continue
            with saving(folder):
                write_json(folder / "train.json", result)
    trained = _load(folder, card.image_shape)
    if trained.card.class_names != card.class_names:
        raise UserError(f"judge={folder} knows other classes than those that are generated")
    return Judge(trained, folder)

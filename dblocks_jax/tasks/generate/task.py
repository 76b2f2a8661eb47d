"""Labels to images: a DiT whose blocks each denoise an image within their own range of noise."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Key
from ml_collections import ConfigDict

from dblocks_jax.data.augment import augment
from dblocks_jax.data.datasets import Card
from dblocks_jax.diffusion.gaussian import Gaussian
from dblocks_jax.models.blueprint import Blueprint, Params
from dblocks_jax.models.dit import make_dit
from dblocks_jax.tasks.generate import config as fields
from dblocks_jax.tasks.generate.denoiser import denoising_losses
from dblocks_jax.tasks.generate.heldout import make_held_out_loss
from dblocks_jax.tasks.generate.pixels import to_signal
from dblocks_jax.tasks.images import check_card, image_batch
from dblocks_jax.tasks.task import Draws, Entry, Losses, MainScore, Scorer


@dataclass(frozen=True)
class Generate:
    """See `dblocks_jax.tasks.task.Task`. A batch is {"image": [b, h, w, c], uint8 or latents, "label": int32 [b]}."""

    config: ConfigDict
    card: Card

    def __post_init__(self) -> None:
        check_card(self.config, self.card)

    @cached_property
    def corruption(self) -> Gaussian:
        """z = y + sigma * eps, with y the image."""
        return fields.corruption(self.config)

    @property
    def weighting(self) -> Any:
        """mean(w(sigma) * loss), Eq. 6, with which every level weighs the same."""
        return "per_sample"

    def modules(self, key: Key[Array, ""]) -> dict[str, Any]:
        """A fresh model by part."""
        arch, isolated = fields.architecture(self.config, self.card), self.config.sharing == "isolated"
        return make_dit(arch, self.config.num_blocks, isolated=isolated, rngs=nnx.Rngs(key))

    def batch_shapes(self, count: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Images and labels."""
        shapes = image_batch(self.card, count)
        if self.config.dataset == fields.LATENTS:
            shapes["image"] = jax.ShapeDtypeStruct(shapes["image"].shape, jnp.float32)
        return shapes

    def prepare(self, key: Key[Array, ""], batch: dict[str, Array]) -> dict[str, Array]:
        """Augment, and bring pixels to [-1, 1]."""
        images, config = batch["image"], self.config
        if config.crop_padding or config.flip:
            images = augment(
                key, images,
                crop_padding=config.crop_padding, flip=config.flip, resized_crop=False, rand_augment=False,
            )  # fmt: skip
        return batch | {"image": to_signal(images)}

    def losses(self, modules: tuple[Any, ...], example: dict[str, Array], level: Array | None, draws: Draws) -> Losses:
        """|D - y|^2 of each image, at its noise level; some are told no class."""
        (shared, block), images, labels = modules, example["image"], example["label"]
        assert level is not None
        eps = jax.random.normal(draws.noise, images.shape)
        is_dropped = jax.random.bernoulli(draws.condition, self.config.class_dropout_prob, labels.shape)
        labels = jnp.where(is_dropped, shared.null_label, labels)
        return denoising_losses(shared, block, images, labels, level, eps, sigma_data=self.config.sigma_data)

    def scorer(self, blueprint: Blueprint, mesh: Mesh) -> Scorer:
        """The loss on images that it was not trained on; samples are scored by the modes that make them."""
        del mesh
        held_out = make_held_out_loss(self.config, self.corruption, blueprint)

        def run(params: dict[str, Params], data: Any, split: str, at_each_batch: Callable[[], None]) -> dict[str, Any]:
            found = held_out(params, data.split(split), at_each_batch)
            return found if math.isfinite(found["loss"]) else found | {"diverged": True}

        return run

    def tell(self, scores: dict[str, Any]) -> str:
        """A line of the log."""
        by_block = ", ".join(f"{value:.4f}" for value in scores["loss_by_block"])
        return f"loss {scores['loss']:.4f} (by block: {by_block})"


GENERATE = Entry(
    name="generate",
    check=fields.check,
    num_blocks=fields.num_blocks,
    find_data=fields.find_data,
    card=Card.of,
    card_without_data=fields.card_without_data,
    make=Generate,
    describe=fields.describe,
    main_score=MainScore("loss", more_is_better=False),
    warn=fields.warn,
    sampler_fields=fields.SAMPLER_FIELDS,
)

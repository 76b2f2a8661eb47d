"""Images to labels: the plain vision transformer, and blocks that each denoise the embedding of the label."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Key
from ml_collections import ConfigDict

from dblocks_jax.data.augment import normalize
from dblocks_jax.data.datasets import Card
from dblocks_jax.diffusion.gaussian import Gaussian
from dblocks_jax.models.blueprint import Blueprint, Params
from dblocks_jax.run.workdir import shortened
from dblocks_jax.tasks.classify import config as fields
from dblocks_jax.tasks.classify.classifier import Classifier, make_classifier
from dblocks_jax.tasks.classify.objective import denoising_losses, drop_images, plain_losses
from dblocks_jax.tasks.classify.parts import new_model, to_modules
from dblocks_jax.tasks.classify.scores import answers, metrics
from dblocks_jax.tasks.gaussian import gaussian
from dblocks_jax.tasks.images import augment_batch, card_without_images, check_card, find_dataset, image_batch
from dblocks_jax.tasks.task import Draws, Entry, Losses, MainScore, Scorer


@dataclass(frozen=True)
class Classify:
    """See `dblocks_jax.tasks.task.Task`. A batch is {"image": uint8 [b, h, w, c], "label": int32 [b]}."""

    config: ConfigDict
    card: Card

    def __post_init__(self) -> None:
        check_card(self.config, self.card)

    @property
    def is_plain(self) -> bool:
        """Whether this is the plain model, trained end to end."""
        return self.config.model_type == "vit"

    @cached_property
    def corruption(self) -> Gaussian | None:
        """z = y + sigma * eps, with y the unit-norm embedding of the label."""
        return None if self.is_plain else gaussian(self.config)

    @property
    def weighting(self) -> Any:
        """How w(sigma) counts."""
        return "none" if self.is_plain else self.config.weighting

    def modules(self, key: Key[Array, ""]) -> dict[str, nnx.Module]:
        """A fresh model by part."""
        return to_modules(new_model(self.config, fields.architecture(self.config, self.card), nnx.Rngs(key)))

    def prepare(self, key: Key[Array, ""], batch: dict[str, Array]) -> dict[str, Array]:
        """Augment and normalise."""
        images = augment_batch(self.config, key, batch["image"])
        return batch | {"image": normalize(images, self.card.mean, self.card.std)}

    def batch_shapes(self, count: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Images and labels."""
        return image_batch(self.card, count)

    def losses(self, modules: tuple[Any, ...], example: dict[str, Array], level: Array | None, draws: Draws) -> Losses:
        """Cross-entropy of each image, at its noise level."""
        images, labels = example["image"], example["label"]
        if self.is_plain:
            (model,) = modules
            return plain_losses(model, images, labels, draws.network)
        (shared, block), width = modules, self.config.hidden_size
        assert level is not None
        eps = jax.random.normal(draws.noise, (labels.shape[0], width))
        images = drop_images(draws.condition, images, fields.image_dropout(self.config))
        return denoising_losses(
            shared, block, images, labels, level, eps, sigma_data=self.config.sigma_data, key=draws.network
        )

    def classifier(self, blueprint: Blueprint) -> Classifier:
        """(parameters by part, images, positions) -> logits after each denoising step."""
        return make_classifier(self.config, blueprint, self.card)

    def scorer(self, blueprint: Blueprint, mesh: Mesh) -> Scorer:
        """Accuracy and its kin, on every image of a split."""
        classify = self.classifier(blueprint)

        def run(params: dict[str, Params], data: Any, split: str, at_each_batch: Callable[[], None]) -> dict[str, Any]:
            source = data.split(split)
            assert source is not None
            size = self.config.eval_batch_size
            answered = answers(classify, params, source, batch_size=size, mesh=mesh, at_each_batch=at_each_batch)
            return metrics(*answered, source.labels)

        return run

    def tell(self, scores: dict[str, Any]) -> str:
        """A line of the log."""
        by_step = scores["accuracy_by_step"]
        shown = shortened(by_step)
        which = "each denoising step"
        if len(shown) < len(by_step):
            which = f"denoising steps {', '.join(str(place) for place, _ in shown)}"
        found = ", ".join(f"{accuracy:.4f}" for _, accuracy in shown)
        return f"top1 {scores['top1']:.4f} (after {which}: {found})"


CLASSIFY = Entry(
    name="classify",
    check=fields.check,
    num_blocks=fields.num_blocks,
    find_data=find_dataset,
    card=Card.of,
    card_without_data=card_without_images,
    make=Classify,
    describe=fields.describe,
    plain=fields.plain,
    main_score=MainScore("top1", more_is_better=True),
    warn=fields.warn,
    sampler_fields=fields.SAMPLER_FIELDS,
)

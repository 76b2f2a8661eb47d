"""Hidden symbols to symbols: a masked transformer whose blocks each uncover while a share of their own is hidden."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key
from ml_collections import ConfigDict

from dblocks_jax.data.pixels import PixelCard
from dblocks_jax.diffusion.masking import Masking, hide_each
from dblocks_jax.models.blueprint import Blueprint, Params
from dblocks_jax.models.masked_transformer import make_masked
from dblocks_jax.tasks.mask import config as fields
from dblocks_jax.tasks.mask.bound import make_bound
from dblocks_jax.tasks.mask.denoiser import hidden_cross_entropy
from dblocks_jax.tasks.task import Draws, Entry, Losses, MainScore, Scorer
from dblocks_jax.tasks.text import TextCard, crop, unit


@dataclass(frozen=True)
class Mask:
    """See `dblocks_jax.tasks.task.Task`. A batch is {"tokens": [b, m], whole numbers}, of which `length` are taken."""

    config: ConfigDict
    card: TextCard | PixelCard

    @cached_property
    def corruption(self) -> Masking:
        """Tokens are hidden, each with probability t."""
        return fields.corruption(self.config)

    @property
    def weighting(self) -> Any:
        """mean(w(t) * loss), with which every level weighs as it does in the likelihood's bound."""
        return "per_sample"

    def modules(self, key: Key[Array, ""]) -> dict[str, Any]:
        """A fresh model by part."""
        arch, isolated = fields.architecture(self.config, self.card), self.config.sharing == "isolated"
        return make_masked(arch, self.config.num_blocks, isolated=isolated, rngs=nnx.Rngs(key))

    def batch_shapes(self, count: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Symbols."""
        if isinstance(self.card, PixelCard):
            return {"tokens": jax.ShapeDtypeStruct((count, self.card.length), np.uint8)}
        return {"tokens": jax.ShapeDtypeStruct((count, 2 * self.card.length - 1), self.card.vocabulary.dtype)}

    def prepare(self, key: Key[Array, ""], batch: dict[str, Array]) -> Int[Array, "b t"]:
        """A window of `length` tokens of each example, at any place alike."""
        return crop(key, batch["tokens"], self.card.length)

    def losses(self, modules: tuple[Any, ...], example: Int[Array, "b t"], level: Array | None, draws: Draws) -> Losses:
        """Cross-entropy of the tokens that are hidden, and -alpha'(t) / (1 - alpha(t)) = 1 / t (Eq. 7 and 8)."""
        assert level is not None
        shared, block = modules
        is_hidden = hide_each(draws.noise, level, example.shape[1])
        costs = hidden_cross_entropy(shared, block, example, is_hidden, level)
        return Losses(costs, 1 / level, {"bits": costs / level / math.log(2)})

    def scorer(self, blueprint: Blueprint, mesh: Mesh) -> Scorer:
        """The bound on the bits of a symbol of held-out data."""
        del mesh
        bound = make_bound(self.config, self.corruption, blueprint, len(self.card.vocabulary))

        def run(params: dict[str, Params], data: Any, split: str, at_each_batch: Callable[[], None]) -> dict[str, Any]:
            draws = self.config.bound_draws if split == "test" else 1  # enough to choose a checkpoint by
            found: dict[str, Any] = {"unit": unit(self.card)} | bound(params, data.split(split), draws, at_each_batch)
            return found if math.isfinite(found["bits"]) else found | {"diverged": True}

        return run

    def tell(self, scores: dict[str, Any]) -> str:
        """A line of the log."""
        by_block = ", ".join(f"{value:.4f}" for value in scores["bits_by_block"])
        error = "" if math.isnan(scores["bits_error"]) else f" ± {scores['bits_error']:.4f}"
        return f"<= {scores['bits']:.4f}{error} bits per {scores['unit']} (by block: {by_block})"


MASK = Entry(
    name="mask",
    check=fields.check,
    find_data=fields.find_data,
    card=fields.card,
    card_without_data=fields.card_without_data,
    make=Mask,
    describe=fields.describe,
    main_score=MainScore("bits", more_is_better=False),
    sampler_fields=fields.SAMPLER_FIELDS,
)

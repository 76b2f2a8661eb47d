"""Tokens to the next token: the plain decoder, and blocks that each denoise the embedding of the next token."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key
from ml_collections import ConfigDict

from dblocks_jax.diffusion.gaussian import Gaussian
from dblocks_jax.models.blueprint import Blueprint
from dblocks_jax.models.dblock_llama import make_dblock_llama
from dblocks_jax.models.llama import Llama
from dblocks_jax.tasks.gaussian import gaussian
from dblocks_jax.tasks.next_token import config as fields
from dblocks_jax.tasks.next_token.generation import make_writer
from dblocks_jax.tasks.next_token.objective import denoising_losses, plain_losses
from dblocks_jax.tasks.next_token.scores import make_logits
from dblocks_jax.tasks.task import Draws, Entry, Losses, MainScore, Scorer
from dblocks_jax.tasks.text import TextCard, card_without_data, crop, find_data
from dblocks_jax.tasks.text_order import LogitsOf, make_scorer
from dblocks_jax.tasks.text_writing import Writer


@dataclass(frozen=True)
class NextToken:
    """See `dblocks_jax.tasks.task.Task`. A batch is {"tokens": [b, m], whole numbers}, of which `length` are taken."""

    config: ConfigDict
    card: TextCard

    @property
    def is_plain(self) -> bool:
        """Whether this is the plain model, trained end to end."""
        return self.config.model_type == "llama"

    @cached_property
    def corruption(self) -> Gaussian | None:
        """z = y + sigma * eps, with y the unit-norm embedding of a token."""
        return None if self.is_plain else gaussian(self.config)

    @property
    def weighting(self) -> Any:
        """How w(sigma) counts."""
        return "none" if self.is_plain else self.config.weighting

    def modules(self, key: Key[Array, ""]) -> dict[str, nnx.Module]:
        """A fresh model by part."""
        arch, rngs = fields.architecture(self.config, self.card), nnx.Rngs(key)
        if self.is_plain:
            return {"model": Llama(arch, rngs=rngs)}
        isolated = self.config.sharing == "isolated"
        return make_dblock_llama(arch, self.config.num_blocks, head=self.config.head, isolated=isolated, rngs=rngs)

    def batch_shapes(self, count: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Tokens."""
        return {"tokens": jax.ShapeDtypeStruct((count, 2 * self.card.length - 1), self.card.vocabulary.dtype)}

    def prepare(self, key: Key[Array, ""], batch: dict[str, Array]) -> Int[Array, "b t"]:
        """A window of `length` tokens of each example, at any place alike."""
        return crop(key, batch["tokens"], self.card.length)

    def losses(self, modules: tuple[Any, ...], example: Int[Array, "b t"], level: Array | None, draws: Draws) -> Losses:
        """Cross-entropy of the tokens of each sample, at its noise level."""
        if level is None:
            (model,) = modules
            return plain_losses(model, example)
        (shared, block), config = modules, self.config
        eps = jax.random.normal(draws.noise, (*example.shape, config.hidden_size))
        return denoising_losses(
            shared, block, example, level, eps, sigma_data=config.sigma_data, sigma_min=config.sigma_min
        )

    def scorer(self, blueprint: Blueprint, mesh: Mesh) -> Scorer:
        """The bits of a character of held-out text."""
        del mesh
        return make_scorer(self, blueprint)

    def logits_of(self, blueprint: Blueprint) -> LogitsOf:
        """Those of every token but the first, of blocks by the first block."""
        return make_logits(self.config, blueprint)

    def writer(self, blueprint: Blueprint) -> Writer:
        """What continues texts."""
        return make_writer(self.config, blueprint)

    def written_at_once(self) -> int:
        """Texts that are written side by side."""
        return self.config.eval_batch_size

    def tell(self, scores: dict[str, Any]) -> str:
        """A line of the log."""
        return f"{scores['bits']:.4f} bits per character{'' if self.is_plain else ', by the first block'}"


NEXT_TOKEN = Entry(
    name="next_token",
    check=fields.check,
    num_blocks=fields.num_blocks,
    find_data=find_data,
    card=TextCard.of,
    card_without_data=card_without_data,
    make=NextToken,
    describe=fields.describe,
    plain=fields.plain,
    main_score=MainScore("bits", more_is_better=False),
    sampler_fields=fields.SAMPLER_FIELDS,
)

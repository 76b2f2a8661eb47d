"""Tokens to the next token by recurrent depth: Huginn itself, and its network as a denoiser, trained in one pass."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from dblocks_jax.diffusion.gaussian import Gaussian
from dblocks_jax.models.blueprint import Blueprint, Params
from dblocks_jax.models.huginn import Huginn, make_dblock_huginn
from dblocks_jax.tasks.gaussian import gaussian
from dblocks_jax.tasks.recurrent import config as fields
from dblocks_jax.tasks.recurrent.denoiser import (
    NOTHING,
    Caches,
    continued,
    dblock_logits,
    huginn_logits,
    remembered,
    whole,
)
from dblocks_jax.tasks.recurrent.objective import denoising_losses, huginn_losses
from dblocks_jax.tasks.task import Draws, Entry, Losses, MainScore, Scorer
from dblocks_jax.tasks.text import TextCard, card_without_data, crop, find_data
from dblocks_jax.tasks.text_order import LogitsOf, make_scorer
from dblocks_jax.tasks.text_writing import Writer, checked, make_cached_writer, make_choose


@dataclass(frozen=True)
class Recurrent:
    """See `dblocks_jax.tasks.task.Task`. A batch is {"tokens": [b, m], whole numbers}, of which `length` are taken."""

    config: ConfigDict
    card: TextCard

    @property
    def is_plain(self) -> bool:
        """Whether this is Huginn itself."""
        return self.config.model_type == "huginn"

    @cached_property
    def corruption(self) -> Gaussian | None:
        """z = y + sigma * eps, with y the unit-norm embedding of the next token; one block owns all of it."""
        return None if self.is_plain else gaussian(self.config)

    @property
    def weighting(self) -> Any:
        """How w(sigma) counts."""
        return "none" if self.is_plain else self.config.weighting

    def levels(self) -> Float[np.ndarray, " n"]:
        """Those that a token goes through, descending."""
        config = self.config
        return gaussian(config).levels(config.num_inference_steps, config.sampler_spacing)

    def modules(self, key: Key[Array, ""]) -> dict[str, nnx.Module]:
        """A fresh model by part."""
        arch, rngs = fields.architecture(self.config, self.card), nnx.Rngs(key)
        return {"model": Huginn(arch, rngs=rngs)} if self.is_plain else make_dblock_huginn(arch, rngs=rngs)

    def batch_shapes(self, count: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Tokens."""
        return {"tokens": jax.ShapeDtypeStruct((count, 2 * self.card.length - 1), self.card.vocabulary.dtype)}

    def prepare(self, key: Key[Array, ""], batch: dict[str, Array]) -> Int[Array, "b t"]:
        """A window of `length` tokens of each example, at any place alike."""
        return crop(key, batch["tokens"], self.card.length)

    def losses(self, modules: tuple[Any, ...], example: Int[Array, "b t"], level: Array | None, draws: Draws) -> Losses:
        """Cross-entropy of the tokens of each sample but the first, after random steps or at its noise level."""
        if level is None:
            return huginn_losses(modules[0], example, draws.noise, draws.network)
        eps = jax.random.normal(draws.noise, (*example.shape, self.config.hidden_size))
        shared, trunk = modules
        return denoising_losses(shared, trunk, example, level, eps, sigma_data=self.config.sigma_data)

    def scorer(self, blueprint: Blueprint, mesh: Mesh) -> Scorer:
        """The bits of a character of held-out text, after all steps or at the last level.

        Of several levels also "bits_first", those at the first one alone, where nothing is denoised yet.
        """
        del mesh
        score = make_scorer(self, blueprint)
        if self.is_plain or self.config.num_inference_steps == 1:
            return score
        one_level = Recurrent(ConfigDict({**self.config.to_dict(), "num_inference_steps": 1}), self.card)
        score_first = make_scorer(one_level, blueprint)

        def run(params: dict[str, Params], *where: Any) -> dict[str, Any]:
            return score(params, *where) | {"bits_first": score_first(params, *where)["bits"]}

        return run

    def answer(
        self, modules: tuple[Any, ...], run: Any, tokens: Int[Array, "b t"], caches: Caches = NOTHING
    ) -> tuple[Float[Array, "b t v"], Caches]:
        """(logits of the tokens behind these, caches): of all at once, or of one, as `run` has it.

        `run` makes of a trunk how its stacks are run.
        """
        if self.is_plain:
            (model,) = modules
            return huginn_logits(model, run(model.trunk), tokens, caches, self.config.num_inference_steps)
        shared, trunk = modules
        levels = jnp.asarray(self.levels(), jnp.float32)
        return dblock_logits(shared, trunk, run(trunk), tokens, caches, levels, self.config.sigma_data)

    def logits_of(self, blueprint: Blueprint) -> LogitsOf:
        """Those of every token but the first, given those before it: exact, since nothing is drawn."""

        def logits_of(together, tokens: Int[Array, "b t"], positions: Int[Array, " b"]) -> Float[Array, "b n v"]:
            del positions
            return self.answer(blueprint.together(together), whole, tokens)[0][:, :-1]

        return logits_of

    def writer(self, blueprint: Blueprint) -> Writer:
        """What continues texts, with keys and values kept for every step or level: as all of it at once would be."""

        def prefill(modules, tokens, length):
            logits, caches = self.answer(modules, lambda trunk: remembered(trunk, length), tokens)
            return logits[:, -1], caches

        def step(modules, token, caches, position):
            logits, caches = self.answer(modules, lambda trunk: continued(trunk, position), token[:, None], caches)
            return logits[:, 0], caches

        return checked(make_cached_writer(blueprint, make_choose(self.config), prefill, step))

    def written_at_once(self) -> int:
        """Texts that are written side by side."""
        return fields.written_at_once(self.config, self.card.length)

    def tell(self, scores: dict[str, Any]) -> str:
        """A line of the log."""
        first = f", {scores['bits_first']:.4f} at the first level" if "bits_first" in scores else ""
        return f"{scores['bits']:.4f} bits per character{first}"


RECURRENT = Entry(
    name="recurrent",
    check=fields.check,
    num_blocks=fields.num_blocks,
    find_data=find_data,
    card=TextCard.of,
    card_without_data=card_without_data,
    make=Recurrent,
    describe=fields.describe,
    plain=fields.plain,
    main_score=MainScore("bits", more_is_better=False),
    sampler_fields=fields.SAMPLER_FIELDS,
)

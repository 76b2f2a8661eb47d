"""From a config to the pieces that train and classify: parameters by part, the loss of a step, and the classifier."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dblocks_jax.augment import normalize
from dblocks_jax.config import (
    find_edges,
    hands_on,
    image_dropout,
    noise_distribution,
    num_inference_steps,
    rest_on_host,
)
from dblocks_jax.datasets import Card
from dblocks_jax.denoiser import denoise_step
from dblocks_jax.devices import to_device
from dblocks_jax.diffusion.noise import blocks_of_sigmas, inference_sigmas, sigmas_by_block, training_ranges
from dblocks_jax.diffusion.sampler import initial_z, sample
from dblocks_jax.models.dblock_vit import (
    DBlockViT,
    IsolatedDBlockViT,
    hand_on,
    make_dblock_vit,
    make_isolated_dblock_vit,
)
from dblocks_jax.models.vit import Architecture, ViT
from dblocks_jax.objective import BlockLoss, plain_loss
from dblocks_jax.optimizer import Params
from dblocks_jax.step import Augmentation, LossFn, Parallel, TrainStep, make_train_step
from dblocks_jax.streams import stream

KARRAS_RHO = 7.0
Model = ViT | DBlockViT | IsolatedDBlockViT

# (parameters by part, uint8 images, position of each in its split) -> logits after each denoising step; that of a
# DiffusionBlocks model also takes plan=, as `sampler_plan` returns it, to sample otherwise with the same programs
Classifier = Callable[..., Float[Array, "n b classes"]]


@dataclass(frozen=True)
class Blueprint:
    """A model without its numbers: the structure of each part. Parameters are kept by part, in nested dicts.

    The plain model has the one part "model"; a DiffusionBlocks model has "shared", "block_0", "block_1", ..., or, where
    blocks are isolated, "shared_0", "block_0", "shared_1", "block_1", ...
    """

    parts: dict[str, nnx.GraphDef]

    @classmethod
    def of(cls, model: Model) -> tuple["Blueprint", dict[str, Params]]:
        """Take a model apart: (structure, parameters by part)."""
        if isinstance(model, ViT):
            modules = {"model": model}
        else:
            isolated = isinstance(model, IsolatedDBlockViT)
            modules = {f"shared_{b}": s for b, s in enumerate(model.shared)} if isolated else {"shared": model.shared}
            modules |= {f"block_{b}": block for b, block in enumerate(model.blocks)}
        split = {name: nnx.split(module, nnx.Param) for name, module in modules.items()}
        params = {name: nnx.to_pure_dict(state) for name, (_, state) in split.items()}
        return cls({name: graphdef for name, (graphdef, _) in split.items()}), params

    def names(self, block: int) -> tuple[str, ...]:
        """The parts that are trained together with a block."""
        if "model" in self.parts:
            return ("model",)
        return ("shared" if "shared" in self.parts else f"shared_{block}", f"block_{block}")

    def earlier(self, block: int) -> tuple[tuple[str, ...], ...]:
        """The parts of blocks 0, 1, ... up to the last but one, without those that train with `block`.

        Where a block does not come before `block`, the last one stands in for it: the shapes count, and what `block`
        trains is donated.
        """
        last = sum(name.startswith("block_") for name in self.parts) - 1
        before = [self.names(b if b < block else last) for b in range(last)]
        return tuple(tuple(name for name in names if name != "shared") for names in before)

    def model(self, params: dict[str, Params]) -> Model:
        """Put a model together again."""
        modules = {name: nnx.merge(graphdef, params[name]) for name, graphdef in self.parts.items()}
        if "model" in modules:
            return modules["model"]
        blocks = [module for name, module in modules.items() if name.startswith("block_")]
        if "shared" in modules:
            return DBlockViT(modules["shared"], blocks)
        return IsolatedDBlockViT([modules[f"shared_{b}"] for b in range(len(blocks))], blocks)


def new_model(config: ConfigDict, arch: Architecture) -> Model:
    """A freshly initialised model, a function of (config, seed) alone."""
    rngs = nnx.Rngs(stream(config.seed, "init", 0))
    if config.model_type == "vit":
        return ViT(arch, rngs=rngs)
    make = make_isolated_dblock_vit if config.sharing == "isolated" else make_dblock_vit
    return make(arch, config.num_blocks, rngs=rngs)


def make_objective(config: ConfigDict, blueprint: Blueprint) -> tuple[LossFn, list[Any]]:
    """(loss of a training step, the noise range of each block; the plain model is one block without noise)."""
    if config.model_type == "vit":
        return partial(
            plain_loss, graphdef=blueprint.parts["model"], smoothing=config.label_smoothing, mixing=config.mixing
        ), [None]
    noise = noise_distribution(config)
    ranges = training_ranges(noise, find_edges(config), config.gamma, config.sigma_data)
    loss = BlockLoss(
        shared=blueprint.parts[blueprint.names(0)[0]],
        block=blueprint.parts["block_0"],
        hidden_size=config.hidden_size,
        p_mean=config.p_mean,
        p_std=config.p_std,
        sigma_data=config.sigma_data,
        weighting=config.weighting,
        z_dropout=config.z_dropout,
        smoothing=config.label_smoothing,
        mixing=config.mixing,
        guess_share=config.guess_share,
        levels=tuple(
            sampler_plan(ConfigDict({**config.to_dict(), "num_inference_steps": config.num_blocks}))[0].tolist()
        ),
        table=config.label_table,
        image_dropout=image_dropout(config),
    )
    return loss, list(ranges)


def make_step(config: ConfigDict, loss_fn: LossFn, card: Card, parallel: Parallel | None = None) -> TrainStep:
    """Build the jitted training step that a config describes; see `make_train_step`."""
    return make_train_step(
        loss_fn,
        augmentation=Augmentation(config.crop_padding, config.flip, config.resized_crop, config.add_rand_aug),
        mean=card.mean,
        std=card.std,
        seed=config.seed,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        accumulate=config.accumulate_grad_batches,
        ema_decay=config.ema_decay,
        parallel=parallel,
    )


def sampler_plan(config: ConfigDict) -> tuple[Float[np.ndarray, " n"], list[int]]:
    """(noise levels, descending; the block that runs at each of them) of the sampler that a config describes."""
    noise = noise_distribution(config)
    if config.sampler_spacing == "blocks":
        return sigmas_by_block(find_edges(config), num_inference_steps(config))
    rho = KARRAS_RHO if config.sampler_spacing == "karras" else None
    sigmas = inference_sigmas(noise, num_inference_steps(config), rho=rho)
    return sigmas, blocks_of_sigmas(find_edges(config), sigmas)


def make_classifier(config: ConfigDict, blueprint: Blueprint, card: Card) -> Classifier:
    """Build the classifier that a config describes. It compiles once for all blocks and steps.

    An image's starting noise depends on the seed and its position in the split alone, not on the batch around it.
    """
    if config.model_type == "vit":

        @jax.jit
        def classify_plain(params, images, positions):
            del positions
            return nnx.merge(blueprint.parts["model"], params["model"])(normalize(images, card.mean, card.std))[None]

        return classify_plain

    is_handed = hands_on(config)
    plan_of_config = sampler_plan(config)
    sigma_max = plan_of_config[0][0]  # where every plan begins
    shared_graphdef = blueprint.parts[blueprint.names(0)[0]]

    @partial(jax.jit, static_argnums=(1, 2))
    def unit_noise(positions, name, draw):
        keys = jax.vmap(partial(stream, config.seed, name))(positions)
        if draw:
            keys = jax.vmap(partial(jax.random.fold_in, data=draw))(keys)
        return jax.vmap(lambda key: jax.random.normal(key, (config.hidden_size,)))(keys)

    @jax.jit
    def start(images, unit_noise):
        return normalize(images, card.mean, card.std), initial_z(unit_noise, sigma_max, config.init_noise_scale)

    @jax.jit
    def step(shared, block, images, z, sigma, sigma_next, labels_next):
        shared, block = nnx.merge(shared_graphdef, shared), nnx.merge(blueprint.parts["block_0"], block)
        logits, z = denoise_step(
            shared, block, images, z, sigma, sigma_next,
            sigma_data=config.sigma_data, cfg_scale=config.cfg_scale, table=config.label_table, labels_next=labels_next,
        )  # fmt: skip
        return logits, z, hand_on(shared, block, images) if is_handed else None

    @jax.jit
    def embed(shared, images):
        return nnx.merge(shared_graphdef, shared).embed_patches(images, None)

    @jax.jit
    def skip(shared, block, tokens):
        return hand_on(nnx.merge(shared_graphdef, shared), nnx.merge(blueprint.parts["block_0"], block), tokens)

    def classify(params, images, positions, plan=plan_of_config):
        draws = [classify_once(params, images, positions, plan, draw) for draw in range(config.num_eval_samples)]
        if len(draws) == 1:
            return draws[0]
        return jax.nn.logsumexp(jax.nn.log_softmax(jnp.stack(draws)), axis=0) - jnp.log(len(draws))

    def classify_once(params, images, positions, plan, draw):
        sigmas, blocks = plan
        images, z = start(images, unit_noise(positions, "sampler", draw))
        handed: dict[int, Array] = {}  # the image's tokens as each block gets them

        def image_for(block: int) -> Array:
            if not is_handed:
                return images
            if block not in handed:
                parts = [to_device(params[name]) for name in blueprint.names(max(0, block - 1))]
                handed[block] = embed(parts[0], images) if block == 0 else skip(*parts, image_for(block - 1))
            return handed[block]

        def visit(index: int, z: Array, sigma: np.float32, sigma_next: np.float32):
            if rest_on_host(config):
                jax.block_until_ready(z)  # else blocks would pile up on the device
            number = blocks[index]
            shared, block = (to_device(params[name]) for name in blueprint.names(number))
            name_next = blueprint.names([*blocks, blocks[-1]][index + 1])[0]
            labels_next = None if name_next == "shared" else to_device(params[name_next]["labels"])
            logits, z, tokens = step(shared, block, image_for(number), z, sigma, sigma_next, labels_next)
            if is_handed:
                handed[number + 1] = tokens
            return logits, z

        fresh = partial(unit_noise, positions, "ancestral")

        def noise(index: int):
            return fresh(1 + index + draw * len(sigmas))

        return sample(visit, z, sigmas, range(len(sigmas)), config.sampler, noise)[0]

    return classify


@jax.jit
def summarize(logits: Float[Array, "n b classes"]) -> tuple[Int[Array, "n b"], Float[Array, "b classes"]]:
    """What evaluation keeps of the logits of all steps: the label each step believes, and the last step's logits."""
    return jnp.argmax(logits, axis=-1), logits[-1]

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

from dblocks_jax.data.augment import normalize
from dblocks_jax.data.datasets import Card
from dblocks_jax.diffusion.noise import block_edges, blocks_of_sigmas, inference_sigmas, training_ranges
from dblocks_jax.diffusion.sampler import initial_z, sample
from dblocks_jax.models.dblock_vit import DBlockViT, IsolatedDBlockViT, make_dblock_vit, make_isolated_dblock_vit
from dblocks_jax.models.vit import Architecture, ViT
from dblocks_jax.run.devices import to_device
from dblocks_jax.run.streams import stream
from dblocks_jax.tasks.classify.denoiser import denoise_step
from dblocks_jax.tasks.classify.objective import BlockLoss, plain_loss
from dblocks_jax.training.config import image_dropout, noise_distribution, num_inference_steps, rest_on_host
from dblocks_jax.training.optimizer import Params
from dblocks_jax.training.step import Augmentation, LossFn, Parallel, TrainStep, make_train_step

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
        return partial(plain_loss, graphdef=blueprint.parts["model"]), [None]
    noise = noise_distribution(config)
    ranges = training_ranges(noise, block_edges(noise, config.num_blocks), config.gamma)
    loss = BlockLoss(
        shared=blueprint.parts[blueprint.names(0)[0]],
        block=blueprint.parts["block_0"],
        hidden_size=config.hidden_size,
        p_mean=config.p_mean,
        p_std=config.p_std,
        sigma_data=config.sigma_data,
        weighting=config.weighting,
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
        parallel=parallel,
    )


def sampler_plan(config: ConfigDict) -> tuple[Float[np.ndarray, " n"], list[int]]:
    """(noise levels, descending; the block that runs at each of them) of the sampler that a config describes."""
    noise = noise_distribution(config)
    rho = KARRAS_RHO if config.sampler_spacing == "karras" else None
    sigmas = inference_sigmas(noise, num_inference_steps(config), rho=rho)
    return sigmas, blocks_of_sigmas(block_edges(noise, config.num_blocks), sigmas)


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

    plan_of_config = sampler_plan(config)
    sigma_max = plan_of_config[0][0]  # where every plan begins
    shared_graphdef = blueprint.parts[blueprint.names(0)[0]]

    @jax.jit
    def start(images, positions):
        keys = jax.vmap(partial(stream, config.seed, "sampler"))(positions)
        unit_noise = jax.vmap(lambda key: jax.random.normal(key, (config.hidden_size,)))(keys)
        return normalize(images, card.mean, card.std), initial_z(unit_noise, sigma_max, config.init_noise_scale)

    @jax.jit
    def step(shared, block, images, z, sigma, sigma_next, labels_next):
        return denoise_step(
            nnx.merge(shared_graphdef, shared), nnx.merge(blueprint.parts["block_0"], block),
            images, z, sigma, sigma_next,
            sigma_data=config.sigma_data, cfg_scale=config.cfg_scale, table=config.label_table, labels_next=labels_next,
        )  # fmt: skip

    def classify(params, images, positions, plan=plan_of_config):
        sigmas, blocks = plan
        images, z = start(images, positions)

        def visit(index: int, z: Array, sigma: np.float32, sigma_next: np.float32):
            if rest_on_host(config):
                jax.block_until_ready(z)  # else blocks would pile up on the device
            shared, block = (to_device(params[name]) for name in blueprint.names(blocks[index]))
            name_next = blueprint.names([*blocks, blocks[-1]][index + 1])[0]
            labels_next = None if name_next == "shared" else to_device(params[name_next]["labels"])
            return step(shared, block, images, z, sigma, sigma_next, labels_next)

        return sample(visit, z, sigmas, range(len(sigmas)))[0]

    return classify


@jax.jit
def summarize(logits: Float[Array, "n b classes"]) -> tuple[Int[Array, "n b"], Float[Array, "b classes"]]:
    """What evaluation keeps of the logits of all steps: the label each step believes, and the last step's logits."""
    return jnp.argmax(logits, axis=-1), logits[-1]

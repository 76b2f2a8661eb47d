"""From images to answers: the sampler of a DiffusionBlocks model, its blocks' joint judgement, or the plain model."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dblocks_jax.data.augment import normalize
from dblocks_jax.data.datasets import Card
from dblocks_jax.diffusion.sampler import initial_z, sample
from dblocks_jax.models.blueprint import Blueprint
from dblocks_jax.run.devices import to_device
from dblocks_jax.run.streams import stream
from dblocks_jax.tasks.classify.config import num_inference_steps
from dblocks_jax.tasks.classify.denoiser import denoise_step, join
from dblocks_jax.tasks.gaussian import gaussian

# (parameters by part, uint8 images, position of each in its split) -> logits after each denoising step; that of a
# DiffusionBlocks model also takes plan=, as `sampler_plan` returns it, to sample otherwise with the same programs
Classifier = Callable[..., Float[Array, "n b classes"]]


def sampler_plan(config: ConfigDict) -> tuple[Float[np.ndarray, " n"], list[int]]:
    """(noise levels, descending; the block that runs at each of them) of the sampler that a config describes.

    Blocks whose answers are joined are each asked once, at the top of their own range.
    """
    corruption = gaussian(config)
    if config.answer == "joined":
        return corruption.edges[:-1], list(range(config.num_blocks))
    sigmas = corruption.levels(num_inference_steps(config), config.sampler_spacing)
    return sigmas, corruption.owners(sigmas)


def make_classifier(config: ConfigDict, blueprint: Blueprint, card: Card) -> Classifier:
    """Build the classifier that a config describes. It compiles once for all blocks and steps.

    An image's starting noise depends on the seed and its position in the split alone, not on the batch around it.
    """
    if config.model_type == "vit":

        @jax.jit
        def classify_plain(params, images, positions):
            del positions
            (model,) = blueprint.together((params["model"],))
            return model(normalize(images, card.mean, card.std))[None]

        return classify_plain

    plan_of_config = sampler_plan(config)
    sigma_max = plan_of_config[0][0]  # where every plan begins

    @jax.jit
    def start(images, positions):
        keys = jax.vmap(partial(stream, config.seed, "sampler"))(positions)
        unit_noise = jax.vmap(lambda key: jax.random.normal(key, (config.hidden_size,)))(keys)
        return normalize(images, card.mean, card.std), initial_z(unit_noise, sigma_max, config.init_noise_scale)

    @jax.jit
    def step(shared, block, images, z, sigma, sigma_next, labels_next):
        common, of_block = blueprint.together((shared, block))
        return denoise_step(
            common, of_block, images, z, sigma, sigma_next,
            sigma_data=config.sigma_data, cfg_scale=config.cfg_scale, table=config.label_table, labels_next=labels_next,
        )  # fmt: skip

    def classify(params, images, positions, plan=plan_of_config):
        sigmas, blocks = plan
        images, z = start(images, positions)

        def visit(index: int, z: Array, sigma: np.float32, sigma_next: np.float32):
            if config.idle_blocks != "device" or config.block_parallel:
                jax.block_until_ready(z)  # else blocks that wait elsewhere would pile up on the device
            shared, block = (to_device(params[name]) for name in blueprint.names(blocks[index]))
            name_next = blueprint.names([*blocks, blocks[-1]][index + 1])[0]
            labels_next = None if name_next == "shared" else to_device(params[name_next]["labels"])
            return step(shared, block, images, z, sigma, sigma_next, labels_next)

        if config.answer == "joined":  # z is 0 for every block: none hears what another one guessed
            levels = sigmas.astype(np.float32)
            return join(jnp.stack([visit(index, z, sigma, sigma)[0] for index, sigma in enumerate(levels)]))
        return sample(visit, z, sigmas, range(len(sigmas)))[0]

    return classify


@jax.jit
def summarize(logits: Float[Array, "n b classes"]) -> tuple[Int[Array, "n b"], Float[Array, "b classes"]]:
    """What evaluation keeps of the logits of all steps: the label each step believes, and the last step's logits."""
    return jnp.argmax(logits, axis=-1), logits[-1]

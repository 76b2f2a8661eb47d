"""Classification with a wider z: every patch has a noisy copy of the label's embedding, and a belief of its own.

    python benchmarks/wide_z.py --config=configs/dblock_folder_best.py --config.data_dir=ROOT --workdir=DIR

The network and its sizes are the config's. The label's token is left out; each patch's token has c_in * z of its own
added, with noise of its own, and a patch answers by itself: D = c_skip * z + c_out * F(patch). Trained by the mean of
the patches' losses; the answer is the mean of their log-probabilities. In t copies there is as much to be read as in
one at sigma / sqrt(t): raise `p_mean` by ln(t) / 2 to compare at equal information. z starts at 0, nothing guides, and
no image is left out. Prints the scores.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).parents[1]))

import dblocks_jax
from dblocks_jax.data.augment import normalize
from dblocks_jax.diffusion.loss import cross_entropy
from dblocks_jax.diffusion.precondition import loss_weight, precondition
from dblocks_jax.diffusion.sampler import euler_step
from dblocks_jax.models.dblock_vit import normalize_rows
from dblocks_jax.models.layers import modulate
from dblocks_jax.tasks.classify.classifier import sampler_plan
from dblocks_jax.tasks.classify.task import CLASSIFY, Classify
from dblocks_jax.tasks.task import Losses

CONFIG = config_flags.DEFINE_config_file("config", None, "Config of DiffusionBlocks.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)


def denoise(shared, block, images, z, sigma, sigma_data):
    """Logits of each patch [b, t, classes], from its own z [b, t, d] and all of the image."""
    c = precondition(sigma, sigma_data)
    c_skip, c_out, c_in = (factor[:, None, None] for factor in (c.c_skip, c.c_out, c.c_in))
    cond = shared.noise(c.c_noise)
    tokens = shared.patches(images) + shared.positions[...][:, 1:] + c_in * z
    denoised = c_out * shared.norm(block(tokens, cond, None)) + c_skip * z
    return shared.head(modulate(denoised, *shared.modulation(cond)))


@dataclass(frozen=True)
class WideZ(Classify):
    """`Classify` with a z for each patch."""

    def losses(self, modules, example, level, draws):
        shared, block = modules
        images, labels = example["image"], example["label"]
        y = shared.embed_labels(labels)[:, None]
        shape = (len(labels), shared.positions.shape[1] - 1, self.config.hidden_size)
        z = y + level[:, None, None] * jax.random.normal(draws.noise, shape)
        logits = denoise(shared, block, images, z, level, self.config.sigma_data)
        ce = cross_entropy(logits, jnp.broadcast_to(labels[:, None], logits.shape[:2])).mean(axis=1)
        accuracy = jnp.argmax(jax.nn.log_softmax(logits).mean(axis=1), axis=-1) == labels
        return Losses(ce, loss_weight(level, self.config.sigma_data), {"ce": ce, "accuracy": accuracy})

    def classifier(self, blueprint):
        sigmas, blocks = sampler_plan(self.config)

        @jax.jit
        def step(together, images, z, sigma, sigma_next):
            shared, block = blueprint.together(together)
            logits = denoise(shared, block, images, z, jnp.full(len(images), sigma), self.config.sigma_data)
            moved = euler_step(z, jax.nn.softmax(logits) @ normalize_rows(shared.labels[...]), sigma, sigma_next)
            return jax.nn.log_softmax(logits).mean(axis=1), moved

        def classify(params, images, positions):
            images = normalize(images, self.card.mean, self.card.std)
            count = (self.card.image_shape[0] // self.config.patch_size) ** 2
            z, found = jnp.zeros((len(images), count, self.config.hidden_size)), []
            for i, block in enumerate(blocks):
                together = tuple(params[name] for name in blueprint.names(block))
                logits, z = step(together, images, z, sigmas[i], sigmas[min(i + 1, len(sigmas) - 1)])
                found.append(logits)
            return jnp.stack(found)

        return classify


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]}")
    entry = replace(CLASSIFY, make=WideZ)
    print(json.dumps(dblocks_jax.train(CONFIG.value, WORKDIR.value, own=entry)))


if __name__ == "__main__":
    app.run(main)

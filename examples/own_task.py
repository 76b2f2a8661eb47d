"""A network and a task of one's own: points of two spirals, given their arm. See docs/new_task.md."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

import dblocks_jax
from dblocks_jax import ArrayData, Entry, Gaussian, Losses, NoiseDistribution, Task, loss_weight, precondition, solve

SIGMA_DATA, WIDTH = 0.4, 96  # standard deviation of a coordinate; width of the network


def spirals(count, seed):
    rng = np.random.default_rng(seed)
    radius, arm = np.sqrt(rng.uniform(0.05, 1, count)), rng.integers(2, size=count)
    point = [0.8 * radius * wave(2.5 * np.pi * radius + np.pi * arm) for wave in (np.cos, np.sin)]
    return {"point": np.stack(point, axis=1).astype(np.float32), "arm": arm.astype(np.int32)}


class Block(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(4)])


def denoise(arms, block, z, sigma, arm):  # D = c_skip * z + c_out * F(c_in * z, c_noise, arm)
    c_skip, c_out, c_in, c_noise = (c[:, None] for c in precondition(sigma, SIGMA_DATA))
    hidden = jnp.concatenate([c_in * z, c_noise, arms(arm)], axis=1)
    for layer in block.layers:
        hidden = hidden + layer(nnx.gelu(hidden))
    return c_skip * z + c_out * hidden[:, :2]


class Spirals(Task):
    def __init__(self, config, card):
        self.config = config

    @property
    def corruption(self):  # z = y + sigma * eps
        return Gaussian(NoiseDistribution(sigma_max=5.0), self.config.num_blocks, gamma=0.05)

    def modules(self, key):  # all blocks share the embeddings of the arms
        rngs, numbers = nnx.Rngs(key), range(self.config.num_blocks)
        return {"shared": nnx.Embed(2, WIDTH - 3, rngs=rngs)} | {f"block_{number}": Block(rngs) for number in numbers}

    def losses(self, modules, example, level, draws):
        z = example["point"] + level[:, None] * jax.random.normal(draws.noise, example["point"].shape)
        errors = (denoise(*modules, z, level, example["arm"]) - example["point"]) ** 2
        return Losses(errors.mean(axis=1), loss_weight(level, SIGMA_DATA), watched={})


DATA = ArrayData("two spirals", {"train": spirals(4096, seed=0), "test": spirals(1000, seed=1)})
SPIRALS = Entry("spirals", find_data=lambda config: DATA, make=Spirals)


def main(workdir, **fields):
    config = dblocks_jax.default_config()
    config.update({"task": "spirals", "num_blocks": 2, "num_layers": 8, "num_epochs": 60, "lr": 3e-3} | fields)
    dblocks_jax.train(config, workdir, own=SPIRALS)
    run = dblocks_jax.load_trained(workdir, own=SPIRALS)
    noise, arm = run.task.corruption, np.arange(1000) % 2
    levels = noise.levels(40, "karras")
    z, at = levels[0] * jax.random.normal(jax.random.key(0), (1000, 2)), noise.owners(levels)
    *_, (points, _) = solve(lambda b, z, s: denoise(*run.together(b), z, jnp.full(1000, s), arm), z, levels, at, "heun")
    figure = Figure(figsize=(9, 4.5))
    figure.add_subplot(121, aspect="equal", xlim=(-1, 1), ylim=(-1, 1)).scatter(*points.T, s=3, c=arm)
    ranges = figure.add_subplot(122, xscale="log", xlabel="sigma", ylabel="block", yticks=range(noise.num_blocks))
    ranges.hlines(range(noise.num_blocks), noise.edges[1:], noise.edges[:-1], linewidth=9)
    figure.savefig(f"{workdir}/spirals.png")
    return run, points


if __name__ == "__main__":
    main("checkpoints/own_task")

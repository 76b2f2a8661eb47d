"""Time a step of one block of a DiT against plain PyTorch's DiT of the same work, and against ours of that depth.

  python benchmarks/dit_against_torch.py [--repeats=N] [--batch=N] [--layers=4] [--blocks=3] [--samples=N]

The peer is eager PyTorch on the same processor or GPU: the layers of one block as a network of their own, EDM loss,
AdamW, gradients clipped to norm 1. Also the time of sampling, 50 levels: B blocks against all layers as one, in one
run. They take turns, so that a slow minute of the machine hits all alike; on a GPU a turn is 20 steps, started before
any is waited for. Install PyTorch with `uv sync --extra benchmark`.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # ours and the peer share a GPU
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from against_torch import choose_device  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

from configs import dit_cifar10
from dblocks_jax.data.datasets import Card
from dblocks_jax.data.feed import Streamed
from dblocks_jax.run.devices import make_mesh, replicate, shard
from dblocks_jax.tasks.generate.sampler import make_sampler
from dblocks_jax.tasks.generate.task import Generate
from dblocks_jax.training.loop import make_step
from dblocks_jax.training.optimizer import new_part
from dblocks_jax.training.setting import new_model
from dblocks_jax.training.step import Steps

SIZE, CLASSES, SIGMA_DATA = 32, 10, 0.5
A_TURN = 20 if jax.default_backend() == "gpu" else 1  # steps that are started before waiting
CARD = Card(tuple(map(str, range(CLASSES))), (SIZE, SIZE, 3), (0.5,) * 3, (0.5,) * 3)


class Layer(nn.Module):
    """adaLN-Zero attention and MLP."""

    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm_2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, cond):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(cond)[:, None].chunk(6, dim=-1)
        b, t, d = x.shape
        q, k, v = (
            self.qkv(self.norm_1(x) * (1 + scale_a) + shift_a).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d)
        x = x + gate_a * self.out(attended)
        return x + gate_m * self.mlp(self.norm_2(x) * (1 + scale_m) + shift_m)


class Peer(nn.Module):
    """A plain DiT of a few layers."""

    def __init__(self, config: Any, layers: int):
        super().__init__()
        width, self.patch = config.hidden_size, config.patch_size
        pixels = 3 * self.patch**2
        self.embed = nn.Linear(pixels, width)
        self.noise = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = nn.Embedding(CLASSES + 1, width)
        self.layers = nn.ModuleList(
            Layer(width, config.num_heads, config.intermediate_size) for _ in range(layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, pixels)
        self.register_buffer("frequencies", torch.exp(-math.log(10_000) * torch.arange(128) / 128))
        self.register_buffer("positions", torch.randn(1, (SIZE // self.patch) ** 2, width) * 0.02)

    def forward(self, z, c_noise, labels):
        b, side, p = z.shape[0], SIZE // self.patch, self.patch
        patches = z.reshape(b, 3, side, p, side, p).permute(0, 2, 4, 3, 5, 1).reshape(b, side * side, -1)
        x = self.embed(patches) + self.positions
        angles = c_noise[:, None] * self.frequencies
        cond = self.noise(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.labels(labels)
        for layer in self.layers:
            x = layer(x, cond)
        shift, scale = self.modulation(cond)[:, None].chunk(2, dim=-1)
        out = self.head(self.norm(x) * (1 + scale) + shift)
        return out.reshape(b, side, side, p, p, 3).permute(0, 5, 1, 3, 2, 4).reshape(b, 3, SIZE, SIZE)


def peer_step(config: Any, layers: int) -> Callable[[], None]:
    """Training steps of the peer, to their end."""
    torch.manual_seed(0)
    model = Peer(config, layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    images = torch.rand(config.batch_size, 3, SIZE, SIZE) * 2 - 1
    labels = torch.randint(0, CLASSES, (config.batch_size,))

    def step() -> None:
        sigma = torch.exp(torch.randn(config.batch_size) * 1.2 - 1.2)[:, None, None, None]
        z = images + sigma * torch.randn_like(images)
        total = sigma**2 + SIGMA_DATA**2
        raw = model(z / total.sqrt(), sigma.flatten().log() / 4, labels)
        denoised = SIGMA_DATA**2 / total * z + sigma * SIGMA_DATA / total.sqrt() * raw
        loss = (total / (sigma * SIGMA_DATA) ** 2 * (denoised - images) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return lambda: take_turn(step)


def take_turn(step: Callable[[], None]) -> None:
    """PyTorch's steps of a turn, to their end."""
    for _ in range(A_TURN):
        step()
    if jax.default_backend() == "gpu":
        torch.cuda.synchronize()


def our_step(config: Any) -> Callable[[], None]:
    """Training steps of block 0 of ours, to their end."""
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (config.batch_size, *CARD.image_shape), np.uint8),
        "label": rng.integers(0, CLASSES, config.batch_size, np.int32),
    }
    return step_of_task(Generate(config, CARD), batch)


def step_of_task(task: Any, batch: Any) -> Callable[[], None]:
    """Training steps of a task's block 0 on a batch, to their end."""
    blueprint, params = new_model(task, 0)
    mesh = make_mesh()
    parts = replicate(jax.device_get({name: new_part(part) for name, part in params.items()}), mesh)
    state = {"active": tuple(parts[name] for name in blueprint.names(0)), "position": 0}
    step = make_step(task.config, task, blueprint, mesh)
    batch = shard(batch, mesh)

    def run() -> None:
        for _ in range(A_TURN):
            position, lr = np.int32(state["position"]), np.full(1, 1e-4, np.float32)
            steps = Steps(np.int32(1), np.int32(0), position, lr, task.corruption.shares[0])
            state["active"], _ = step(state["active"], Streamed(batch), steps)
            state["position"] += 1
        jax.block_until_ready(state["active"])

    return run


def our_sampling(config: Any, count: int) -> Callable[[], None]:
    """Sampling `count` images by 50 levels, without guidance."""
    task = Generate(config, CARD)
    blueprint, params = new_model(task, 0)
    sampler, places = make_sampler(config, blueprint, CARD), np.arange(count, dtype=np.int32)

    def run() -> None:
        *_, (_, z) = sampler(params, places, places % CLASSES, 1.0)
        jax.block_until_ready(z)

    return run


def ratios(works: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each, in turns, the first turn not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if turn:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4, help="of one block")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8)
    args = parser.parse_args()
    torch.set_default_device(choose_device())
    config = dit_cifar10.get_config()
    config.batch_size, config.num_blocks, config.num_layers = args.batch, args.blocks, args.layers * args.blocks
    short, plain = config.copy_and_resolve_references(), config.copy_and_resolve_references()
    short.num_blocks, short.num_layers, plain.num_blocks = 1, args.layers, 1
    steps = ratios(
        {"block": our_step(config), "short-long": our_step(short), "PyTorch": peer_step(config, args.layers)},
        args.repeats,
    )  # fmt: skip
    sampling = ratios({"blocks": our_sampling(config, args.samples), "plain": our_sampling(plain, args.samples)}, 3)
    result = {
        "step_against_torch": steps["block"] / steps["PyTorch"],
        "step_against_short": steps["block"] / steps["short-long"],
        "sampling_against_plain": sampling["blocks"] / sampling["plain"],
        "ms_of_a_step": {name: round(1e3 * value / A_TURN, 2) for name, value in steps.items()},
        "seconds_of_sampling": {name: round(value, 4) for name, value in sampling.items()},
        "device": jax.devices()[0].device_kind,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "jax": jax.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Time a step of one block of text against plain PyTorch's of the same work, and against ours of that depth.

  python benchmarks/text_against_torch.py [--repeats=N] [--batch=N] [--length=N] [--width=N] [--layers=2] [--blocks=3]

"mask": a bidirectional block. "next_token": a block that denoises each token given the clean ones before it; the peer
runs [noisy; clean] through the layers under one mask, as the paper writes it. Eager PyTorch on the same processor
or GPU: the layers of one block as a network of their own, AdamW, gradients clipped to norm 1. All take turns, as in
`dit_against_torch.py`, so that a slow minute of the machine hits all alike. Install PyTorch with
`uv sync --extra benchmark`.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from dit_against_torch import (  # pyright: ignore[reportMissingImports]
    A_TURN,
    choose_device,
    ratios,
    step_of_task,
    take_turn,
)
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

from configs import mask_text, next_text
from dblocks_jax.data.vocabulary import letters
from dblocks_jax.tasks.table import entry_of
from dblocks_jax.tasks.text import TextCard

SYMBOLS, SIGMA_DATA = 27, 0.5


def rotate(x: Any, cos: Any, sin: Any) -> Any:
    """Turn pairs of features, a half apart, by position."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Layer(nn.Module):
    """adaLN-Zero attention and MLP with rotary positions: GELU and LayerNorm, or SwiGLU and RMSNorm."""

    def __init__(self, width: int, heads: int, inner: int, cond: int, *, is_llama: bool):
        super().__init__()
        self.heads, self.is_llama = heads, is_llama
        norm = nn.RMSNorm if is_llama else nn.LayerNorm
        self.norm_1, self.norm_2 = (norm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=not is_llama)
        self.out = nn.Linear(width, width, bias=not is_llama)
        self.up = nn.Linear(width, 2 * inner if is_llama else inner, bias=not is_llama)
        self.down = nn.Linear(inner, width, bias=not is_llama)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond, 6 * width))

    def forward(self, x, six, cos, sin, mask):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = six
        b, t, d = x.shape
        qkv = self.qkv(self.norm_1(x) * (1 + scale_a) + shift_a).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (rotate(each, cos, sin) for each in qkv[:2])
        attended = functional.scaled_dot_product_attention(q, k, qkv[2], attn_mask=mask)
        x = x + gate_a * self.out(attended.transpose(1, 2).reshape(b, t, d))
        hidden = self.up(self.norm_2(x) * (1 + scale_m) + shift_m)
        if self.is_llama:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = functional.silu(gate) * hidden
        else:
            hidden = functional.gelu(hidden, approximate="tanh")
        return x + gate_m * self.down(hidden)


class Peer(nn.Module):
    """The layers of one block with embeddings and head, of masked text or of next tokens."""

    def __init__(self, config: Any, layers: int):
        super().__init__()
        self.is_llama = config.task == "next_token"
        width, cond = config.hidden_size, config.hidden_size if self.is_llama else 128
        self.tokens = nn.Embedding(SYMBOLS + 1, width)
        self.noise = nn.Sequential(nn.Linear(256, cond), nn.SiLU(), nn.Linear(cond, cond))
        self.layers = nn.ModuleList(
            Layer(width, config.num_heads, config.intermediate_size, cond, is_llama=self.is_llama)
            for _ in range(layers)
        )
        norm = nn.RMSNorm if self.is_llama else nn.LayerNorm
        self.norm = norm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond, 2 * width))
        self.head = nn.Linear(width, SYMBOLS, bias=not self.is_llama)
        length, half = config.text_length, width // config.num_heads // 2
        angles = torch.arange(length)[:, None] * 10_000 ** (-torch.arange(half) / half)
        angles = torch.cat([angles, angles], dim=-1)
        if self.is_llama:
            angles = torch.cat([angles, angles])
            before = torch.ones(length, length, dtype=torch.bool).tril()
            noisy = torch.cat([torch.eye(length, dtype=torch.bool), before.tril(-1)], dim=1)
            self.register_buffer("mask", torch.cat([noisy, torch.cat([torch.zeros_like(before), before], dim=1)]))
        else:
            self.mask = None
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.register_buffer("frequencies", torch.exp(-math.log(10_000) * torch.arange(128) / 128))

    def condition(self, level):
        angles = level[:, None] * self.frequencies
        return self.noise(torch.cat([angles.cos(), angles.sin()], dim=-1))

    def run(self, x, cond, cond_clean=None):
        """Logits; with `cond_clean` the second half of the tokens is clean, and has it."""
        for layer in self.layers:
            six = layer.modulation(cond)[:, None].chunk(6, dim=-1)
            if cond_clean is not None:
                length = x.shape[1] // 2
                clean = layer.modulation(cond_clean)[:, None].chunk(6, dim=-1)
                six = [
                    torch.cat([a.expand(-1, length, -1), b.expand(len(x), length, -1)], 1)
                    for a, b in zip(six, clean, strict=True)
                ]
            x = layer(x, six, self.cos, self.sin, self.mask)
        if cond_clean is not None:
            x = x[:, : x.shape[1] // 2]
        shift, scale = self.modulation(cond)[:, None].chunk(2, dim=-1)
        return self.head(self.norm(x) * (1 + scale) + shift)


def peer_step(config: Any, layers: int) -> Callable[[], None]:
    """Training steps of the peer, to their end."""
    torch.manual_seed(0)
    model = Peer(config, layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    shape = (config.batch_size, config.text_length)
    tokens = torch.randint(0, SYMBOLS, shape)

    def masked_loss():
        level = torch.rand(len(tokens)) / 3 + 2 / 3
        is_hidden = torch.rand(shape) < level[:, None]
        logits = model.run(model.tokens(tokens.masked_fill(is_hidden, SYMBOLS)), model.condition(1000 * level))
        ce = functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").reshape(shape)
        return ((ce * is_hidden).mean(dim=1) / level).mean()

    def denoising_loss():
        sigma = torch.exp(torch.randn(len(tokens)) * 1.2 - 1.2)
        clean = functional.normalize(model.tokens.weight, dim=-1)[tokens]
        z = clean + sigma[:, None, None] * torch.randn_like(clean)
        z_in = z / (sigma**2 + SIGMA_DATA**2).sqrt()[:, None, None]
        cond_clean = model.condition(torch.full((1,), math.log(0.002) / 4))
        logits = model.run(torch.cat([z_in, clean], dim=1), model.condition(sigma.log() / 4), cond_clean)
        return functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    def step() -> None:
        loss = denoising_loss() if config.task == "next_token" else masked_loss()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return lambda: take_turn(step)


def our_step(config: Any) -> Callable[[], None]:
    """Training steps of block 0 of ours, to their end."""
    task: Any = entry_of(config).make(config, TextCard(letters(), config.text_length))
    rng = np.random.default_rng(0)
    shapes = task.batch_shapes(config.batch_size)
    return step_of_task(
        task, {name: rng.integers(0, SYMBOLS, each.shape).astype(each.dtype) for name, each in shapes.items()}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2, help="of one block")
    parser.add_argument("--blocks", type=int, default=3)
    args = parser.parse_args()
    torch.set_default_device(choose_device())
    for module in (mask_text, next_text):
        config = module.get_config()
        config.update(
            batch_size=args.batch, text_length=args.length, hidden_size=args.width, num_heads=args.width // 64,
            intermediate_size=args.width * (8 if config.task == "next_token" else 12) // 3, num_blocks=args.blocks,
            num_layers=args.layers * args.blocks, ema_decay=0.0, grow_at=(), steps_per_call=1,
        )  # fmt: skip
        short = config.copy_and_resolve_references()
        short.num_blocks, short.num_layers = 1, args.layers
        works = {"block": our_step(config), "short-long": our_step(short), "PyTorch": peer_step(config, args.layers)}
        seconds = ratios(works, args.repeats)
        result = {
            "task": config.task,
            "step_against_torch": seconds["block"] / seconds["PyTorch"],
            "step_against_short": seconds["block"] / seconds["short-long"],
            "ms_of_a_step": {name: round(1e3 * value / A_TURN, 2) for name, value in seconds.items()},
            "device": jax.devices()[0].device_kind,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "jax": jax.__version__,
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

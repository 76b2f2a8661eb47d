"""Time a token that is written with a cache: by the plain decoder, and by its blocks, in one run.

  python benchmarks/writing.py [--repeats=N] [--batch=N] [--length=N] [--width=N] [--layers=6] [--blocks=3]

Blocks go through all layers twice for each token: once from noise to none, once to read what was chosen.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from configs import next_text
from dblocks_jax.data.vocabulary import letters
from dblocks_jax.tasks.next_token.config import plain
from dblocks_jax.tasks.next_token.generation import make_writer
from dblocks_jax.tasks.next_token.task import NextToken
from dblocks_jax.tasks.text import TextCard
from dblocks_jax.training.setting import new_model

PROMPT = 8  # tokens


def seconds_of_tokens(config: Any, count: int) -> Iterator[float]:
    """Seconds a token, again and again: `count` tokens after a prompt, the first of which is not counted."""
    blueprint, params = new_model(NextToken(config, TextCard(letters(), config.text_length)), 0)
    write = make_writer(config, blueprint)
    prompt = jnp.ones((config.batch_size, PROMPT), jnp.int32)
    while True:
        tokens = write(params, prompt, count, jnp.arange(config.batch_size))
        jax.block_until_ready(next(tokens))
        began = time.perf_counter()
        jax.block_until_ready(list(tokens))
        yield (time.perf_counter() - began) / (count - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--blocks", type=int, default=3)
    args = parser.parse_args()
    config = next_text.get_config()
    config.update(
        batch_size=args.batch, text_length=args.length, hidden_size=args.width, num_heads=args.width // 64,
        intermediate_size=args.width * 8 // 3, num_layers=args.layers, num_blocks=args.blocks,
    )  # fmt: skip
    clocks = {
        name: seconds_of_tokens(each, args.length - PROMPT)
        for name, each in {"plain": plain(config), "blocks": config}.items()
    }
    times: dict[str, list[float]] = {name: [] for name in clocks}
    for turn in range(args.repeats + 1):
        for name, clock in clocks.items():
            seconds = next(clock)
            if turn:  # the first compiles
                times[name].append(seconds)
    medians = {name: statistics.median(each) for name, each in times.items()}
    result = {
        "blocks_over_plain": medians["blocks"] / medians["plain"],
        "tokens_per_second": {name: round(args.batch / each, 1) for name, each in medians.items()},
        "layers_per_token": {"plain": args.layers, "blocks": 2 * args.layers},
        "jax": jax.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

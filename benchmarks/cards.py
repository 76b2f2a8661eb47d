"""What a step of the paper's models needs on cards that are not here, by the number of blocks: the compiler's estimate.

    python benchmarks/cards.py --targets=h100,v5e --models=vit-b16,dit-l2 --blocks=2,3,4,6,12 [--remat]

Prints a line for each program as it is compiled (half a minute each on one core), then a table for each target: MiB as
in `--mode=memory --target`, idle blocks on the host, and the share of the plain network's.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from absl import app, flags
from ml_collections import ConfigDict

from dblocks_jax.run.targets import check_compilers, devices_of, parse_targets, prepare_environment

VIT_B = {"hidden_size": 768, "num_heads": 12, "intermediate_size": 3072}
VIT_L = {"num_layers": 24, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096}
IMAGES = {"dataset": "tiny_imagenet", "image_size": 224, "patch_size": 16, "batch_size": 32}
TEXT = {"text_length": 256, "num_layers": 12, "hidden_size": 768, "num_heads": 12, "batch_size": 32}
# name -> (config, what is set in it)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "cifar": ("dblock_cifar100", {}),
    "vit-b16": ("dblock_cifar100", IMAGES | VIT_B),
    "vit-l16": ("dblock_cifar100", IMAGES | VIT_L),
    "dit-l2": ("dit_latents", {"batch_size": 32}),
    "mask": ("mask_text8", TEXT | {"intermediate_size": 3072}),
    "next": ("next_text", TEXT | {"dataset": "text8", "intermediate_size": 2048, "grow_at": (), "max_steps": 0}),
}
TARGETS = flags.DEFINE_string("targets", "h100", "Cards, with commas between.")
NAMES = flags.DEFINE_list("models", list(MODELS), f"Of {', '.join(MODELS)}.")
BLOCKS = flags.DEFINE_list("blocks", ["2", "3", "4", "6", "12"], "Numbers of blocks.")
REMAT = flags.DEFINE_bool("remat", False, "The same with gradient checkpointing.")
MIB = 2**20


def get_config(name: str) -> ConfigDict:
    """The DiffusionBlocks of a model."""
    import importlib

    module, fields = MODELS[name]
    config = importlib.import_module(f"configs.{module}").get_config()
    config.update(fields)
    config.update(idle_blocks="host", block_schedule="chunked")
    return config


def card_of(config: ConfigDict) -> Any:
    """What a model must know of its data; of latents, which are a user's own, as ImageNet's at 256 pixels are."""
    from dblocks_jax.data.datasets import Card
    from dblocks_jax.tasks.table import entry_of

    if config.dataset == "latents":
        return Card(tuple(map(str, range(1000))), (32, 32, 4), (0.0,) * 4, (1.0,) * 4)
    return entry_of(config).card_without_data(config)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]}")
    prepare_environment()
    targets = parse_targets(TARGETS.value)
    check_compilers(targets)
    from dblocks_jax.modes.absent import Estimate, estimate
    from dblocks_jax.modes.program import variant
    from dblocks_jax.tasks.table import entry_of

    for target in targets:
        devices, table = devices_of(target), []
        for name in NAMES.value:
            config = get_config(name)
            entry = entry_of(config)
            card = card_of(config)
            of_plain = None
            for count in (0, *map(int, BLOCKS.value)):
                each = variant(entry, config, plain=not count, remat=REMAT.value, num_blocks=count or None)
                found = estimate(entry, each, card, devices)
                what = {"target": target.name, "model": name, "blocks": count, "remat": REMAT.value}
                if not isinstance(found, Estimate):
                    print(json.dumps(what | {"refused": found}), flush=True)
                    continue
                of_plain = found.total if not count else of_plain
                seconds = found.at_least(target, each)
                row = what | {
                    "total": round(found.total / MIB, 1),
                    "peak": round(found.peak / MIB, 1),
                    "arguments": round(found.arguments / MIB, 1),
                    "program": round(found.program / MIB, 1),
                    "of_plain": round(found.total / of_plain, 3) if of_plain else None,
                    "gflop": found.operations and round(found.operations / 1e9, 1),
                    "gb": found.moved and round(found.moved / 1e9, 2),
                    "ms_at_least": seconds and round(1e3 * seconds, 2),
                }
                print(json.dumps(row), flush=True)
                table.append(row)
        columns = ("total", "of_plain", "peak", "arguments", "gflop", "gb", "ms_at_least")
        print(f"| {target.name} | B | {' | '.join(columns)} |")
        for row in table:
            cells = " | ".join(str(row[column]) for column in columns)
            print(f"| {row['model']}{' + remat' if row['remat'] else ''} | {row['blocks'] or 'plain'} | {cells} |")


if __name__ == "__main__":
    app.run(main)

"""The arms of every comparison, same seeds, same data, equal arithmetic: plain, short, short-long, blocks, grown.

    python benchmarks/arms.py --config=configs/dit_digits.py --out=DIR --seeds=0,1,2 --epochs=30,100,300
    python benchmarks/arms.py --config=configs/mask_text.py --out=DIR --seeds=0,1,2 --steps=300,900

With L layers in B blocks and N epochs: "plain" trains L layers for N epochs; "short" L / B layers for N; "short-long"
L / B layers for B * N, the memory and arithmetic of DiffusionBlocks; "blocks" are DiffusionBlocks, N epochs a block;
"grown" are one block for the first half of those steps, then copied into all. Runs that are finished are not repeated,
those that were interrupted go on. A table of the test split's scores comes last, mean and deviation over seeds; what
generates is scored by its samples too, unless the config asks for none.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

sys.path.insert(0, str(Path(__file__).parents[1]))

from dblocks_jax.modes.train import train
from dblocks_jax.run.files import write_whole
from dblocks_jax.run.workdir import CONFIG, read_saved
from dblocks_jax.tasks.table import entry_of
from dblocks_jax.tasks.task import Entry

MANY = 10_000  # epochs, of which the steps that are asked for are the first
RESULT = "arm.json"  # train.json is there before samples are scored
ARMS = ("plain", "short", "short-long", "blocks", "grown")
CONFIG_FILE = config_flags.DEFINE_config_file("config", None, "Config of DiffusionBlocks, which the arms are made of.")
OUT = flags.DEFINE_string("out", None, "Folder of the runs.", required=True)
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")
EPOCHS = flags.DEFINE_list("epochs", [], "Values of N; by default the config's.")
STEPS = flags.DEFINE_list("steps", [], "Values of N in steps, not epochs: where an epoch is too long.")
CHOSEN = flags.DEFINE_list("arms", list(ARMS), "Which arms.")
SCORE = flags.DEFINE_list("scores", [], "Names of figures in the table; by default the main score.")


def arm(entry: Entry, config: ConfigDict, name: str) -> ConfigDict:
    """The config of one arm."""
    if name in ("blocks", "grown"):
        other = ConfigDict(config.to_dict())
        other.grow_at = (0.5,) if name == "grown" else ()
        return other
    other = entry.plain(config)
    if name != "plain":
        other.num_layers = config.num_layers // config.num_blocks
    if name == "short-long":
        other.num_epochs = config.num_epochs * config.num_blocks
    if config.max_steps and name in ("plain", "short"):
        other.max_steps = config.max_steps // config.num_blocks
    return other


def settings(config: ConfigDict) -> list[tuple[str, ConfigDict]]:
    """(N in words, the config of DiffusionBlocks for so long) for each N that is asked for."""
    if STEPS.value:
        return [
            (f"{n}steps", _with(config, max_steps=n * config.num_blocks, num_epochs=MANY))
            for n in map(int, STEPS.value)
        ]
    max_steps = 0 if EPOCHS.value else config.max_steps
    epochs = map(int, EPOCHS.value or [config.num_epochs])
    return [(str(n), _with(config, num_epochs=n, max_steps=max_steps)) for n in epochs]


def _with(config: ConfigDict, **fields: int) -> ConfigDict:
    return ConfigDict({**config.to_dict(), **fields})


def run(config: ConfigDict, folder: Path) -> dict[str, Any]:
    """The result of a run, which is trained and scored if it is not there."""
    result = read_saved(folder, RESULT)
    if result is None:
        config.save_every_n_epochs = config.num_epochs * config.num_blocks  # once, at the end
        result = train(config, folder)
        write_whole(folder / RESULT, json.dumps(result))
    assert read_saved(folder, CONFIG) is not None
    return result


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]}")
    config = CONFIG_FILE.value
    entry = entry_of(config)
    names = SCORE.value or [entry.main_score.name]
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for epochs, of_length in settings(config):
        for seed in map(int, SEEDS.value):
            for name in CHOSEN.value:
                base = _with(of_length, seed=seed)
                result = run(arm(entry, base, name), Path(OUT.value) / f"{name}_N{epochs}_seed{seed}")
                rows.setdefault((epochs, name), []).append(result)
                print(json.dumps({"arm": name, "epochs": epochs, "seed": seed} | {key: result[key] for key in names}))
                sys.stdout.flush()
    print(f"| N | arm | {' | '.join(names)} | seeds |")
    for (epochs, name), results in rows.items():
        cells = []
        for key in names:
            values = [result[key] for result in results]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{spread}")
        print(f"| {epochs} | {name} | {' | '.join(cells)} | {len(results)} |")


if __name__ == "__main__":
    app.run(main)

"""`--mode=inspect`: what a config describes, before anything is trained: modules, the share of each block, data."""

import shutil
from pathlib import Path
from typing import Any

from flax import nnx
from ml_collections import ConfigDict

from dblocks_jax.pages.template import write_page
from dblocks_jax.run.devices import on_cpu
from dblocks_jax.tasks.shown import SHOWN
from dblocks_jax.tasks.table import entry_of
from dblocks_jax.training.config import arithmetic, check_config, count_steps
from dblocks_jax.training.overview import describe_shares, num_parameters
from dblocks_jax.training.setting import new_model

PAGE = "inspect.html"
DEPTH = 4  # of the module table: down to the parts of a layer
NARROWEST = 150  # characters of the module table, which a narrower terminal would cut


def inspect(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Print the modules of a step and the blocks' shares, and write PAGE, with some of the data, into `workdir`.

    Raises:
      UserError: the config is wrong, its data cannot be had, or the page cannot be written.
    """
    entry = entry_of(config)
    check_config(entry, config)
    data: Any = entry.find_data(config)
    task, shown = entry.make(config, entry.card(data.to_dict())), SHOWN[entry.name]
    with on_cpu(), arithmetic(config):
        blueprint, params = new_model(task, config.seed)
        together = blueprint.together([params[name] for name in blueprint.names(0)])
        table = tabulate(*shown.step_of(task, together))
    parameters = {name: num_parameters(part) for name, part in params.items()}
    length = count_steps(entry, config, len(data.split("train")))
    of_data = shown.data_shown(task, data)
    print(table)
    for name, count in parameters.items():
        print(f"{name}: {count:,} parameters")
    for block, text in describe_shares(task).items():
        print(f"block {block}: {text}")
    for name, counts in of_data.splits.items():
        print(f"{name}: {', '.join(f'{count:,} {what}' for what, count in counts.items())}")
    page = {
        "name": f"{config.dataset}, {entry.describe(config)}",
        "data": of_data,
        "table": table,
        "parameters": parameters,
        "shares": describe_shares(task),
        "about_levels": shown.ABOUT_LEVELS,
        "one_example": shown.ONE_EXAMPLE,
        "charts": shown.draw_levels(task),
        "length": length,
    }
    path = write_page(workdir / PAGE, page)
    return {
        "mode": "inspect",
        "page": str(path),
        "parameters": parameters,
        **of_data.result,
        "steps": length.steps,
    }


def tabulate(module: nnx.Module, inputs: tuple[Any, ...]) -> str:
    """The modules that one step runs, for one example: shapes, parameters, FLOPs. All blocks are alike."""
    width = max(NARROWEST, shutil.get_terminal_size().columns)
    options: Any = {"depth": DEPTH, "compute_flops": True, "console_kwargs": {"width": width, "force_terminal": False}}
    return nnx.tabulate(module, *inputs, **options)

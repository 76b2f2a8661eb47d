"""One screen about a run before it starts: devices, data, model, memory, length, place."""

from typing import Any

import jax

from dblocks_jax.run.devices import BLOCK, DATA
from dblocks_jax.run.logs import TENSORBOARD
from dblocks_jax.tasks.task import Task
from dblocks_jax.training.setting import Setting, shapes_of

MIB = 2**20


def overview(setting: Setting, start: int) -> str:
    """The screen as text, for a run that goes on after `start` steps."""
    config, length, mesh = setting.config, setting.length, setting.mesh
    device = jax.devices()[0]
    across = f", mesh: {mesh.shape[DATA]} for data, {mesh.shape[BLOCK]} for blocks"
    splits = {"training": "train", "validation": "val", "test": "test"}
    found = {words: setting.data.split(split) for words, split in splits.items()}
    counted = ", ".join(f"{len(source):,} {words}" for words, source in found.items() if source is not None)
    task = setting.entry.make(config, setting.entry.card(setting.card))
    blueprint, shapes = shapes_of(task)
    counts = {name: num_parameters(part) for name, part in shapes.items()}
    each = "" if len(counts) == 1 else ": " + ", ".join(f"{name} {count:,}" for name, count in counts.items())
    mine = sum(counts[name] for name in blueprint.names(setting.blocks[0]))
    copies = 4 + (config.ema_decay > 0)  # parameters, two moments, gradients, averages
    divided = ", ".join(f"{stage.config.num_blocks} until step {stage.end:,}" for stage in setting.stages)
    rows = {
        "run": f"{setting.workdir}, " + (f"goes on at step {start:,}" if start else "from the start"),
        "devices": f"{jax.device_count()} x {device.device_kind}{across}, {jax.process_count()} process(es)",
        "data": f"{setting.data.name}: {counted}: {setting.data.describe()}",
        "model": f"{setting.entry.describe(config)}, {config.num_layers} layers, {sum(counts.values()):,} "
        f"parameters{each}",
        "shares": ", ".join(f"block {block}: {text}" for block, text in describe_shares(task).items()),
        "blocks": divided if len(setting.stages) > 1 else "",
        "a step": f"trains {mine:,} of them: {4 * copies * mine / MIB:,.1f} MiB of parameters, moments and gradients; "
        "activations come on top, --mode=memory tells",
        "length": f"{length.steps - start:,} steps to do of {length.steps:,}, {length.steps_per_epoch:,} an epoch, "
        f"{config.batch_size * config.accumulate_grad_batches} examples a step",
        "watch": f"tensorboard --logdir={setting.workdir / TENSORBOARD}",
    }
    return "\n".join(f"  {name:8s} {text}" for name, text in rows.items() if text)  # a plain model has no shares


def describe_shares(task: Task) -> dict[int, str]:
    """Each block's share of the corruption in words; none for the plain model."""
    corruption = task.corruption
    return {} if corruption is None else {block: corruption.describe(block) for block in range(corruption.num_blocks)}


def num_parameters(tree: Any) -> int:
    """How many numbers a tree of arrays holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))

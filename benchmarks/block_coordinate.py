"""Block-coordinate AdamW on the plain network (BAdam; Luo, Yu, Li, 2024): a rival with one block's optimizer state.

The layers are cut as DiffusionBlocks cut them. One block's layers are trained for `switch` steps by the whole network's
loss, with fresh moments, then another's, in a random order that has each once; the embeddings belong to the first
block, the last norm and the head to the last. The model is the plain one, and so is inference. A step holds the
gradients and moments of one block, but all parameters, and the activations of all layers down to the block.

    uv run benchmarks/block_coordinate.py --config=configs/vit_digits.py --config.num_blocks=3 [--switch=100] [--memory]

Of a plain step's arithmetic (forward, gradients of activations, gradients of weights: one each) a step here takes
1 + (B + 1) / 2B + 1 / B, 2/3 of the whole at B = 3: at equal arithmetic it makes 1.5 times the epochs.
"""

import json
import random
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import config_flags

from dblocks_jax.data.feed import make_feed
from dblocks_jax.modes.program import total_bytes
from dblocks_jax.run.devices import make_mesh
from dblocks_jax.run.streams import stream
from dblocks_jax.tasks.classify.scores import answers, metrics
from dblocks_jax.tasks.classify.task import CLASSIFY
from dblocks_jax.tasks.images import find_dataset
from dblocks_jax.training.config import arithmetic, check_config, count_steps, schedule
from dblocks_jax.training.optimizer import Part, adamw, new_part
from dblocks_jax.training.setting import new_model
from dblocks_jax.training.step import block_loss

CONFIG = config_flags.DEFINE_config_file("config", default="configs/vit_digits.py")
SWITCH = flags.DEFINE_integer("switch", 100, "Steps of a block before another's turn.", lower_bound=1)
MEMORY = flags.DEFINE_bool("memory", False, "Only say what a step of each block needs, in MiB by XLA's account.")


def block_of(path: tuple[Any, ...], num_layers: int, num_blocks: int) -> int:
    """The block that trains the parameter at this path of a plain ViT."""
    if path[0] == "trunk":
        return int(path[2]) * num_blocks // num_layers
    return num_blocks - 1 if path[0] in ("norm", "head") else 0


def make_step(config: Any, task: Any, blueprint: Any) -> Any:
    """Build (part of the active block, all other parameters, data, number of steps, position, lr) -> part."""

    def loss_of(active, others, batch, key):
        key_prepare, key_loss = jax.random.split(key)
        params = unflatten_dict({**active, **others})
        return block_loss(task, blueprint, (params,), task.prepare(key_prepare, batch), key_loss, None)[0]

    @partial(jax.jit, donate_argnums=0)
    def step(part: Part, others, data, count, position, lr):
        def body(i, part):
            batch = jax.tree.map(lambda array: array[data.indices[i]], data.examples)
            grads = jax.grad(loss_of)(part.params, others, batch, stream(config.seed, "train", position + i))
            fixed = {"weight_decay": config.weight_decay, "clip_norm": config.clip_norm}
            return adamw((part,), (grads,), lr=jnp.asarray(lr)[i], **fixed)[0][0]

        return jax.lax.fori_loop(0, count, body, part)

    return step


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]}")
    config = CONFIG.value
    check_config(CLASSIFY, config)
    if config.model_type != "vit":
        raise app.UsageError("it takes the config of a plain model, such as configs/vit_digits.py")
    dataset, mesh, num_blocks = find_dataset(config), make_mesh(), config.num_blocks
    task = CLASSIFY.make(config, dataset)
    blueprint, params = new_model(task, config.seed)
    flat = flatten_dict(jax.device_get(params["model"]))
    owner = {path: block_of(path, config.num_layers, num_blocks) for path in flat}
    source, test = dataset.split("train"), dataset.split("test")
    most = min(config.steps_per_call, SWITCH.value)
    feed = make_feed(source, batch_size=config.batch_size, seed=config.seed, most=most, mesh=mesh)
    step = make_step(config, task, blueprint)

    def parts(block: int) -> tuple[Part, Any]:
        of_block, others = ({p: v for p, v in flat.items() if (owner[p] == block) == mine} for mine in (True, False))
        return new_part(of_block), others

    began, rng = time.perf_counter(), random.Random(config.seed)
    with arithmetic(config):
        if MEMORY.value:
            for block in range(num_blocks):
                given = (*parts(block), feed.take(0, 1), np.int32(1), np.int32(0), np.zeros(most, np.float32))
                mib = total_bytes(step.lower(*given).compile().memory_analysis()) / 2**20
                print(json.dumps({"block": block, "mib_with_data": round(mib, 1)}))
            return
        total = count_steps(CLASSIFY, config, len(source)).steps
        lr_at, position, turns = schedule(config, total), 0, []
        while position < total:
            turns = turns or rng.sample(range(num_blocks), num_blocks)
            part, others = parts(turns.pop())
            end = min(total, position + SWITCH.value)
            while position < end:
                count = min(feed.most, end - position)
                lr = np.array([lr_at(position + i) for i in range(most)], np.float32)
                part = step(part, others, feed.take(position, count), np.int32(count), np.int32(position), lr)
                position += count
            flat.update(part.params)
        params = {"model": unflatten_dict(flat)}
        scored = answers(task.classifier(blueprint), params, test, batch_size=config.eval_batch_size, mesh=mesh)
    found = metrics(*scored, test.labels)
    about = {"seed": config.seed, "steps": total, "switch": SWITCH.value, "seconds": time.perf_counter() - began}
    print(json.dumps({name: found[name] for name in ("top1", "cross_entropy", "calibration_error")} | about))


if __name__ == "__main__":
    app.run(main)

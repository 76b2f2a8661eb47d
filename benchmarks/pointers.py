"""A task that needs depth: where does one come to by following the arrows of a cycle four times?

    python benchmarks/pointers.py --out=DIR [--hops=4] [--steps=2000] [--seeds=0,1,2] [--z=chain,answer] [--arms=...]

Each of 17 places has an arrow to another one, all on one cycle; a token stands for a place and its arrow, and each is
asked where it comes to. A layer can look up what another place knows, so one layer follows 2 arrows at most, two
layers 4, three 8. The target z is the "answer" alone, or the "chain": where one comes to after 2, 4, ... arrows.
Targets are hidden as text is in masked diffusion, and uncovered in 12 steps, those first of which the model is surest.

Arms: "plain" (3 layers, N steps), "short" (1 layer, N), "short-long" (1 layer, 3 N), "blocks" (DiffusionBlocks, 3
blocks of a layer, 3 N), "grown" (one block first, then three), and "iterated": short-long's layer trained to denoise at
all levels, 3 N, the same one at every step. Prints each one's share of right answers after 2, 4, ... arrows.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dblocks_jax
from dblocks_jax import ArrayData, Entry, Losses, MainScore, Masking, Task, cross_entropy
from dblocks_jax.diffusion.masking import hide_each
from dblocks_jax.models.conditioned import ConditionedBlock, make_parts
from dblocks_jax.models.masked_transformer import LevelEmbedding, LevelModulation, MaskedArchitecture, MaskedLayer
from dblocks_jax.models.primitives import Linear, init_weights, init_zeros, normalize_modulated
from dblocks_jax.run.workdir import read_saved

PLACES, BLOCKS = 17, 3
TRAINING, TEST = 200_000, 2_000
ARMS = ("plain", "short", "short-long", "blocks", "grown", "iterated")
STEPS_OF_ANSWER = 12


def cycles(count: int, seed: int) -> dict[str, np.ndarray]:
    """Random cycles through all places: place i's arrow leads to arrows[:, i]."""
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(PLACES), (count, 1)), axis=1)
    arrows = np.empty_like(order)
    np.put_along_axis(arrows, order, np.roll(order, -1, axis=1), axis=1)
    return {"arrows": arrows.astype(np.uint8)}


def follow(arrows: jax.Array, hops: int) -> jax.Array:
    """Where one comes to from each place [b, places]."""
    at = jnp.broadcast_to(jnp.arange(PLACES), arrows.shape)
    for _ in range(hops):
        at = jnp.take_along_axis(arrows, at, axis=1)
    return at


class Shared(nnx.Module):
    """What every block uses. `kinds` is how many targets a place has."""

    def __init__(self, arch: MaskedArchitecture, kinds: int, rngs: nnx.Rngs):
        def table(*shape: int) -> nnx.Param:
            return nnx.Param(init_weights(rngs.params(), (*shape, arch.hidden_size)))

        self.places, self.arrows = table(PLACES), table(PLACES)
        self.seen = table(kinds, PLACES + 1)  # the last row stands for a target that is hidden
        self.level = LevelEmbedding(rngs=rngs)
        self.modulation = LevelModulation(arch.hidden_size, 2, rngs=rngs)
        self.head = Linear(arch.hidden_size, kinds * PLACES, rngs=rngs, init=init_zeros)


def run_block(shared, block, arrows, targets, is_hidden, level):
    """Logits [b, places, kinds, places] of every target, from the arrows and the targets that are not hidden."""
    kinds = targets.shape[-1]
    seen = shared.seen[...][jnp.arange(kinds), jnp.where(is_hidden, PLACES, targets)].sum(axis=2)
    cond = shared.level(level)
    tokens = block(shared.places[...] + shared.arrows[...][arrows] + seen, cond)
    shift, scale = shared.modulation(cond)
    return shared.head(normalize_modulated(tokens, shift, scale)).reshape(*arrows.shape, kinds, PLACES)


@dataclass(frozen=True)
class Pointers(Task):
    """See `dblocks_jax.tasks.task.Task`. The plain network sees nothing of a target, and answers in one pass."""

    config: Any
    card: Any

    @property
    def hops(self) -> tuple[int, ...]:
        """After how many arrows one is asked."""
        most = self.config.hops
        return tuple(2**i for i in range(1, most.bit_length())) if self.config.z == "chain" else (most,)

    @cached_property
    def corruption(self) -> Masking | None:
        """Targets are hidden, each with probability t."""
        return None if self.config.is_plain else Masking(self.config.num_blocks, gamma=0.05)

    def modules(self, key):
        config, rngs = self.config, nnx.Rngs(key)
        count = config.num_layers // config.num_blocks
        arch = MaskedArchitecture(PLACES, count, config.hidden_size, config.num_heads, config.intermediate_size)
        parts = make_parts(
            config.num_blocks,
            isolated=False,
            shared=lambda: Shared(arch, len(self.hops), rngs),
            block=lambda: ConditionedBlock([MaskedLayer(arch, rngs=rngs) for _ in range(count)]),
        )
        return {"model": nnx.List(parts.values())} if config.is_plain else parts

    def prepare(self, key, batch):
        arrows = batch["arrows"].astype(jnp.int32)
        return arrows, jnp.stack([follow(arrows, hops) for hops in self.hops], axis=-1)

    def losses(self, modules, example, level, draws):
        arrows, targets = example
        if level is None:
            (modules,), level, is_hidden = modules, jnp.ones(len(arrows)), jnp.ones(targets.shape, bool)
        else:
            is_hidden = hide_each(draws.noise, level, math.prod(targets.shape[1:])).reshape(targets.shape)
        costs = cross_entropy(run_block(*modules, arrows, targets, is_hidden, level), targets)
        # Eq. 7: 1 / t times what is hidden. At t = 1 that is the plain loss.
        return Losses(jnp.where(is_hidden, costs, 0).mean(axis=(1, 2)), 1 / level, {})

    def scorer(self, blueprint, mesh):
        @jax.jit
        def log_probs(together, arrows, targets, is_hidden, level):
            modules = blueprint.together(together)
            modules = modules[0] if self.config.is_plain else modules
            return jax.nn.log_softmax(run_block(*modules, arrows, targets, is_hidden, jnp.full(len(arrows), level)))

        def score(params, data, split, at_each_batch):
            arrows = jnp.asarray(data.split(split).examples["arrows"], jnp.int32)
            targets = np.stack([follow(arrows, hops) for hops in self.hops], axis=-1)
            found = {}
            masking = self.corruption or Masking(1, gamma=0.0)  # the plain network answers with all hidden
            for steps in (1,) if self.config.is_plain else (1, STEPS_OF_ANSWER):
                levels = masking.levels(steps)
                asked = [tuple(params[name] for name in blueprint.names(owner)) for owner in masking.owners(levels)]
                answers = uncover(
                    [lambda *seen, of=of: log_probs(of, arrows, *seen) for of in asked], levels, targets.shape
                )
                shares = (answers == targets).mean(axis=(0, 1)).tolist()
                found[f"{steps} steps"] = shares
            return found | {"shares": shares, "accuracy": shares[-1]}

        return score


def uncover(asked: list[Callable], levels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Targets, first those of which the model is surest: as many at each level as fall due.

    `asked` has for each level who is asked then: (targets, is_hidden, level) -> log-probabilities.
    """
    count, per_example = shape[0], math.prod(shape[1:])
    targets, is_hidden = np.zeros((count, per_example), np.int32), np.ones((count, per_example), bool)
    for ask, level, following in zip(asked, levels, [*levels[1:], 0.0], strict=True):
        found = np.asarray(ask(targets.reshape(shape), is_hidden.reshape(shape), np.float32(level)))
        found = found.reshape(count, per_example, PLACES)
        left = round(per_example * following)
        surest = np.argsort(np.where(is_hidden, -found.max(axis=-1), np.inf), axis=1)
        due = surest[:, : is_hidden[0].sum() - left]
        np.put_along_axis(targets, due, np.take_along_axis(found.argmax(axis=-1), due, axis=1), axis=1)
        np.put_along_axis(is_hidden, due, False, axis=1)
    return targets.reshape(shape)


def get_config():
    """Of DiffusionBlocks, one layer a block."""
    config = dblocks_jax.default_config()
    config.update(task="pointers", is_plain=False, hops=4, z="chain")
    config.update(num_layers=BLOCKS, num_blocks=BLOCKS, hidden_size=64, num_heads=4, intermediate_size=256)
    config.update(batch_size=64, lr=2e-3, scheduler_type="cosine", num_warmup_steps=100)
    config.update(num_epochs=10**4, save_every_n_epochs=10**4, save_top_k=0, log_every_n_steps=500)
    return config


def arm(name: str, steps: int) -> dict[str, Any]:
    """The fields of one arm, for N = `steps`."""
    fields: dict[str, Any] = {"max_steps": steps if name in ("plain", "short") else BLOCKS * steps}
    if name in ("plain", "short", "short-long"):
        fields |= {"is_plain": True, "num_blocks": 1}
    if name in ("short", "short-long", "iterated"):
        fields |= {"num_blocks": 1, "num_layers": 1}
    return fields | ({"grow_at": (0.5,)} if name == "grown" else {})


POINTERS = Entry(
    "pointers",
    find_data=lambda config: ArrayData("cycles", {"train": cycles(TRAINING, 0), "test": cycles(TEST, 1)}),
    make=Pointers,
    main_score=MainScore("accuracy", more_is_better=True),
)


def run(name: str, z: str, seed: int, args: argparse.Namespace) -> list[float]:
    """The shares of right answers after 2, 4, ... arrows (of "answer" the last alone) of a run, trained if need be."""
    folder = Path(args.out) / f"{name}_{z}_hops{args.hops}_N{args.steps}_seed{seed}"
    result = read_saved(folder, "train.json")
    if result is None:
        config = get_config()
        config.update({"hops": args.hops, "z": z, "seed": seed} | arm(name, args.steps))
        result = dblocks_jax.train(config, folder, own=POINTERS)
        folder.joinpath("train.json").write_text(json.dumps(result))
    print(json.dumps({"arm": name, "z": z, "seed": seed} | {key: result[key] for key in result if "steps" in key}))
    return result["shares"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--hops", type=int, default=4, choices=(2, 4, 8))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--z", default="chain,answer")
    parser.add_argument("--arms", default=",".join(ARMS))
    args = parser.parse_args()
    for given, known in ((args.z, ("chain", "answer")), (args.arms, ARMS)):
        if unknown := set(given.split(",")) - set(known):
            parser.error(f"{', '.join(unknown)} is none of {', '.join(known)}")
    lines = [f"| z | arm | after {', '.join(str(2**i) for i in range(1, args.hops.bit_length()))} arrows |"]
    for z in args.z.split(","):
        for name in args.arms.split(","):
            results = [run(name, z, seed, args) for seed in map(int, args.seeds.split(","))]
            cells = [
                f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")
                for values in zip(*results, strict=True)
            ]
            lines.append(f"| {z} | {name} | {', '.join(cells)} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

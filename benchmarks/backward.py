"""What our backward passes are worth on a card that is not here: a block's step with them and without.

    python benchmarks/backward.py --target=h100 --models=cifar,vit-b16 --num_blocks=4

The variants: "ours"; "autodiff", where JAX differentiates layer norm, GELU, attention, dense layers and the MLP in
chunks itself; "unordered", without `once` and the barriers that say what is computed first; "all kept", where XLA says
what a layer keeps for its backward pass, not a policy; "plain", none of the three; and ours in bfloat16, and with rbg
numbers. MiB as in `--mode=memory --target`: the compiler's estimate. What a step computes is the same but in the last
two.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

from absl import app, flags

from dblocks_jax.run.targets import check_compilers, devices_of, parse_targets, prepare_environment

TARGET = flags.DEFINE_string("target", "h100", "A card.")
NAMES = flags.DEFINE_list("models", ["cifar", "vit-b16"], "Of those of benchmarks/cards.py.")
NUM_BLOCKS = flags.DEFINE_integer("num_blocks", 3, "B.", lower_bound=2)


@contextmanager
def autodiff() -> Iterator[None]:
    """Functions with a backward pass of their own are differentiated by JAX."""
    import jax

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.fun(*args, **kwargs)

    with mock.patch.object(jax.custom_vjp, "__call__", call):
        yield


@contextmanager
def unordered() -> Iterator[None]:
    """Nothing says what is computed first."""
    import jax

    from dblocks_jax.models import primitives

    with (
        mock.patch.object(primitives.once, "__code__", (lambda there, x: (there, x)).__code__),
        mock.patch.object(jax.lax, "optimization_barrier", lambda x: x),
    ):
        yield


@contextmanager
def all_kept() -> Iterator[None]:
    """What a layer keeps is XLA's choice."""
    import jax

    with mock.patch.object(jax, "checkpoint", lambda function, **_: function):
        yield


VARIANTS: dict[str, tuple[list[Callable[[], Any]], dict[str, Any]]] = {
    "ours": ([], {}),
    "autodiff": ([autodiff], {}),
    "unordered": ([unordered], {}),
    "all kept": ([all_kept], {}),
    "plain": ([autodiff, unordered, all_kept], {}),
    "bfloat16": ([], {"dtype": "bfloat16"}),
    "rbg": ([], {"prng_impl": "rbg"}),
}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]}")
    prepare_environment()
    [target] = parse_targets(TARGET.value)
    check_compilers([target])
    import jax

    from benchmarks.cards import card_of, get_config
    from dblocks_jax.modes.absent import Estimate, estimate
    from dblocks_jax.modes.program import variant
    from dblocks_jax.tasks.table import entry_of

    devices = devices_of(target)
    for model in NAMES.value:
        for name, (patches, fields) in VARIANTS.items():
            config = get_config(model)
            config.update(fields)
            entry = entry_of(config)
            config = variant(entry, config, plain=False, remat=False, num_blocks=NUM_BLOCKS.value)
            jax.clear_caches()  # what was traced otherwise
            with ExitStack() as stack:
                for patch in patches:
                    stack.enter_context(patch())
                found = estimate(entry, config, card_of(config), devices)
            assert isinstance(found, Estimate), found
            sizes = {"total": found.total, "temporaries": found.temporaries, "peak": found.peak}
            row = {"target": target.name, "model": model, "variant": name}
            row |= {key: round(size / 2**20, 1) for key, size in sizes.items()}
            row |= {"gflop": round((found.operations or 0) / 1e9, 1), "gb": round((found.moved or 0) / 1e9, 2)}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    app.run(main)

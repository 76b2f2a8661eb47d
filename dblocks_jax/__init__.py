"""DiffusionBlocks in JAX: transformers trained one block at a time as denoisers of the target."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dblocks_jax.modes.load import load_classifier, load_trained
    from dblocks_jax.training.loop import train

__all__ = ["load_classifier", "load_trained", "train"]

# Name -> where it is. Imported when it is asked for: `launch.py --help` need not wait for JAX.
_PLACES = {
    "load_classifier": "dblocks_jax.modes.load",  # (folder) -> a trained classifier, to be called with images
    "load_trained": "dblocks_jax.modes.load",  # (folder) -> a trained model of any task
    "train": "dblocks_jax.training.loop",  # (entry, config, workdir): see docs/new_task.md
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)

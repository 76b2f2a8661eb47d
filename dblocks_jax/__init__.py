"""DiffusionBlocks in JAX: transformers trained one block at a time as denoisers of the target.

What is named here is what the package offers, each name documented where it is defined; all else may change.

Train       default_config, find_data, train, memory_table
Use         load_trained, load_classifier, draw_images, write_texts, score_text; Trained, Classifier
A task of   Task, Entry, MainScore, Losses, Draws, Corruption, ArrayData; Gaussian, NoiseDistribution, Masking,
one's own   precondition, loss_weight, cross_entropy, solve
Ends early  UserError, Stopped, Diverged, Unsaved
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dblocks_jax.data.arrays import ArrayData
    from dblocks_jax.diffusion.gaussian import Gaussian
    from dblocks_jax.diffusion.loss import cross_entropy
    from dblocks_jax.diffusion.masking import Masking
    from dblocks_jax.diffusion.noise import NoiseDistribution
    from dblocks_jax.diffusion.precondition import loss_weight, precondition
    from dblocks_jax.diffusion.sampler import solve
    from dblocks_jax.fields.defaults import default_config
    from dblocks_jax.modes.in_use import draw_images, find_data, score_text, write_texts
    from dblocks_jax.modes.load import Classifier, Trained, load_classifier, load_trained
    from dblocks_jax.modes.memory import memory_table
    from dblocks_jax.modes.train import train
    from dblocks_jax.run.errors import Diverged, Stopped, Unsaved, UserError
    from dblocks_jax.tasks.task import Corruption, Draws, Entry, Losses, MainScore, Task

__all__ = [
    "ArrayData",
    "Classifier",
    "Corruption",
    "Diverged",
    "Draws",
    "Entry",
    "Gaussian",
    "Losses",
    "MainScore",
    "Masking",
    "NoiseDistribution",
    "Stopped",
    "Task",
    "Trained",
    "Unsaved",
    "UserError",
    "cross_entropy",
    "default_config",
    "draw_images",
    "find_data",
    "load_classifier",
    "load_trained",
    "loss_weight",
    "memory_table",
    "precondition",
    "score_text",
    "solve",
    "train",
    "write_texts",
]

# Where each is. Imported when it is asked for: `launch.py --help` need not wait for JAX.
_NAMES = {
    "data.arrays": ("ArrayData",),
    "diffusion.gaussian": ("Gaussian",),
    "diffusion.loss": ("cross_entropy",),
    "diffusion.masking": ("Masking",),
    "diffusion.noise": ("NoiseDistribution",),
    "diffusion.precondition": ("loss_weight", "precondition"),
    "diffusion.sampler": ("solve",),
    "fields.defaults": ("default_config",),
    "modes.in_use": ("draw_images", "find_data", "score_text", "write_texts"),
    "modes.load": ("Classifier", "Trained", "load_classifier", "load_trained"),
    "modes.memory": ("memory_table",),
    "modes.train": ("train",),
    "run.errors": ("Diverged", "Stopped", "Unsaved", "UserError"),
    "tasks.task": ("Corruption", "Draws", "Entry", "Losses", "MainScore", "Task"),
}
_PLACES = {name: f"dblocks_jax.{module}" for module, names in _NAMES.items() for name in names}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)

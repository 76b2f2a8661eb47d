"""Both vision transformers as the parts that train together, and back."""

from typing import Any

from flax import nnx
from ml_collections import ConfigDict

from dblocks_jax.models.dblock_vit import DBlockViT, IsolatedDBlockViT, make_dblock_vit, make_isolated_dblock_vit
from dblocks_jax.models.vit import Architecture, ViT

Model = ViT | DBlockViT | IsolatedDBlockViT


def new_model(config: ConfigDict, arch: Architecture, rngs: nnx.Rngs) -> Model:
    """A freshly initialised model of a config."""
    if config.model_type == "vit":
        return ViT(arch, rngs=rngs)
    make = make_isolated_dblock_vit if config.sharing == "isolated" else make_dblock_vit
    return make(arch, config.num_blocks, rngs=rngs)


def to_modules(model: Model) -> dict[str, Any]:
    """A model by part."""
    if isinstance(model, ViT):
        return {"model": model}
    isolated = isinstance(model, IsolatedDBlockViT)
    modules = {f"shared_{b}": s for b, s in enumerate(model.shared)} if isolated else {"shared": model.shared}
    return modules | {f"block_{b}": block for b, block in enumerate(model.blocks)}


def from_modules(modules: dict[str, Any]) -> Model:
    """The inverse of `to_modules`."""
    if "model" in modules:
        return modules["model"]
    blocks = [modules[name] for name in modules if name.startswith("block_")]
    if "shared" in modules:
        return DBlockViT(modules["shared"], blocks)
    return IsolatedDBlockViT([modules[f"shared_{b}"] for b in range(len(blocks))], blocks)

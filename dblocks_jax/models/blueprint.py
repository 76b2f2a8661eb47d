"""A model in parts: what trains together has one name, and numbers lie apart from structure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flax import nnx

Params = Any  # nested dicts of arrays, one leaf for each nnx.Param


@dataclass(frozen=True)
class Blueprint:
    """A model without its numbers: the structure of each part. Parameters are kept by part, in nested dicts.

    The plain model has the one part "model"; a DiffusionBlocks model has "shared", "block_0", "block_1", ..., or, where
    blocks are isolated, "shared_0", "block_0", "shared_1", "block_1", ... All blocks have one structure.
    """

    parts: dict[str, nnx.GraphDef]

    @classmethod
    def of(cls, modules: Mapping[str, Any]) -> tuple["Blueprint", dict[str, Params]]:
        """Take a model apart: (structure, parameters by part)."""
        split = {name: nnx.split(module, nnx.Param) for name, module in modules.items()}
        params = {name: nnx.to_pure_dict(state) for name, (_, state) in split.items()}
        return cls({name: graphdef for name, (graphdef, _) in split.items()}), params

    @property
    def num_blocks(self) -> int:
        """How many blocks there are; the plain model is one."""
        return max(1, sum(name.startswith("block_") for name in self.parts))

    def names(self, block: int) -> tuple[str, ...]:
        """The parts that are trained together with a block."""
        if "model" in self.parts:
            return ("model",)
        return ("shared" if "shared" in self.parts else f"shared_{block}", f"block_{block}")

    def together(self, params: Sequence[Params]) -> tuple[Any, ...]:
        """The modules of one block, from the parameters of its parts: any block's, for they are all alike."""
        return tuple(
            nnx.merge(self.parts[name], part) for name, part in zip(self.names(0), params, strict=True)
        )  # fmt: skip

    def modules(self, params: dict[str, Params]) -> dict[str, nnx.Module]:
        """The inverse of `of`."""
        return {name: nnx.merge(graphdef, params[name]) for name, graphdef in self.parts.items()}

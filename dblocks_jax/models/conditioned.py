"""What transformers in blocks have in common: gated branches, layers under one condition, and a model by parts."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from dblocks_jax.models.primitives import KEPT, normalize_modulated


def gated_branches(
    x: Float[Array, "b t d"],
    six: Sequence[Float[Array, "b d"]],
    attention: Callable[[Float[Array, "b t d"]], Float[Array, "b t d"]],
    mlp: Callable[[Float[Array, "b t d"]], Float[Array, "b t d"]],
) -> Float[Array, "b t d"]:
    """Attention and MLP added to x, each shifted and scaled after a plain norm, and gated (adaLN-Zero).

    `six` are the shift, scale and gate of attention, then those of the MLP.
    """
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = six
    gate_a, gate_m = gate_a[:, None].astype(x.dtype), gate_m[:, None].astype(x.dtype)
    x = x + gate_a * attention(normalize_modulated(x, shift_a, scale_a))
    return x + gate_m * mlp(normalize_modulated(x, shift_m, scale_m))


class ConditionedBlock(nnx.Module):
    """Consecutive layers: what one DiffusionBlocks step trains; all layers in one block are the plain network.

    With `remat` each layer keeps only its input for the backward pass and computes the rest again.
    """

    def __init__(self, layers: list[Any], *, remat: bool = False):
        self.layers = nnx.List(layers)
        self.remat = remat

    def __call__(self, x: Float[Array, "b t d"], *cond: Float[Array, "b k"]) -> Float[Array, "b t d"]:
        """The tokens after all layers, under the condition of each sample, where layers have one."""

        def apply(layer, x, *cond):
            return layer(x, *cond)

        apply = jax.checkpoint(apply, policy=None if self.remat else KEPT)
        for layer in self.layers:
            x = apply(layer, x, *cond)
        return x


def make_parts(
    num_blocks: int, *, isolated: bool, shared: Callable[[], nnx.Module], block: Callable[[], nnx.Module]
) -> dict[str, nnx.Module]:
    """A model by parts, of fresh modules: "shared", "block_0", "block_1", ...

    `isolated` blocks share nothing, and the parts are "shared_0", "block_0", "shared_1", "block_1", ...
    """
    parts = {} if isolated else {"shared": shared()}
    for b in range(num_blocks):
        if isolated:
            parts[f"shared_{b}"] = shared()
        parts[f"block_{b}"] = block()
    return parts

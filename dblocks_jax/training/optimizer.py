"""AdamW on parts of a model, each with its own moments and step count, and the learning rate at every step."""

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from dblocks_jax.models.blueprint import Params
from dblocks_jax.run.errors import UserError, brief

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


class Part(NamedTuple):
    """Parameters that are trained together and their AdamW state; a part that sits out a step does not change."""

    params: Params
    adam: optax.ScaleByAdamState
    average: Params = ()  # of the parameters, over the updates of this part; nothing where none is kept


def used_params(parts: dict[str, Part]) -> dict[str, Params]:
    """What a model answers with: each part's average where one is kept, else its parameters."""
    return {name: part.params if part.average == () else part.average for name, part in parts.items()}


def new_part(params: Params, *, averaged: bool = False) -> Part:
    """A part with zero moments and step count 0, and an average where one is to be kept."""
    adam = optax.scale_by_adam(BETA_1, BETA_2, EPSILON).init(params)
    assert isinstance(adam, optax.ScaleByAdamState)
    return Part(params, adam, jax.tree.map(jnp.copy, params) if averaged else ())


# (gradients, whether they are finite) -> (the gradients to apply, whether to apply them, part by part)
Combine = Callable[[tuple[Params, ...], Bool[Array, ""]], tuple[tuple[Params, ...], tuple[Bool[Array, ""], ...]]]


def _alone(grads: tuple[Params, ...], is_sound: Bool[Array, ""]):
    """Nobody else trains at the same time."""
    return grads, (is_sound,) * len(grads)


def adamw(
    parts: tuple[Part, ...],
    grads: tuple[Params, ...],
    *,
    lr: Float[Array, ""],
    weight_decay: float,
    clip_norm: float,
    ema_decay: float = 0.0,
    is_sound: Bool[Array, ""] | bool = True,
    combine: Combine = _alone,
) -> tuple[tuple[Part, ...], Float[Array, ""]]:
    """One AdamW update of all `parts`, their gradients clipped to a common global norm: (parts, norm before clipping).

    Decoupled decay on every parameter: p -= lr * (adam(g) + weight_decay * p). Without `is_sound`, or where the norm is
    not finite, nothing changes. Averages follow: a = d * a + (1 - d) * p, where d = min(ema_decay, (1 + t) / (10 + t))
    in update t (from 1) of a part. `combine` is applied to the clipped gradients: where others train at the same time,
    their gradients of common parts come in here.
    """
    norm = optax.tree.norm(grads)
    is_sound = is_sound & jnp.isfinite(norm)
    # The tiny constant is PyTorch's, so that clipped runs match the reference to the last digits.
    scale = jnp.minimum(1.0, clip_norm / (norm + 1e-6))
    clipped, sound = combine(jax.tree.map(lambda g: g * scale, grads), is_sound)
    updated = []
    for part, grad, is_part_sound in zip(parts, clipped, sound, strict=True):
        params, (count, mu, nu), average = part

        def keep_unless_sound(new: Any, old: Any, is_sound: Bool[Array, ""] = is_part_sound) -> Any:
            return jax.tree.map(partial(jnp.where, is_sound), new, old)

        # The lines of `optax.scale_by_adam`, but the parameters are computed from the moments that are kept: otherwise
        # XLA, which updates all three in place, must copy the old moments first.
        count = keep_unless_sound(optax.safe_increment(count), count)
        mu = keep_unless_sound(optax.tree.update_moment(grad, mu, BETA_1, 1), mu)
        nu = keep_unless_sound(optax.tree.update_moment_per_elem_norm(grad, nu, BETA_2, 2), nu)
        mean, square = optax.tree.bias_correction(mu, BETA_1, count), optax.tree.bias_correction(nu, BETA_2, count)
        step = jax.tree.map(lambda p, m, s: m / (jnp.sqrt(s) + EPSILON) + weight_decay * p, params, mean, square)
        params = keep_unless_sound(jax.tree.map(lambda p, s: p - lr * s, params, step), params)
        if average != ():
            # A young average forgets faster, else it would hold on to the parameters of the start.
            decay = jnp.minimum(ema_decay, (1.0 + count) / (10.0 + count))
            moved = jax.tree.map(lambda a, p, decay=decay: decay * a + (1 - decay) * p, average, params)
            average = keep_unless_sound(moved, average)
        updated.append(Part(params, optax.ScaleByAdamState(count, mu, nu), average))
    return tuple(updated), norm


LARGEST = 1e30  # of a schedule's numbers: room to calculate with them
SCHEDULES = {  # name -> the keyword arguments it understands
    "constant_with_warmup": (),
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
}


def learning_rate(
    scheduler_type: str, *, lr: float, num_warmup_steps: int, total_steps: int, specific_kwargs: str = "{}"
) -> Callable[[int], float]:
    """Step (from 0) -> learning rate, named and shaped as in Hugging Face Transformers.

    All warm up linearly from 0; then "constant_with_warmup" stays, "linear" falls to 0, "cosine" follows a half
    cosine to 0, and "cosine_with_min_lr" one to `min_lr` (or `min_lr_rate` * lr). `specific_kwargs` is a JSON object.

    Raises:
      UserError: unknown schedule, malformed JSON, or a key the schedule does not have.
    """
    kwargs = _schedule_kwargs(scheduler_type, specific_kwargs)
    floor = kwargs.get("min_lr_rate", kwargs.get("min_lr", 0.0) / lr if lr else 0.0)
    cycles = kwargs.get("num_cycles", 0.5)

    def at(step: int) -> float:
        if step < num_warmup_steps:
            return lr * step / num_warmup_steps
        progress = (step - num_warmup_steps) / max(1, total_steps - num_warmup_steps)
        if scheduler_type == "constant_with_warmup":
            return lr
        if scheduler_type == "linear":
            return lr * max(0.0, 1.0 - progress)
        cosine = max(0.0, 0.5 * (1.0 + math.cos(2.0 * math.pi * cycles * progress)))
        return lr * (floor + (1.0 - floor) * cosine)

    return at


def _schedule_kwargs(scheduler_type: str, specific_kwargs: str) -> dict[str, float]:
    if scheduler_type not in SCHEDULES:
        raise UserError(f"scheduler_type is {scheduler_type!r}; choose one of {', '.join(SCHEDULES)}")
    try:
        kwargs = json.loads(specific_kwargs or "{}")
    except (ValueError, RecursionError) as error:  # what is nested deeply enough is no ValueError
        raise UserError(f"scheduler_specific_kwargs is not JSON ({brief(error)}): {specific_kwargs[:200]!r}") from None
    known = SCHEDULES[scheduler_type]
    numbers = isinstance(kwargs, dict) and all(type(value) in (int, float) for value in kwargs.values())
    if not numbers or not all(0 <= value <= LARGEST for value in kwargs.values()):
        raise UserError(
            f"scheduler_specific_kwargs must be a JSON object of numbers from 0 to {LARGEST:g}, "
            f"not {specific_kwargs[:200]!r}"
        )
    for key in kwargs:
        if key not in known:
            takes = f"takes {', '.join(known)}" if known else "takes none"
            raise UserError(f"scheduler_specific_kwargs has {key!r}, but {scheduler_type} {takes}")
    if "min_lr" in kwargs and "min_lr_rate" in kwargs:
        raise UserError("scheduler_specific_kwargs has both min_lr and min_lr_rate; give one")
    if scheduler_type == "cosine_with_min_lr" and not {"min_lr", "min_lr_rate"} & kwargs.keys():
        raise UserError("cosine_with_min_lr needs scheduler_specific_kwargs with min_lr, such as '{\"min_lr\": 5e-5}'")
    return kwargs

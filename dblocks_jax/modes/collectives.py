"""What devices tell each other in a compiled program: its collective operations, by kind and by axis of the mesh."""

import math
import re
from collections import Counter
from collections.abc import Mapping

import numpy as np

KINDS = (
    "all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute", "collective-broadcast",
    "ragged-all-to-all", "send", "recv",
)  # fmt: skip
# `-start` begins what a `-done` ends.
OPERATION = re.compile(rf" ({'|'.join(KINDS)})(?:-start)?\((.*)")
CHANNEL = re.compile(r"channel_id=(\d+)")
LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")
COUNTED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
UNKNOWN = "unknown axes"


def collectives(program: str, mesh: Mapping[str, int]) -> dict[str, int]:
    """How many of each kind over which axes: {"all-reduce over data": 3, ...}.

    `program` is the text of a compiled program, `mesh` the sizes of its axes, of which the last varies fastest. What
    the compiler has copied into several places, under one channel, counts once.
    """
    counts: Counter[str] = Counter()
    seen = set()
    for line in program.splitlines():
        found = OPERATION.search(line)
        if found is None:
            continue
        kind, rest = found.groups()
        channel = CHANNEL.search(rest)
        if channel is not None:
            if (kind, channel[1]) in seen:
                continue
            seen.add((kind, channel[1]))
        counts[f"{kind} over {_axes(rest, mesh)}"] += 1
    return dict(sorted(counts.items()))


def _axes(operation: str, mesh: Mapping[str, int]) -> str:
    """Along which axes the devices of a group differ."""
    groups = _groups(operation, math.prod(mesh.values()))
    if groups is None:
        return UNKNOWN
    varying = set()
    for group in groups:
        places = np.array(np.unravel_index(group, tuple(mesh.values())))  # [axes, members]
        varying |= {name for name, place in zip(mesh, places, strict=True) if len(set(place)) > 1}
    return " and ".join(name for name in mesh if name in varying) or "one device each"


def _groups(operation: str, count: int) -> list[list[int]] | None:
    """The groups of devices that talk to each other, in any of the ways in which XLA writes them, if it does."""
    if found := LISTED.search(operation):
        groups = [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", found[1])]
        return groups or [list(range(count))]  # none named are all in one
    if found := COUNTED.search(operation):
        shape, dims, order = (_numbers(text or "") for text in found.groups())
        members = np.arange(math.prod(dims)).reshape(dims)
        return (members.transpose(order) if order else members).reshape(-1, shape[-1]).tolist()
    if found := NAMED.search(operation):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", found[1])}
        # A part of an axis is written 'axis':(what comes before it)its size.
        chosen = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", found[2])
        dims, talking = [], []
        for name, size in sizes.items():
            mine = [(int(before), int(part)) for axis, before, part in chosen if axis == name and part]
            if not mine:
                talking += [len(dims)] if any(axis == name for axis, *_ in chosen) else []
                dims.append(size)
                continue
            if len(mine) > 1:
                return None
            [(before, part)] = mine
            talking.append(len(dims) + 1)
            dims += [before, part, size // (before * part)]
        waiting = [axis for axis in range(len(dims)) if axis not in talking]
        members = np.arange(math.prod(dims)).reshape(dims).transpose(waiting + talking)
        return members.reshape(-1, math.prod(dims[axis] for axis in talking)).tolist()
    return None


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]

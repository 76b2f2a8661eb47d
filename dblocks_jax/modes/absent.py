"""What a training step needs on devices that are not here: the compiler's estimate, without a driver or a device."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import jax
from ml_collections import ConfigDict

from dblocks_jax.modes.collectives import collectives
from dblocks_jax.modes.fitting import smallest_that_fits, which_fit
from dblocks_jax.modes.memory import MIB, what_comes_on_top
from dblocks_jax.modes.program import ROWS, bytes_on_device, total_bytes, variant, wanted_step
from dblocks_jax.run.errors import brief
from dblocks_jax.run.targets import Target, check_compilers, compiler_options, compilers, devices_of
from dblocks_jax.tasks.table import entry_of
from dblocks_jax.tasks.task import Entry
from dblocks_jax.training.config import check_config, rest_off_device

REFUSED = "RESOURCE_EXHAUSTED"  # how a TPU's compiler begins to say that a program does not fit
WIDTH = 11


@dataclass(frozen=True)
class Estimate:
    """The compiler's account of a step's program, in bytes of one device where nothing else is said."""

    arguments: int
    temporaries: int
    aliases: int  # of the results, what takes the place of arguments
    total: int  # arguments, temporaries, and results that take nobody's place
    peak: int  # as the compiler schedules it; its books are not those of the total
    program: int  # the program itself, which a TPU keeps in the same memory; 0 where nobody says
    idle: int  # parts that wait on the device, on top
    operations: float | None  # additions and multiplications, those of a loop's body once
    moved: float | None  # to and from memory by all that the program does one after the other, a loop's body once
    collectives: dict[str, int]  # by kind and axes of the mesh
    loops: int

    @property
    def needed(self) -> int:
        """Bytes that a device must have for it."""
        return max(self.total, self.peak) + self.program + self.idle

    def at_least(self, target: Target, config: ConfigDict) -> float | None:
        """Seconds that a step takes where nothing is ever waited for."""
        if self.operations is None or self.moved is None:
            return None
        rate = target.operations_per_second(config.dtype, config.matmul_precision)
        return max(self.operations / rate, self.moved / target.bytes_per_second)


def absent_table(config: ConfigDict, targets: Sequence[Target], *, gib: float | None = None) -> dict[str, Any]:
    """Print and return the table of a config for `targets`, and what fits into their memory, or into `gib`.

    With `gib` also the smallest B that fits, for which more programs are compiled.

    Raises:
      UserError: the config is wrong, nobody knows what its data are like, a compiler is missing, or a target's devices
        cannot be shared out among blocks or examples.
    """
    entry = entry_of(config)
    check_config(entry, config)
    check_compilers(targets)
    card = entry.card_without_data(config)
    devices = {target.name: devices_of(target) for target in targets}
    variants = {name: variant(entry, config, plain=plain, remat=remat) for name, plain, remat in ROWS}
    for target in targets:  # what cannot be shared out is told before minutes of compilation
        for each in variants.values():
            wanted_step(entry, each, card, devices[target.name])
    rows = _estimates(entry, variants, card, devices)
    versions = compilers(targets)
    print(format_estimates(config, targets, rows, versions))
    result: dict[str, Any] = {"mode": "memory", "estimated_by": versions, "targets": {}}
    for target in targets:
        mine = rows[target.name]
        limit = target.memory / 2**30 if gib is None else gib

        def need(config: ConfigDict, target: Target = target) -> float:
            return _needed(estimate(entry, config, card, devices[target.name]))

        where = f"{target.name}: "
        fits: dict[str, Any] = which_fit({name: _needed(row) for name, row in mine.items()}, limit, where=where)
        if gib is not None:
            count = target.count // len({device.process_index for device in devices[target.name]})
            fits |= smallest_that_fits(entry, config, gib, devices=count, need=need, where=where)
        result["targets"][target.name] = {
            "device": devices[target.name][0].device_kind,
            "devices": target.count,
            "rows": {name: _as_json(row, target, config) for name, row in mine.items()},
            "gib": limit,
            "fits": fits,
        }
    return result


def _estimates(
    entry: Entry, variants: dict[str, ConfigDict], card: Any, devices: dict[str, Sequence[Any]]
) -> dict[str, dict[str, Estimate | str]]:
    """Every row of every target; as many are compiled at once as there are cores."""
    wanted = [(target, name) for target in devices for name in variants]
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        found = pool.map(lambda each: estimate(entry, variants[each[1]], card, devices[each[0]]), wanted)
        rows = dict(zip(wanted, found, strict=True))
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, or Ctrl-C, no others begin
    return {target: {name: rows[target, name] for name in variants} for target in devices}


def estimate(entry: Entry, config: ConfigDict, card: Any, devices: Sequence[Any]) -> Estimate | str:
    """Compile the step that training would run on `devices`, and read the account; or why it is refused: it is too big.

    Raises:
      UserError: the devices cannot be shared out.
    """
    wanted = wanted_step(entry, config, card, devices)
    try:
        compiled = wanted.lower().compile(compiler_options(devices))
    except jax.errors.JaxRuntimeError as error:
        if REFUSED not in str(error):
            raise
        return brief(error)
    idle = 0 if rest_off_device(entry, config) else bytes_on_device(wanted.idle)
    return read_estimate(compiled, dict(wanted.mesh.shape), idle)


def read_estimate(compiled: Any, mesh: dict[str, int], idle: int) -> Estimate:
    """The account of a compiled program."""
    analysis, text = compiled.memory_analysis(), compiled.as_text()
    cost = _cost(compiled)
    return Estimate(
        arguments=analysis.argument_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        aliases=analysis.alias_size_in_bytes,
        total=total_bytes(analysis),
        peak=analysis.peak_memory_in_bytes,
        program=analysis.generated_code_size_in_bytes,
        idle=idle,
        operations=cost.get("flops"),
        moved=cost.get("bytes accessed"),
        collectives=collectives(text, mesh),
        loops=text.count(" while("),
    )


def _cost(compiled: Any) -> dict[str, float]:
    """XLA's count of arithmetic and bytes. The GPU's compiler counts nothing, so the CPU's does it for that program."""
    if cost := compiled.cost_analysis():
        return cost
    try:
        from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]

        [module] = compiled.runtime_executable().hlo_modules()
        return xla_client._xla.hlo_module_cost_analysis(jax.local_devices(backend="cpu")[0].client, module)  # pyright: ignore
    except (AttributeError, ImportError):  # not public, and perhaps no longer there
        return {}


def _needed(row: Estimate | str) -> float:
    return float("inf") if isinstance(row, str) else float(row.needed)


def _as_json(row: Estimate | str, target: Target, config: ConfigDict) -> dict[str, Any]:
    if isinstance(row, str):
        return {"refused": row}
    return {**asdict(row), "seconds_at_least": row.at_least(target, config)}


def format_estimates(
    config: ConfigDict,
    targets: Sequence[Target],
    rows: dict[str, dict[str, Estimate | str]],
    versions: dict[str, str],
) -> str:
    """The table as text, sizes in MiB, each total also as a multiple of the plain model's on the same target."""
    head = ("arguments", "temporary", "aliases", "total", "of plain", "peak", "program", "idle", "GFLOP", "GB moved")
    head = (*head, "ms at least")
    width = max(len(target.name) for target in targets) + 25
    lines = [f"{'MiB on a device':{width}s}" + "".join(f"{name:>{WIDTH + 1}s}" for name in head)]
    for target in targets:
        mine = rows[target.name]
        for name, row in mine.items():
            start = f"{target.name + ' ' + name:{width}s}"
            if isinstance(row, str):
                lines.append(f"{start}  does not fit: {row}")
            else:
                cells = _cells(row, mine["plain"], row.at_least(target, config))
                lines.append(start + "".join(f"{cell:>{WIDTH + 1}s}" for cell in cells))
    for target in targets:
        if target.count > 1:
            lines.append(f"What {target.name} exchanges in a step, on {target.count} devices:")
            lines += [f"  {name}: {_exchanged(row)}" for name, row in rows[target.name].items()]
    by = ", ".join(f"{package} {version}" for package, version in versions.items())
    lines.append(f"Estimates for devices that are not here, by {by}: nothing was run, and no algorithm was tried out.")
    lines.append(
        f"B = {config.num_blocks}, batch {config.batch_size}, {config.dtype}. ms at least: what the arithmetic takes "
        f"at the card's rate for products (matmul_precision={config.matmul_precision}), or the bytes at its memory's, "
        "whichever is longer."
    )
    if any(isinstance(row, Estimate) and row.loops for mine in rows.values() for row in mine.values()):
        lines.append("Arithmetic and bytes of a loop are those of one round, so a step with loops has more of both.")
    return "\n".join([*lines, *what_comes_on_top(config)])


def _cells(row: Estimate, plain: Estimate | str, seconds: float | None) -> list[str]:
    def mib(size: int) -> str:
        return f"{size / MIB:.1f}"

    return [
        mib(row.arguments),
        mib(row.temporaries),
        mib(row.aliases),
        mib(row.total),
        "-" if isinstance(plain, str) else f"{row.total / plain.total:.3f}",
        mib(row.peak),
        mib(row.program) if row.program else "-",
        mib(row.idle),
        "-" if row.operations is None else f"{row.operations / 1e9:.1f}",
        "-" if row.moved is None else f"{row.moved / 1e9:.2f}",
        "-" if seconds is None else f"{1e3 * seconds:.3f}",
    ]


def _exchanged(row: Estimate | str) -> str:
    if isinstance(row, str):
        return "does not fit"
    return ", ".join(f"{count} {what}" for what, count in row.collectives.items()) or "nothing"

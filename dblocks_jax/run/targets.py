"""Accelerators that are not here: what a name on the command line means, and devices that a compiler takes for them.

The data files beside this one, `cards/*.toml`, say what each is like. JAX is imported only where it is needed: the
environment must be set before that.
"""

import math
import os
import re
import shutil
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dblocks_jax.run.errors import UserError, brief

CARDS = Path(__file__).parent / "cards"
MOST_DEVICES = 4096
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # else a plugin looks for the devices themselves, and for libraries that only those need
    "TPU_SKIP_MDS_QUERY": "1",  # or libtpu asks the network what machine this is
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it has a lock for the chips of a machine, of which there are none
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # this and the next only silence warnings
    "TPU_WORKER_HOSTNAMES": "localhost",
    "JAX_COMPILATION_CACHE_DIR": "",  # a program kept there is loaded onto its device
    "TF_CPP_MIN_LOG_LEVEL": "3",  # what does not fit is a row of the table
}
# platform -> packages that compile for it, of which one will do, and the extra of this project that brings the first
COMPILERS = {
    "cuda": (("jax_cuda12_plugin", "jax_cuda13_plugin"), "target-cuda"),
    "tpu": (("libtpu",), "target-tpu"),
}
# What all of NVIDIA's GPUs of these years have in common, by XLA's names.
OF_EVERY_GPU = {
    "threads_per_warp": 32,
    "threads_per_block_limit": 1024,
    "threads_per_core_limit": 2048,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
    "registers_per_block_limit": 2**16,
    "registers_per_core_limit": 2**16,
    "shared_memory_per_block": 48 * 2**10,
}
# By platform as devices name it. Compilers spend most of their time on what changes no size: making and comparing
# variants of each kernel, which without a device end with the first anyway, and the last optimisations of machine code.
OPTIONS = {
    "gpu": {
        "xla_gpu_autotune_level": 0,
        "xla_gpu_disable_gpuasm_optimizations": True,
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }
}
# What is taken for granted of the machine that the program will run on.
DRIVER, TOOLKIT, CUDNN = "13.0.0", "12.9.0", (9, 10, 0)


@dataclass(frozen=True)
class Target:
    """Accelerators of one kind, in a topology. Bytes, and what is done in a second, are those of one device."""

    name: str  # as the command line has it
    topology: str
    count: int  # of devices
    about: Mapping[str, Any]  # the card's data file

    @property
    def platform(self) -> str:
        return self.about["platform"]

    @property
    def memory(self) -> int:
        """Bytes."""
        return self.about["memory"]

    @property
    def bytes_per_second(self) -> float:
        """To and from the card's memory."""
        return self.about["bytes_per_second"]

    def operations_per_second(self, dtype: str, matmul_precision: str) -> float:
        """What the units for products reach at most, a multiplication and an addition counted as two."""
        rate = self.about["operations_per_second"][dtype]
        return rate[matmul_precision] if isinstance(rate, Mapping) else rate


def parse_targets(text: str) -> list[Target]:
    """Targets with commas between, each a card, or a card with its topology: "h100,v5e:4x4".

    Raises:
      UserError: there is no such card, or the topology is not one of it.
    """
    names = [name.strip() for name in text.split(",")]
    return [_parse(name) for name in dict.fromkeys(names)]


def _parse(name: str) -> Target:
    cards = sorted(file.stem for file in CARDS.glob("*.toml"))
    card, colon, topology = name.partition(":")
    if card not in cards:
        raise UserError(f"there is no target {card!r}: choose from {', '.join(cards)}")
    about = tomllib.loads((CARDS / f"{card}.toml").read_text())
    axes = about["topology"]
    topology = topology if colon else "x".join("1" * len(axes))
    if not re.fullmatch(r"[1-9]\d{0,4}" + r"x[1-9]\d{0,4}" * (len(axes) - 1), topology):
        example = "x".join("124"[: len(axes)])
        raise UserError(f"the topology of {card} is {' x '.join(axes)}, such as {card}:{example}, not {topology!r}")
    count = math.prod(int(size) for size in topology.split("x"))
    if count > MOST_DEVICES:
        raise UserError(f"target {name} has {count} devices, more than {MOST_DEVICES}")
    return Target(name, topology, count, about)


def prepare_environment() -> None:
    """Let JAX compile for what is not here. Called before it is imported."""
    os.environ.update(ENVIRONMENT)


def check_compilers(targets: Iterable[Target]) -> None:
    """Refuse targets for which nothing here compiles.

    Raises:
      UserError: with the command that brings what is missing.
    """
    needed = {target.platform: target.name for target in targets}
    missing = {COMPILERS[platform][1]: name for platform, name in needed.items() if not _is_installed(platform)}
    if missing:
        extras = " ".join(f"--extra {extra}" for extra in missing)
        raise UserError(
            f"what compiles for {' and '.join(missing.values())} is not installed: uv sync {extras} brings it "
            "(no driver is needed)"
        )


def _is_installed(platform: str) -> bool:
    if not any(find_spec(package) for package in COMPILERS[platform][0]):
        return False
    # A CUDA toolkit has ptxas, and so has a package.
    return platform != "cuda" or bool(shutil.which("ptxas") or (find_spec("nvidia") and find_spec("nvidia.cuda_nvcc")))


def compilers(targets: Iterable[Target]) -> dict[str, str]:
    """The versions of what compiles for these."""
    packages = ["jax", "jaxlib", *(package for target in targets for package in COMPILERS[target.platform][0])]
    found = {}
    for package in dict.fromkeys(packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # the other one does it
            continue
    return found


def devices_of(target: Target) -> Sequence[Any]:
    """Devices to compile for; nothing can be put on them.

    Raises:
      UserError: the compiler knows no such topology.
    """
    import jax
    from jax.experimental import topologies

    about = {"platform": target.platform, "topology_name": target.name}
    if target.platform == "tpu":
        about["topology_name"] = f"{target.name.partition(':')[0]}:{target.topology}"
    else:
        about |= {"topology": target.topology, "target_config": describe_gpu(target.about)}
    try:
        return topologies.get_topology_desc(**about).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise UserError(f"the compiler knows no target {target.name} ({brief(error)})") from error


def compiler_options(devices: Sequence[Any]) -> dict[str, Any]:
    """What spares a compiler work that no estimate needs."""
    return OPTIONS.get(devices[0].platform, {})


def describe_gpu(about: Mapping[str, Any]) -> str:
    """A card's data file as XLA wants to read it: a GpuTargetConfigProto as text."""
    compiler = dict(about["compiler"])
    capability = compiler.pop("capability")
    fields = OF_EVERY_GPU | compiler
    fields |= {"memory_bandwidth": int(about["bytes_per_second"]), "device_memory_size": about["memory"]}
    texts = {"name": about["name"], "driver_version": DRIVER, "dnn_version": ".".join(map(str, CUDNN))}
    texts |= {"runtime_version": TOOLKIT, "compile_time_toolkit_version": TOOLKIT}
    major, minor, features = capability["major"], capability["minor"], capability["features"]
    lines = [
        "gpu_device_info {",
        f"  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}",
        *(f"  {name}: {value}" for name, value in fields.items()),
        *(f'  {name}: "{value}"' for name, value in texts.items()),
        "}",
        'platform_name: "CUDA"',
        "dnn_version_info {{ major: {} minor: {} patch: {} }}".format(*CUDNN),
        f'device_description_str: "{about["name"]}"',
    ]
    return "\n".join(lines)

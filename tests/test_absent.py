"""Devices that are not here: what their names mean, and the table of what a step needs on them."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import dblock_digits
from dblocks_jax.data.datasets import Card
from dblocks_jax.modes import absent
from dblocks_jax.modes.absent import Estimate, absent_table, read_estimate
from dblocks_jax.modes.collectives import collectives
from dblocks_jax.modes.program import wanted_step
from dblocks_jax.run import targets
from dblocks_jax.run.errors import UserError
from dblocks_jax.run.targets import check_compilers, describe_gpu, devices_of, parse_targets, prepare_environment
from dblocks_jax.tasks.classify.task import CLASSIFY

TINY = {"num_layers": 4, "num_blocks": 4, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "batch_size": 32}


def tiny(**changes):
    config = dblock_digits.get_config()
    config.update(TINY | changes)
    return config


def test_targets_are_cards_with_topologies():
    found = parse_targets("h100, v5e:4x4,h100:1x2x8,v5p,h100")
    assert [(target.name, target.topology, target.count, target.platform) for target in found] == [
        ("h100", "1x1x1", 1, "cuda"), ("v5e:4x4", "4x4", 16, "tpu"), ("h100:1x2x8", "1x2x8", 16, "cuda"),
        ("v5p", "1x1x1", 1, "tpu"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h200", "there is no target 'h200': choose from a100, h100, v5e, v5p, v6e"),
        ("h100,", "there is no target '': choose"),
        ("../../x", "there is no target '../../x'"),
        ("h100:8", "h100 is slices x hosts x gpus, such as h100:1x2x4, not '8'"),
        ("h100:", "not ''"),
        ("v5e:2x2x2", "v5e is rows x columns, such as v5e:1x2, not '2x2x2'"),
        ("v5e:0x4", "not '0x4'"),
        ("v5p:99x99x99", "970299 devices, more than 4096"),
    ],
)
def test_what_is_no_target_is_named(text, message):
    with pytest.raises(UserError, match=message):
        parse_targets(text)


@pytest.mark.parametrize("name", ["h100", "a100", "v5e", "v6e", "v5p"])
def test_rates_are_those_of_the_hardware(name):
    """Each of a GPU's units makes a product and a sum in a cycle; a TPU makes float32 of 1, 3 or 6 of bfloat16."""
    [target] = parse_targets(name)
    by_precision = [target.operations_per_second("float32", p) for p in ("default", "high", "highest")]
    bfloat16 = target.operations_per_second("bfloat16", "default")
    if target.platform == "tpu":
        np.testing.assert_allclose(by_precision, [bfloat16, bfloat16 / 3, bfloat16 / 6], rtol=2e-3)
        return
    units = target.about["compiler"]
    fma = units["core_count"] * units["fpus_per_core"] * units["clock_rate_ghz"] * 1e9
    assert by_precision[2] == pytest.approx(2 * fma, rel=1e-3)
    assert by_precision[:2] == pytest.approx([bfloat16 / 2] * 2)
    text = describe_gpu(target.about)
    assert text.count("{") == text.count("}") and f"device_memory_size: {target.memory}\n" in text


@pytest.mark.parametrize(
    ("names", "command"),
    [
        ("h100", "h100 is not installed: uv sync --extra target-cuda brings"),
        ("v5e,v6e", "v6e is not installed: uv sync --extra target-tpu brings"),
        ("a100,v5e", "a100 and v5e is not installed: uv sync --extra target-cuda --extra target-tpu brings"),
    ],
)
def test_a_compiler_that_is_missing_is_one_line_with_the_command(monkeypatch, names, command):
    monkeypatch.setattr(targets, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=command):
        absent_table(tiny(), parse_targets(names))
    monkeypatch.setattr(targets, "find_spec", lambda package: object())
    check_compilers(parse_targets(names))


PROGRAM = """
  %all-reduce.1 = f32[8]{0} all-reduce(%a), channel_id=1, replica_groups={{0,4,8,12},{1,5,9,13},{2,6,10,14},{3,7,11,15}}
  %fusion = f32[8]{0} fusion(%all-reduce.1), kind=kLoop
  %b = (f32[8]{0}, f32[8]{0}) all-reduce-start(%a), channel_id=2, replica_groups=[4,4]<=[16], to_apply=%add
  %c = f32[8]{0} all-reduce-done(%b)
  ROOT %d = f32[8]{0} all-reduce(%c), channel_id=3, replica_groups=[4,4]<=[4,4]T(1,0), use_global_device_ids=true
  %e = f32[8]{0} all-reduce(%c), channel_id=4, replica_groups=mesh['x'=4,'y'=4] {'y'}, use_global_device_ids=true
  %f = f32[8]{0} all-reduce(%c), channel_id=4, replica_groups=mesh['x'=4,'y'=4] {'y'}, use_global_device_ids=true
  %g = f32[8]{0} all-gather(%c), channel_id=5, replica_groups=mesh['x'=16] {'x':(1)4}, dimensions={0}
  %h = f32[8]{0} all-gather(%c), channel_id=6, replica_groups=mesh['x'=16] {'x':(4)4}, dimensions={0}
  %i = f32[8]{0} reduce-scatter(%c), channel_id=7, replica_groups={}, dimensions={0}
  %j = f32[8]{0} collective-permute(%c), channel_id=8, source_target_pairs={{0,4},{4,8},{8,12},{12,0}}
  %k = f32[8]{0} collective-permute(%c), source_target_pairs={{0,1},{5,6}}, metadata={op_name="all-gather(x)"}
  %l = f32[8]{0} all-to-all(%c), channel_id=9, replica_groups=as nobody wrote it before
  %m = f32[8]{0} all-to-all(%c), channel_id=10, replica_groups=[2,2,4]<=[4,4], dimensions={0}
  %n = f32[8]{0} all-to-all(%c), channel_id=11, replica_groups=mesh['x'=16] {'x':(1)2,'x':(4)2}, dimensions={0}
"""


def test_collectives_are_counted_by_kind_and_axis():
    """Device 4 i + j is at (i, j) of the mesh: every way of writing groups is read, and what is copied counts once."""
    assert collectives(PROGRAM, {"data": 4, "block": 4}) == {
        "all-gather over block": 1,
        "all-gather over data": 1,
        "all-reduce over block": 2,
        "all-reduce over data": 2,
        "all-to-all over block": 1,
        "all-to-all over unknown axes": 2,
        "collective-permute over block": 1,
        "collective-permute over data": 1,
        "reduce-scatter over data and block": 1,
    }
    assert collectives("%a = f32[8]{0} add(%b, %c)", {"data": 4, "block": 4}) == {}


class Compiled:
    """As a compiler would answer: a MiB of each, of two the results."""

    def __init__(self, scale: int = 1):
        mib = scale * 2**20
        self.analysis = SimpleNamespace(
            argument_size_in_bytes=10 * mib, output_size_in_bytes=4 * mib, alias_size_in_bytes=3 * mib,
            temp_size_in_bytes=20 * mib, peak_memory_in_bytes=30 * mib, generated_code_size_in_bytes=mib,
        )  # fmt: skip
        self.cost = {"flops": 197e9 * scale, "bytes accessed": 81.9e6}

    def memory_analysis(self):
        return self.analysis

    def cost_analysis(self):
        return self.cost

    def as_text(self):
        return PROGRAM


def test_the_table_has_what_the_compiler_says(monkeypatch, capsys):
    """Of a program made up for the purpose: 10 + 4 - 3 + 20 MiB and itself; a millisecond of products on a v5e."""
    asked = []

    def estimate(entry, config, card, devices):
        asked.append((config.num_blocks, len(devices)))
        if config.model_type == "vit":
            return "RESOURCE_EXHAUSTED: it needs 192.00G of 15.75G"
        return read_estimate(Compiled(1 if config.num_blocks > 1 else 1000), {"data": 4, "block": 4}, idle=2**20)

    monkeypatch.setattr(absent, "check_compilers", lambda _: None)
    monkeypatch.setattr(absent, "devices_of", lambda target: [jax.devices()[0]] * target.count)
    monkeypatch.setattr(absent, "estimate", estimate)
    result = absent_table(tiny(num_blocks=2), parse_targets("v5e:4x4,h100"), gib=0.033)
    assert {count for _, count in asked} == {16, 1}
    found = result["targets"]["v5e:4x4"]
    row = found["rows"]["DiffusionBlocks"]
    assert (row["total"], row["collectives"]["all-reduce over data"]) == (31 * 2**20, 2)
    assert row["seconds_at_least"] == pytest.approx(1e-3)  # 197e9 operations; the bytes would take a tenth of that
    assert result["targets"]["h100"]["rows"]["DiffusionBlocks"]["seconds_at_least"] == pytest.approx(197 / 494.7e3)
    assert found["fits"] == {
        "plain": False, "plain + remat": False, "DiffusionBlocks": True, "DiffusionBlocks + remat": True,
        "smallest_b": 2, "smallest_b_with_remat": 2,
    }  # fmt: skip
    told = capsys.readouterr().out.splitlines()
    assert next(line.split() for line in told if line.startswith("v5e:4x4 DiffusionBlocks ")) == [
        "v5e:4x4", "DiffusionBlocks", "10.0", "20.0", "3.0", "31.0", "-", "30.0", "1.0", "1.0",
        "197.0", "0.08", "1.000",
    ]  # fmt: skip
    assert any(line.startswith("v5e:4x4 plain ") and "does not fit: RESOURCE_EXHAUSTED" in line for line in told)
    assert any("DiffusionBlocks: 1 all-gather over block, " in line for line in told)
    assert "h100: DiffusionBlocks: num_blocks=2 is the smallest that fits" in told
    assert any(line.startswith("Estimates for devices that are not here, by jax ") for line in told)


def test_without_gib_the_card_is_asked(monkeypatch, capsys):
    mib = 2**20
    row = Estimate(
        arguments=0, temporaries=0, aliases=0, total=15 * 1024 * mib, peak=0, program=512 * mib, idle=0,
        operations=None, moved=None, collectives={}, loops=1,
    )  # fmt: skip
    monkeypatch.setattr(absent, "check_compilers", lambda _: None)
    monkeypatch.setattr(absent, "devices_of", lambda target: jax.devices()[:1])
    monkeypatch.setattr(absent, "estimate", lambda entry, config, card, devices: row)
    fits = absent_table(tiny(), parse_targets("v5e"))["targets"]["v5e"]
    assert fits["gib"] == 15.75 and all(fits["fits"].values()) and "smallest_b" not in fits["fits"]
    assert fits["rows"]["plain"]["seconds_at_least"] is None
    assert "of one round" in capsys.readouterr().out
    one_more = replace(row, idle=256 * mib + 1)
    monkeypatch.setattr(absent, "estimate", lambda entry, config, card, devices: one_more)
    assert not any(absent_table(tiny(), parse_targets("v5e"))["targets"]["v5e"]["fits"].values())


needs_compilers = pytest.mark.skipif(
    not all(targets._is_installed(platform) for platform in targets.COMPILERS), reason="needs both target extras"
)


@pytest.fixture
def compiling(monkeypatch):
    """As `launch.py --target` prepares it, but that JAX has started: it did so for the CPU alone."""
    for name, value in targets.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    prepare_environment()
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", kept)


@needs_compilers
@pytest.mark.parametrize("name", ["h100", "a100", "v5e", "v6e", "v5p", "h100:2x2x4", "v5e:4x4"])
def test_compilers_take_the_cards_for_devices(compiling, name):
    [target] = parse_targets(name)
    devices = devices_of(target)
    assert len(devices) == target.count
    assert target.platform == "tpu" or devices[0].device_kind == target.about["name"]


@needs_compilers
def test_a_topology_that_the_compiler_refuses_is_one_line(compiling):
    with pytest.raises(UserError, match=r"^the compiler knows no target v5e:3x3 \(.*\)$"):
        devices_of(parse_targets("v5e:3x3")[0])


@pytest.mark.long
@needs_compilers
@pytest.mark.parametrize("sharing", ["shared", "isolated"])
@pytest.mark.parametrize("name", ["v5e:4x4", "h100:1x2x8"])
def test_what_a_step_trains_comes_out_where_it_came_in_on_devices_that_are_not_here(compiling, name, sharing):
    """A TPU's compiler would leave 30 of 86 arrays spread over the data's devices, and could then not reuse them."""
    devices = devices_of(parse_targets(name)[0])
    card = Card(("a", "b", "c", "d"), (8, 8, 1), (0.5,), (0.25,))
    wanted = wanted_step(CLASSIFY, tiny(block_parallel=True, sharing=sharing), card, devices)
    assert dict(wanted.mesh.shape) == {"data": 4, "block": 4}
    compiled = wanted.compile()
    leaves = jax.tree.leaves(wanted.parts)
    came_out = jax.tree.leaves(compiled.output_shardings[0])
    for leaf, after in zip(leaves, came_out, strict=True):
        assert after.is_equivalent_to(leaf.sharding, leaf.ndim)
    assert compiled.as_text().count("-alias)") == len(leaves)  # each takes the place of what came in
    found = read_estimate(compiled, dict(wanted.mesh.shape), idle=0)
    between = {what for what in found.collectives if "block" in what}
    assert between == (set() if sharing == "isolated" else {"all-reduce over block"})

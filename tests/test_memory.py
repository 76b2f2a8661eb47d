"""The memory table: exact where it can be counted, bounded where XLA decides."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from configs import dit_digits
from dblocks_jax.fields import classify
from dblocks_jax.modes import memory
from dblocks_jax.modes.memory import Memory, formula_bytes, memory_table, step_memory
from dblocks_jax.modes.program import WantedStep
from dblocks_jax.run.devices import naming_lack_of_memory
from dblocks_jax.run.errors import UserError
from dblocks_jax.tasks.generate.task import GENERATE


def sized(**changes):
    """A model whose activations outweigh everything else: 4 layers, 17 tokens, MLP 512 wide, 64 images."""
    config = classify.get_config()
    config.update(
        dataset="digits", image_size=8, patch_size=2, num_layers=4, num_blocks=4, hidden_size=12, num_heads=2,
        intermediate_size=512, batch_size=64, idle_blocks="host", pool="mean",
    )  # fmt: skip
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def rows():
    return memory_table(sized())["rows"]


@pytest.mark.long
def test_parameters_and_moments_are_counted_exactly(rows):
    """By hand: a layer has 4 d^2 + 2 d m weights, 5 d + m biases, 4 d of norms; a conditioned one 6 d k + 6 d more."""
    d, m, k, labels, tokens = 12, 512, 2, 10, 17
    layer = 4 * d * d + 2 * d * m + 5 * d + m + 4 * d
    common_part = (4 * d + d) + tokens * d + 2 * d + (labels * d + labels)
    plain = common_part + d + 4 * layer
    noise = (256 * k + k) + (k * k + k)
    active = common_part + labels * d + noise + (2 * d * k + 2 * d) + (layer + 6 * d * k + 6 * d)
    for name, count, parts in (("plain", plain, 1), ("DiffusionBlocks", active, 2)):
        assert rows[name]["parameters"] == rows[name]["gradients"] == 4 * count
        assert rows[name]["optimizer"] == 8 * count + 4 * parts  # two moments, and a step count for each part
        assert rows[name]["idle"] == 0


def small_generator():
    config = dit_digits.get_config()
    config.update(num_layers=2, num_blocks=2, grow_at=(), hidden_size=12, num_heads=2, intermediate_size=16)
    return config


def test_averages_are_counted_as_the_parameters_are(monkeypatch):
    """Without compiling: of what is counted by shapes alone."""
    analysis = SimpleNamespace(**{f"{kind}_size_in_bytes": 0 for kind in ("argument", "output", "alias", "temp")})
    monkeypatch.setattr(WantedStep, "compile", lambda self: SimpleNamespace(memory_analysis=lambda: analysis))
    for ema_decay, copies in ((0.0, 0), (0.9, 1)):
        config = small_generator()
        config.ema_decay = ema_decay
        found = step_memory(GENERATE, config, GENERATE.card_without_data(config))
        assert found.averages == copies * found.parameters and found.parameters > 0


@pytest.mark.long
def test_averages_are_one_more_copy_of_the_parameters_where_they_are_kept():
    config, found = small_generator(), {}
    for ema_decay in (0.0, 0.9):
        config.ema_decay = ema_decay
        found[ema_decay] = step_memory(GENERATE, config, GENERATE.card_without_data(config))
    without, with_averages = found.values()
    assert with_averages.averages == with_averages.parameters == without.parameters and without.averages == 0
    assert with_averages.total >= without.total + with_averages.averages
    # Of the block that waits: itself, two moments, the count of its steps, and its average.
    waits = without.idle - 4
    assert waits % 3 == 0 and with_averages.idle == 4 + waits // 3 * 4


def test_the_table_has_averages_where_there_are_some(monkeypatch, capsys):
    made_up = Memory(parameters=1, optimizer=2, gradients=1, activations=4, averages=1, total=9, idle=0)
    monkeypatch.setattr(memory, "step_memory", lambda *_: made_up)
    assert memory_table(sized(ema_decay=0.9))["rows"]["plain"]["formula"] == 5 * 1 + 4
    with_averages = capsys.readouterr().out
    monkeypatch.setattr(memory, "step_memory", lambda *_: replace(made_up, averages=0))
    assert memory_table(sized())["rows"]["plain"]["formula"] == 4 * 1 + 4
    without = capsys.readouterr().out
    assert " averages " in with_averages and "(5P + A) / B" in with_averages
    assert " averages " not in without and "(4P + A) / B" in without


@pytest.mark.long
def test_a_block_needs_its_share_of_the_activations(rows):
    """Layers keep as much as they like, the same each, and one being worked on has at most three such arrays more."""
    ratio = rows["DiffusionBlocks"]["total"] / rows["plain"]["total"]
    assert 1 / (4 + 3) < ratio < (1 + 3) / (4 + 3)
    assert rows["plain + remat"]["total"] < rows["plain"]["total"]
    assert rows["DiffusionBlocks + remat"]["total"] < rows["plain + remat"]["total"]
    for row in rows.values():
        assert row["total"] >= row["parameters"] + row["optimizer"] + row["gradients"] + row["activations"]


def test_what_fits_and_the_smallest_number_of_blocks_that_does(monkeypatch, capsys):
    """A step made up for the purpose: a GiB of activations for each layer, half as much with remat."""
    asked = []

    def step_memory(entry, config, card):
        asked.append(config.num_blocks)
        layers = config.num_layers // (config.num_blocks if config.model_type == "dblock" else 1)
        total = layers * 2**30 // (2 if config.gradient_checkpointing else 1)
        return Memory(parameters=0, optimizer=0, gradients=0, activations=total, averages=0, total=total, idle=0)

    monkeypatch.setattr(memory, "step_memory", step_memory)
    fits = memory_table(sized(num_blocks=2), gib=2.0)["fits"]
    assert fits == {
        "plain": False, "plain + remat": True, "DiffusionBlocks": True, "DiffusionBlocks + remat": True,
        "smallest_b": 2, "smallest_b_with_remat": 1,
    }  # fmt: skip
    assert "DiffusionBlocks: num_blocks=2 is the smallest that fits" in capsys.readouterr().out
    assert memory_table(sized(), gib=0.25)["fits"]["smallest_b"] is None
    assert memory_table(sized(sharing="isolated", train_blocks=(3,)), gib=2.0)["fits"]["smallest_b"] == 2
    assert "nothing fits" in capsys.readouterr().out
    assert max(asked) == 4


def test_the_formula_is_the_papers():
    plain = Memory(parameters=100, optimizer=200, gradients=100, activations=800, averages=0, total=1200, idle=0)
    rows = {"plain": plain, "DiffusionBlocks": plain}
    assert formula_bytes(rows, "plain", 3) == 1200 and formula_bytes(rows, "DiffusionBlocks", 3) == 400


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": 5}, "num_blocks=5 must divide num_layers=12"),
        ({"dataset": "folder", "data_dir": "nowhere"}, "there is no folder nowhere"),
        ({"dataset": "digit"}, "did you mean 'digits'"),
    ],
)
def test_mistakes_are_named(changes, message):
    config = classify.get_config()
    config.update(changes)
    with pytest.raises(UserError, match=message):
        memory_table(config)


def test_a_device_with_too_little_memory_is_one_line():
    one_line = r"^a device has too little memory: try a smaller batch_size.*--mode=memory[^\n]*$"
    with pytest.raises(UserError, match=one_line), naming_lack_of_memory():
        jax.block_until_ready(jnp.zeros((2**45,), jnp.float32))

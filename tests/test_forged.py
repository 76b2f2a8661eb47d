"""Checkpoints, configs and exports whose maker meant harm: well-formed, their checksums right, their fields not."""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from runs import TINY

from configs import dblock_digits, dit_digits, mask_text, next_text, recurrent_text
from dblocks_jax.data.vocabulary import letters
from dblocks_jax.fields import classify, generate, mask, next_token, recurrent
from dblocks_jax.modes import load
from dblocks_jax.modes.load import load_run
from dblocks_jax.modes.merge import merge
from dblocks_jax.modes.train import train
from dblocks_jax.run.checkpoint import Checkpoints, saved_steps
from dblocks_jax.run.checks import check_fields
from dblocks_jax.run.errors import UserError
from dblocks_jax.run.workdir import METRICS, scores, write_json
from dblocks_jax.tasks.classify import config as classify_fields
from dblocks_jax.tasks.gaussian import GUIDANCE
from dblocks_jax.tasks.gaussian import TYPES as GAUSSIAN
from dblocks_jax.tasks.generate import config as generate_fields
from dblocks_jax.tasks.images import TYPES as IMAGES
from dblocks_jax.tasks.mask import config as mask_fields
from dblocks_jax.tasks.next_token import config as next_token_fields
from dblocks_jax.tasks.recurrent import config as recurrent_fields
from dblocks_jax.tasks.table import TASKS, entry_of
from dblocks_jax.tasks.text import TYPES as TEXT
from dblocks_jax.tasks.text_order import TYPES as IN_ORDER
from dblocks_jax.training import config as common_fields
from dblocks_jax.training.setting import fresh_parts

STEP = 7
CARD = {"class_names": list("0123456789"), "image_shape": [8, 8, 1], "mean": [0.5], "std": [0.5], "images": 1437}
TEXT_CARD = {"vocabulary": letters().to_dict(), "length": 8, "crc32": 1, "images": 1000}
CONFIGS = {
    "classify": dblock_digits,
    "generate": dit_digits,
    "mask": mask_text,
    "next_token": next_text,
    "recurrent": recurrent_text,
}
CARDS = {"classify": CARD, "generate": CARD, "mask": TEXT_CARD, "next_token": TEXT_CARD, "recurrent": TEXT_CARD}
ITS_OWN = {
    "recurrent": {"num_layers": 3, "prelude_layers": 1, "coda_layers": 1, "num_blocks": 1}
}  # sizes it insists on


def tiny(of: ConfigDict, **fields: object) -> ConfigDict:
    of.update(TINY | ITS_OWN.get(of.task, {}) | fields)
    return of


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, Path]:
    """A run of each task, saved and never trained."""
    folders = {}
    for config in (
        tiny(dblock_digits.get_config()),
        tiny(dit_digits.get_config(), grow_at=(), ema_decay=0.0),
        tiny(mask_text.get_config(), grow_at=(), ema_decay=0.0, text_length=8),
        tiny(next_text.get_config(), grow_at=(), text_length=8),
        tiny(recurrent_text.get_config(), text_length=8),
    ):
        folder, entry, card = tmp_path_factory.mktemp(config.task), entry_of(config), CARDS[config.task]
        write_json(folder / "config.json", config.to_dict())
        with Checkpoints(folder) as checkpoints:
            parts = fresh_parts(entry, config, entry.make(config, entry.card(card)))
            checkpoints.save(STEP, parts, {"config": config.to_dict(), "data": card})
        folders[config.task] = folder
    return folders


def forge(sound: Path, folder: Path, change: Callable[[dict], object]) -> Path:
    """A copy whose checkpoint tells something else of its run, under the right checksum."""
    shutil.copytree(sound, folder)
    path = folder / "state" / str(STEP) / "run" / "metadata"
    record = json.loads(path.read_text())
    change(record["run"])
    record["checksums"]["run"] = zlib.crc32(json.dumps(record["run"], sort_keys=True).encode())
    path.write_text(json.dumps(record))
    (folder / "config.json").write_text(json.dumps(record["run"].get("config", {})))
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_a_sound_run_is_what_the_forged_ones_differ_from(sound, task):
    trained, _ = load_run(sound[task], checkpoint="best")
    assert trained.step == STEP
    with Checkpoints(sound[task], read_only=True) as checkpoints:
        config = trained.config
        fresh = fresh_parts(trained.entry, config, trained.task)
        saved = checkpoints.restore(STEP, fresh)
    for name, part in saved.items():
        jax.tree.map(np.testing.assert_array_equal, part.params, trained.params[name])


@pytest.mark.parametrize("task", TASKS)
def test_no_field_of_another_type_gets_past_the_check(task):
    """Each field of a config, with each type that is not its own; and missing."""
    entry = TASKS[task]
    sound = tiny(CONFIGS[task].get_config())
    entry_of(sound)
    common_fields.check_config(entry, sound)
    kinds = {int: (int,), float: (int, float), bool: (bool,), str: (str,), tuple: (list, tuple)}
    wrong = ["7", "", 7, 7.5, True, None, [], [[7]], {"a": 1}, 10**400]
    for field in sound:
        own = kinds[type(sound[field])]
        for value in [each for each in wrong if type(each) not in own]:
            config = ConfigDict({**sound.to_dict(), field: value})
            with pytest.raises(UserError, match=field):
                common_fields.check_config(entry_of(config), config)
        if field != "task":
            config = ConfigDict({name: value for name, value in sound.to_dict().items() if name != field})
            with pytest.raises(UserError, match=f"no field {field}"):
                common_fields.check_config(entry, config)


@pytest.mark.parametrize(
    ("fields", "all_types"),
    [
        (classify, (GAUSSIAN, GUIDANCE, IMAGES, classify_fields.TYPES)),
        (generate, (GAUSSIAN, GUIDANCE, IMAGES, generate_fields.TYPES)),
        (mask, (TEXT, mask_fields.TYPES)),
        (next_token, (GAUSSIAN, TEXT, IN_ORDER, next_token_fields.TYPES)),
        (recurrent, (GAUSSIAN, TEXT, IN_ORDER, recurrent_fields.TYPES)),
    ],
    ids=TASKS,
)
def test_every_field_has_a_type_or_choices_of_the_kind_of_its_default(fields, all_types):
    kinds = {}
    for types in (common_fields.TYPES, *all_types):
        kinds |= {name: kind for kind, names in types.items() for name in names}
    for name, default in fields.get_config().items():
        assert name == "task" or kinds.get(name, str) is type(default), name


def test_whole_numbers_too_large_for_an_array_are_refused():
    types = {int: ("n",), float: ("x",)}
    check_fields(ConfigDict({"n": 2**32 - 1, "x": -(2**32 - 1)}), types=types)
    for name in ("n", "x"):
        with pytest.raises(UserError, match=f"{name} must be at most"):
            check_fields(ConfigDict({"n": 1, "x": 1} | {name: 10**400}), types=types)


HOSTILE: dict[str, tuple[Callable[[dict], object], str]] = {
    "a number that is a text": (lambda run: run["config"].update(hidden_size="12"), "hidden_size must be a whole num"),
    "half a head": (lambda run: run["config"].update(num_heads=1.5), "num_heads must be a whole number"),
    "a batch of 2.5": (lambda run: run["config"].update(eval_batch_size=2.5), "eval_batch_size must be a whole number"),
    "a folder that is a list": (lambda run: run["config"].update(data_dir=["/"]), "data_dir must be a text"),
    "a folder with a NUL": (lambda run: run["config"].update(data_dir="a\0b"), "data_dir holds a NUL"),
    "a task that is a table": (lambda run: run["config"].update(task={"a": 1}), "choose one of classify, generate"),
    "a name with dots": (lambda run: run["config"].update({"a.b": 1}), "cannot be used"),
    "a name of Python's": (lambda run: run["config"].update(__class__=1), "cannot be used"),
    "no config": (lambda run: run.pop("config"), "cannot be used"),
    "a config that is a list": (lambda run: run.update(config=[1]), "cannot be"),
    "no data": (lambda run: run.pop("data"), "cannot be used"),
    "a step too few": (lambda run: run["config"].update(num_layers=4), "does not fit this model"),
}
OF_CLASSES: dict[str, tuple[Callable[[dict], object], str]] = {
    "classes that are numbers": (lambda run: run["data"].update(class_names=[1, 2]), "class_names that are no names"),
    "classes that no array belongs to": (
        lambda run: run["data"].update(class_names=["x"] * 10**5),
        "does not fit this model",
    ),
}
OF_TEXT: dict[str, tuple[Callable[[dict], object], str]] = {
    "a length that is a text": (lambda run: run["data"].update(length="8"), "its length is no number of symbols"),
    "a length beyond all": (lambda run: run["data"].update(length=10**9), "its length is no number of symbols"),
    "letters that are others": (
        lambda run: run["data"]["vocabulary"].update(symbols=["x"] * 27),
        "its letters are not space and a to z",
    ),
    "symbols that no array belongs to": (
        lambda run: run["data"].update(vocabulary={"kind": "characters", "symbols": ["a", "\ufffd"], "bpe": ""}),
        "does not fit this model",
    ),
    "a vocabulary that is a number": (lambda run: run["data"].update(vocabulary=7), "cannot be used"),
    "shares that overlap by less than nothing": (lambda run: run["config"].update(gamma=-0.5), "gamma must lie in"),
    "no steps of the sampler": (lambda run: run["config"].update(num_inference_steps=0), "num_inference_steps must be"),
}
OF_TASK = {"classify": HOSTILE | OF_CLASSES, "generate": HOSTILE | OF_CLASSES, "mask": HOSTILE | OF_TEXT}


@pytest.mark.parametrize(("task", "what"), [(task, what) for task, of_task in OF_TASK.items() for what in of_task])
def test_a_forged_checkpoint_is_answered_in_words(sound, tmp_path, task, what):
    change, message = OF_TASK[task][what]
    folder = forge(sound[task], tmp_path / "run", change)
    with pytest.raises(UserError, match=message):
        load_run(folder, checkpoint="best")


def test_a_model_larger_than_memory_is_refused_before_any_of_it_exists(sound, tmp_path, monkeypatch):
    """The check of the config counts layers; embeddings of the classes of a forged data card come on top."""
    folder = forge(sound["classify"], tmp_path / "run", lambda run: None)
    monkeypatch.setattr(Checkpoints, "restore_params", lambda *_: pytest.fail("it was going to be read"))
    available = 12 * 3729  # bytes: the tiny model has one parameter more
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": available}[name])
    monkeypatch.setattr(load, "check_config", lambda entry, config: None)
    with pytest.raises(UserError, match=r"needs .* of the host's memory"):
        load_run(folder, checkpoint="best")


def test_scores_on_record_that_no_float_can_hold_are_left_out(tmp_path):
    lines = [
        {"step": 1, "split": "val", "top1": 10**400},
        {"step": 2, "split": "val", "top1": 0.5},
        {"step": 3, "split": "val", "top1": -(10**400)},
    ]
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert scores(tmp_path, "val", "top1") == {2: 0.5}


@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
@pytest.mark.parametrize("file", ["run/metadata", "params/manifest.ocdbt", "_CHECKPOINT_METADATA"])
def test_a_checkpoint_that_holds_a_pipe_or_a_device_is_not_waited_for(sound, tmp_path, put, file):
    folder = forge(sound["classify"], tmp_path / "run", lambda run: None)
    path = folder / "state" / str(STEP) / file
    path.unlink()
    put(path)
    with pytest.raises(UserError, match=f"is damaged.*{path.name} is not a regular file"):
        load_run(folder, checkpoint="best")


def test_folders_that_are_nearly_named_like_a_step_are_none(sound, tmp_path):
    folder = forge(sound["classify"], tmp_path / "run", lambda run: None)
    for name in ("007", "\N{ARABIC-INDIC DIGIT NINE}", "9" * 200, "-9", "9.5"):
        (folder / "state" / name).mkdir()
    assert saved_steps(folder) == [STEP]
    assert load_run(folder, checkpoint="last")[0].step == STEP


@pytest.mark.parametrize("change", ["a number that is a text", "no data", "a task that is a table"])
def test_what_is_merged_or_begun_from_may_be_forged_too(sound, tmp_path, change):
    folder = forge(sound["classify"], tmp_path / "run", HOSTILE[change][0])
    with pytest.raises(UserError, match=r"cannot be used|whole number|choose one of"):
        merge([folder], tmp_path / "merged", command=[])
    config = tiny(dblock_digits.get_config(), begin_from=str(folder))
    with pytest.raises(UserError, match=r"cannot be used|whole number|of the task"):
        train(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()

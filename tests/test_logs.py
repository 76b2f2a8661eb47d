"""What a run tells while it trains: files, services, and the terminal."""

import os
import pty
import struct
import sys
from pathlib import Path

import pytest
from runs import command, logged, started
from tensorboardX.proto.event_pb2 import Event

from dblocks_jax.run.errors import UserError
from dblocks_jax.run.logs import Logs, check_wandb, scalars
from dblocks_jax.training.display import clock

LINE = {
    "step": 10, "epoch": 2.5, "lr": 0.1, "images_per_second": None, "input_wait": 0.25, "memory_bytes": 7,
    "blocks": {"0": {"loss": 1.5, "ce": 1.25}, "2": {"loss": 0.5, "ce": 0.25}},
    "skipped": [{"step": 9, "block": 0, "sigma": 1.0}],
}  # fmt: skip


def read_events(folder: Path) -> list[Event]:
    """Every record of the folder's TensorBoard files: length, its checksum, data, their checksum."""
    events = []
    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[12 + length + 4 :]
    return events


def values_of(events: list[Event]) -> dict[int, dict[str, float]]:
    """Step -> name -> value, as TensorBoard shows them: a new start voids what lies at its step and beyond."""
    shown: dict[int, dict[str, float]] = {}
    for event in events:
        if event.HasField("session_log"):
            shown = {step: values for step, values in shown.items() if step < event.step}
        for value in event.summary.value:
            shown.setdefault(event.step, {})[value.tag] = value.simple_value
    return shown


def test_figures_by_name():
    assert scalars(LINE) == {
        "train/epoch": 2.5, "train/lr": 0.1, "train/input_wait": 0.25, "train/memory_bytes": 7.0,
        "train/block_0/loss": 1.5, "train/block_0/ce": 1.25, "train/block_2/loss": 0.5, "train/block_2/ce": 0.25,
        "train/skipped_steps": 1.0,
    }  # fmt: skip
    scored = {"step": 10, "split": "val", "top1": 0.5, "accuracy_by_step": [0.25, 0.5]}
    assert scalars(scored) == {"val/top1": 0.5, "val/accuracy_after_step_1": 0.25, "val/accuracy_after_step_2": 0.5}


def test_a_resumed_run_voids_what_was_logged_beyond_its_start(tmp_path):
    for start, steps in [(0, (10, 20, 30)), (20, (30, 40))]:
        logs = Logs(tmp_path, start=start, wandb=False, config={})
        for step in steps:
            logs.add(LINE | {"step": step, "lr": step + start})
        logs.close()
    shown = values_of(read_events(tmp_path / "tensorboard"))
    assert {step: values["train/lr"] for step, values in shown.items()} == {10: 10, 20: 20, 30: 50, 40: 60}
    assert shown[40]["train/block_2/ce"] == 0.25


def test_a_log_that_cannot_be_written_is_named_and_begun_anew(tmp_path, caplog):
    logs = Logs(tmp_path, start=0, wandb=False, config={})
    (tmp_path / "tensorboard").write_text("in the way")
    logs.add(LINE)
    logs.add(LINE | {"step": 20})
    (tmp_path / "tensorboard").unlink()
    logs.add(LINE | {"step": 30})
    logs.close()
    assert sum("metrics.jsonl has what is missing there" in record.message for record in caplog.records) == 1
    [unsaved] = logs.unsaved()
    assert unsaved.startswith("tensorboard: ")
    assert list(values_of(read_events(tmp_path / "tensorboard"))) == [30]
    assert [line["step"] for line in logged(tmp_path)] == [10, 20, 30]


def test_a_run_outlives_weights_and_biases(tmp_path, caplog, monkeypatch):
    """Its service is a process that signals reach too. What is logged elsewhere goes on, and the loss is named."""

    class Dying:
        def log(self, values):
            if values["step"] > 10:
                raise ConnectionResetError("gone")

    monkeypatch.setattr("dblocks_jax.run.logs._start_wandb", lambda workdir, config: Dying())
    logs = Logs(tmp_path, start=0, wandb=True, config={})
    for step in (10, 20, 30):
        logs.add(LINE | {"step": step})
    logs.close()
    assert [line["step"] for line in logged(tmp_path)] == [10, 20, 30]
    assert sum("Weights & Biases fails" in record.message for record in caplog.records) == 1
    [unsaved] = logs.unsaved()
    assert unsaved.startswith("Weights & Biases: ") and "gone" in unsaved


def test_weights_and_biases_is_asked_for_by_name_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="uv sync --extra wandb"):
        check_wandb()


@pytest.mark.parametrize(("seconds", "text"), [(0.0, "0:00:00"), (59.6, "0:01:00"), (3725.0, "1:02:05")])
def test_clock(seconds, text):
    assert clock(seconds) == text


@pytest.mark.long
def test_a_terminal_shows_the_blocks_and_gets_its_cursor_back(tmp_path):
    """One run in a terminal: a live display there, the same figures in all three logs, no secret in any."""
    pytest.importorskip("wandb")
    reader, writer = pty.openpty()
    secret = {"WANDB_MODE": "offline", "WANDB_API_KEY": "s3cret" * 7, "COLUMNS": "100", "TERM": "xterm"}
    with started(
        *command(tmp_path / "run", max_steps=20, steps_per_call=1, wandb=True), stderr=writer, **secret
    ) as process:  # fmt: skip
        os.close(writer)
        screen = read_until_closed(reader)
        process.wait(60)
    assert process.returncode == 0, screen[-2000:]
    for text in ("from the start", "DiffusionBlocks, 2 blocks", "share", "accuracy", "20/20", "test top1"):
        assert text in screen, text
    assert screen.rfind("\x1b[?25h") > screen.rfind("\x1b[?25l") > -1  # shown again after it was hidden

    lines = logged(tmp_path / "run")
    shown = values_of(read_events(tmp_path / "run" / "tensorboard"))
    windows = [line for line in lines if "blocks" in line]
    assert [line["step"] for line in windows] == [5, 10, 15, 20]
    for line in windows:
        for block, means in line["blocks"].items():
            for name, mean in means.items():
                assert shown[line["step"]][f"train/block_{block}/{name}"] == pytest.approx(mean, rel=1e-6)
        assert line["memory_bytes"] > 1e7
    assert shown[20]["test/top1"] == pytest.approx(lines[-1]["top1"])
    [offline] = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    content = offline.read_bytes()
    assert b"train/block_1/ce" in content and b"test/accuracy_after_step_2" in content
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or b"s3cret" not in path.read_bytes(), path


def read_until_closed(reader: int) -> str:
    """What appears in a terminal until nobody holds it open."""
    parts = []
    try:
        while part := os.read(reader, 65536):
            parts.append(part)
    except OSError:  # Linux says so when the last writer is gone
        pass
    os.close(reader)
    return b"".join(parts).decode(errors="replace")

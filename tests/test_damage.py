"""Checkpoints that are damaged and disks that fail: what is wrong is said, and nothing sound is lost."""

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from runs import command, files_of_at_most, finish, logged, result_of, saved_steps, wait_until
from saved import state_of

from configs import dblock_digits
from dblocks_jax.modes.compare import compare
from dblocks_jax.modes.export import export_run
from dblocks_jax.modes.load import load_run
from dblocks_jax.modes.merge import merge
from dblocks_jax.modes.predict import predict
from dblocks_jax.modes.report import report
from dblocks_jax.modes.train import train
from dblocks_jax.pages.template import write_page
from dblocks_jax.run import files
from dblocks_jax.run import workdir as run_folder
from dblocks_jax.run.checkpoint import Checkpoints
from dblocks_jax.run.errors import Unsaved, UserError
from dblocks_jax.run.workdir import Journal
from dblocks_jax.training import loop as trainer
from dblocks_jax.training.optimizer import Part, new_part

# When one file cannot be read, TensorStore's other reads find Orbax's event loop closed; launch.py hides that.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TINY = {
    "num_layers": 2, "hidden_size": 12, "num_heads": 2, "intermediate_size": 16, "num_blocks": 2, "batch_size": 600,
    "num_epochs": 2, "save_every_n_epochs": 1, "log_every_n_steps": 1, "num_warmup_steps": 0,
}  # fmt: skip
RUN = {"config": {"lr": 0.1, "name": "digits"}, "data": {"images": 3}}


def tiny(**changes):
    config = dblock_digits.get_config()
    config.update(TINY | changes)
    return config


def run(config, workdir: Path) -> dict:
    return train(config, workdir, command=[], overrides={})


def parts_of(step: int, width: int = 3) -> dict[str, Part]:
    """Arrays that differ from step to step, moments included."""
    rng = np.random.default_rng(step)
    params = {"shared": {"w": jnp.asarray(rng.normal(size=(20, width)), jnp.float32)}}
    params["block_0"] = {"b": jnp.asarray(rng.normal(size=4), jnp.float32)}
    parts = {name: new_part(p) for name, p in params.items()}
    return {
        name: Part(part.params, part.adam._replace(mu=jax.tree.map(jnp.sin, part.params), count=part.adam.count + step))
        for name, part in parts.items()
    }


def resume(workdir: Path) -> tuple[int, dict[str, Part], dict]:
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.resume(lambda step: parts_of(0), parts_of(0))


def assert_is_sound(found: tuple[int, dict[str, Part], dict], steps: tuple[int, ...]) -> int:
    """What was restored is bit for bit what was saved at one of `steps`."""
    step, parts, saved_run = found
    assert step in steps
    jax.tree.map(np.testing.assert_array_equal, parts, parts_of(step))
    assert saved_run == RUN
    return step


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """A workdir with sound checkpoints at steps 1 and 2."""
    workdir = tmp_path_factory.mktemp("two")
    with Checkpoints(workdir) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, parts_of(step), RUN)
    assert_is_sound(resume(workdir), (2,))
    return workdir


def copy(workdir: Path, to: Path) -> Path:
    shutil.copytree(workdir, to)
    return to


def files_of(workdir: Path, step: int) -> list[Path]:
    files = sorted(path.relative_to(workdir) for path in (workdir / "state" / str(step)).rglob("*") if path.is_file())
    assert len(files) > 10
    return files


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("spoil", [Path.unlink, truncate, lambda path: path.write_bytes(b"")])
def test_a_file_that_is_missing_or_cut_short_is_never_trusted(two, tmp_path, spoil, caplog):
    fallen_back = 0
    for index, name in enumerate(files_of(two, 2)):
        workdir = copy(two, tmp_path / str(index))
        spoil(workdir / name)
        caplog.clear()
        if assert_is_sound(resume(workdir), (1, 2)) == 1:  # step 2 may do without: its values are all there
            fallen_back += 1
            assert any("state/2 is damaged" in record.message for record in caplog.records)
            assert (workdir / "damaged" / "2_0").is_dir() and saved_steps(workdir) == [1]
    assert fallen_back > 5


def flip(workdir: Path, rng: random.Random) -> str:
    """Flip one bit of a file of step 2, large ones more often."""
    files = files_of(workdir, 2)
    sizes = [(workdir / file).stat().st_size for file in files]
    [name] = rng.choices(files, weights=sizes)
    content = bytearray((workdir / name).read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    (workdir / name).write_bytes(content)
    return str(name)


def flips(two: Path, tmp_path: Path, count: int, seed: int) -> int:
    """Flip so many bits, one at a time; returns how many made the checkpoint unusable."""
    rng, fallen_back = random.Random(seed), 0
    for index in range(count):
        workdir = copy(two, tmp_path / str(index))
        name = flip(workdir, rng)
        try:
            fallen_back += assert_is_sound(resume(workdir), (1, 2)) == 1
        except BaseException as error:
            error.add_note(f"seed {seed}, flip {index}, in {name}")
            raise
        shutil.rmtree(workdir)
    return fallen_back


def test_a_flipped_bit_is_noticed_or_does_no_harm(two, tmp_path):
    assert flips(two, tmp_path, 40, seed=0) > 10


@pytest.mark.long
def test_1000_flipped_bits(two, tmp_path, capsys):
    seed = random.SystemRandom().randrange(2**32)
    fallen_back = flips(two, tmp_path, 1000, seed)
    with capsys.disabled():
        print(f"\nflipped bits: 1000, of which {fallen_back} noticed and the others without effect (seed {seed})")


def put_another_array(workdir: Path, item: str) -> None:
    """One array of step 2 is written anew, by Orbax, with other values: nothing below our checksums can tell."""
    folder = (workdir / "state" / "2" / item).absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(folder)
        leaves, structure = jax.tree.flatten(tree)
        largest = int(np.argmax([np.size(leaf) for leaf in leaves]))
        leaves[largest] = leaves[largest].at[0, 0].add(1.0)
        checkpointer.save(folder, jax.tree.unflatten(structure, leaves), force=True)


def exchange(workdir: Path, item: str) -> None:
    """All of an item is that of step 1, whose arrays have the same names, shapes and types."""
    shutil.rmtree(workdir / "state" / "2" / item)
    shutil.copytree(workdir / "state" / "1" / item, workdir / "state" / "2" / item)


@pytest.mark.parametrize("item", ["params", "adam"])
@pytest.mark.parametrize("replace", [put_another_array, exchange])
def test_a_sound_array_in_the_place_of_another_is_noticed(two, tmp_path, caplog, item, replace):
    """No file is damaged: by TensorStore's checks all is well."""
    workdir = copy(two, tmp_path / "run")
    before = state_of(workdir, 2)
    replace(workdir, item)
    after = state_of(workdir, 2)  # Orbax reads it without complaint
    assert {path: value.shape for path, value in after.items()} == {path: value.shape for path, value in before.items()}
    assert any(not np.array_equal(after[path], before[path]) for path in before)
    assert_is_sound(resume(workdir), (1,))
    assert any(re.search(f"{item} of .* are not what was saved", record.message) for record in caplog.records)


def empty(workdir: Path) -> None:
    (workdir / "state" / "3").mkdir()


def a_file(workdir: Path) -> None:
    (workdir / "state" / "3").write_text("not a checkpoint")


def another_architecture(workdir: Path) -> None:
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(3, parts_of(3, width=4), RUN)


def an_older_format(workdir: Path) -> None:
    shutil.copytree(workdir / "state" / "2", workdir / "state" / "3")
    (workdir / "state" / "3" / "run" / "metadata").write_text(json.dumps(RUN))


@pytest.mark.parametrize(
    ("add", "reason"),
    [
        (empty, "state/3 is damaged"),
        (a_file, "state/3 is damaged"),
        (another_architecture, "shared/w: expected float32[20, 3], found float32[20, 4]"),
        (an_older_format, "state/3 has format 1, but this version of the program reads format 3"),
    ],
)
def test_what_is_no_checkpoint_of_this_run_is_named_and_set_aside(two, tmp_path, caplog, add, reason):
    workdir = copy(two, tmp_path / "run")
    add(workdir)
    assert_is_sound(resume(workdir), (2,))
    assert any(reason in record.message for record in caplog.records)
    assert saved_steps(workdir)[-1] == 2 and (workdir / "damaged" / "3_0").exists()
    with Checkpoints(workdir) as checkpoints:  # its place is free again
        checkpoints.resume(lambda step: parts_of(0), parts_of(0))
        checkpoints.save(3, parts_of(3), RUN)
    assert_is_sound(resume(workdir), (3,))


def test_without_a_sound_checkpoint_nothing_starts_and_nothing_is_moved(two, tmp_path):
    workdir = copy(two, tmp_path / "run")
    for step in (1, 2):
        (workdir / "state" / str(step) / "run" / "metadata").write_text("{")
    with pytest.raises(UserError) as error:
        resume(workdir)
    message = str(error.value)
    assert "state/2 is damaged" in message and "state/1 is damaged" in message and "to start anew" in message
    assert saved_steps(workdir) == [1, 2] and not (workdir / "damaged").exists()


def test_a_run_goes_on_from_the_checkpoint_before_and_ends_in_the_same_bits(tmp_path, monkeypatch):
    expected = run(tiny(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        make = trainer.make_feed
        patch.setattr(trainer, "make_feed", lambda *args, **kwargs: Failing(make(*args, **kwargs), 6))
        with pytest.raises(ZeroDivisionError):
            run(tiny(), tmp_path / "cut")
    assert saved_steps(tmp_path / "cut") == [4, 6]
    for path in (tmp_path / "cut" / "state" / "6" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    result = run(tiny(), tmp_path / "cut")
    assert result["steps_run"] == 4 and "unsaved" not in result
    assert result["cross_entropy"] == expected["cross_entropy"]
    states = [state_of(tmp_path / name, 8) for name in ("whole", "cut")]
    for path, value in states[0].items():
        np.testing.assert_array_equal(states[1][path], value, err_msg=path)
    assert [line["step"] for line in logged(tmp_path / "cut") if "blocks" in line] == list(range(1, 9))


class Failing:
    """A feed that fails at a position, as a crash would."""

    def __init__(self, feed, position: int):
        self._feed = feed
        self._position = position
        self.most = 1

    def __getattr__(self, name: str):
        return getattr(self._feed, name)

    def take(self, position: int, count: int):
        if position >= self._position:
            raise ZeroDivisionError
        return self._feed.take(position, count)


# Disks.


def spoil_during(monkeypatch, at_step: int, spoil, mend_at: int = 0, mend=lambda: None) -> None:
    """Do something to the disk when the run takes its images for a step."""
    make = trainer.make_feed

    def make_feed(*args, **kwargs):
        feed = make(*args, **kwargs)
        take = feed.take

        def take_and_spoil(position, count):
            if position == at_step:
                spoil()
            if mend_at and position == mend_at:
                mend()
            return take(position, count)

        feed.take = take_and_spoil
        return feed

    monkeypatch.setattr(trainer, "make_feed", make_feed)


def test_a_folder_that_cannot_be_written_does_not_end_training(tmp_path, monkeypatch, caplog):
    """The checkpoints' folder leads nowhere for a while: said at once and at the end, and what was there is intact."""
    state, aside = tmp_path / "run" / "state", tmp_path / "aside"

    def lose() -> None:
        wait_until((state / "2").is_dir)
        shutil.move(state, aside)
        state.symlink_to("/proc/self/net")  # nobody, root neither, can make a folder there

    def find() -> None:
        state.unlink()
        shutil.move(aside, state)

    with monkeypatch.context() as patch:
        spoil_during(patch, 3, lose, 6, find)
        result = run(tiny(steps_per_call=1), tmp_path / "run")
    assert result["step"] == 8 and result["checkpoint"] == 8
    [unsaved_4, unsaved_6] = result["unsaved"]
    assert unsaved_4.startswith("step 4: ") and unsaved_6.startswith("step 6: ")
    assert sum("cannot save step" in record.message for record in caplog.records) == 2
    assert saved_steps(tmp_path / "run") == [2, 8]
    expected = run(tiny(), tmp_path / "whole")
    assert result["cross_entropy"] == expected["cross_entropy"]


def test_a_run_of_which_no_checkpoint_could_be_saved_names_none(tmp_path, monkeypatch, capsys):
    """The result says what is missing, and why; nobody looks in vain for the step that it names."""
    workdir = tmp_path / "run"

    def lose() -> None:
        (workdir / "state").rmdir()
        (workdir / "state").symlink_to("/proc/self/net")

    with monkeypatch.context() as patch:
        spoil_during(patch, 0, lose)
        result = run(tiny(steps_per_call=1, num_epochs=1), workdir)
    assert result["step"] == 4 and result["checkpoint"] is None
    assert result["unsaved"][-1].startswith("step 4: ") and len(result["unsaved"][-1]) > len("step 4: ")
    with pytest.raises(Unsaved, match=r"not everything could be saved in .*run: step 2: .*; step 4: "):
        run_folder.finish(workdir, result)
    for text in (capsys.readouterr().out, (workdir / "train.json").read_text()):
        assert json.loads(text)["checkpoint"] is None


def test_after_a_save_that_failed_the_older_ones_are_there_and_can_be_read(tmp_path):
    """The one before and the best of all stay, although the failed one would have taken a place."""
    state, aside = tmp_path / "state", tmp_path / "aside"
    with Checkpoints(tmp_path, scores={1: 0.9, 2: 0.1, 3: 0.2}, save_top_k=1) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, parts_of(step), RUN)
        checkpoints.wait()
        shutil.move(state, aside)
        state.symlink_to("/proc/self/net")
        checkpoints.save(4, parts_of(4), RUN)
        wait_until(lambda: checkpoints.look() or bool(checkpoints.failed))
        state.unlink()
        shutil.move(aside, state)
        assert checkpoints.steps() == [1, 2, 3]
        assert checkpoints.best()[0] == 1
        found = checkpoints.restore_params(1, {name: part.params for name, part in parts_of(0).items()})
        np.testing.assert_array_equal(found["shared"]["w"], parts_of(1)["shared"].params["w"])
        checkpoints.save(4, parts_of(4), RUN)  # there is room again
    assert saved_steps(tmp_path) == [1, 3, 4]


def test_what_is_set_aside_finds_a_free_name(two, tmp_path):
    workdir = copy(two, tmp_path / "run")
    (workdir / "damaged" / "3_1").mkdir(parents=True)
    for name in ("3_0", "3_2"):
        empty(workdir)
        assert resume(workdir)[0] == 2
        assert (workdir / "damaged" / name).is_dir()


def test_a_workdir_that_vanishes_is_made_anew(tmp_path, monkeypatch, caplog):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoil_during(patch, 5, lambda: remove(workdir))
        result = run(tiny(steps_per_call=1), workdir)
    assert any("config.json is gone" in record.message for record in caplog.records)
    assert saved_steps(workdir) == [6, 8]
    assert all(line.startswith("step 4: ") for line in result.get("unsaved", []))  # it may have been on its way
    again = run(tiny(), workdir)
    assert again["steps_run"] == 0 and again["cross_entropy"] == result["cross_entropy"]


def remove(folder: Path) -> None:
    """Also while somebody still writes in it."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def test_lines_that_cannot_be_written_wait(tmp_path):
    path = tmp_path / "gone" / "metrics.jsonl"
    journal = Journal(path)
    for step in (1, 2):
        journal.add({"step": step})
    with pytest.raises(OSError, match="No such file"):
        journal.flush()
    path.parent.mkdir()
    journal.add({"step": 3})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}, {"step": 3}]


def can_mount() -> bool:
    test = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return (
        shutil.which("unshare") is not None and subprocess.run(test, check=False, capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not can_mount(), reason="needs a file system of its own")
@pytest.mark.long
@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_disk_that_is_full_or_read_only(tmp_path, trouble):
    """A run on a disk of its own, on which nothing can be written after its first checkpoint."""
    workdir, copied = tmp_path / "disk" / "run", tmp_path / "copied"
    workdir.parent.mkdir()
    ready = tmp_path / "ready"
    fill = "cat /dev/zero > $DISK/filling" if trouble == "full" else f"mount -t tmpfs -o ro tmpfs {workdir}/state"
    script = f"""
        DISK={workdir.parent}; mount -t tmpfs -o size=30m tmpfs $DISK
        ( while [ ! -d {workdir}/state/10 ]; do sleep 0.02; done; {fill} 2> /dev/null; touch {ready} ) &
        "$@"; code=$?; umount -q {workdir}/state; cp -r {workdir} {copied}; exit $code"""
    on_its_own = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script, "bash"]
    done = finish(*on_its_own, *command(workdir, num_epochs=1000, save_every_n_epochs=5, max_steps=80))
    assert done.returncode == 3, done.stderr
    assert ready.exists()
    assert result_of(done)["step"] == 80 and result_of(done)["unsaved"]
    lines = [line for line in done.stderr.splitlines() if "cannot save step" in line]
    assert lines and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("launch.py: ")
    newest = saved_steps(copied)[-1]
    assert 10 <= newest < 80
    assert state_of(copied, newest)  # readable, whole


def test_a_line_of_which_only_a_part_fits_leaves_the_file_as_it_was(tmp_path):
    """The system refuses files beyond 100 bytes, as a full disk would."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    append = (
        "import resource, signal; from pathlib import Path; from dblocks_jax.run.workdir import Journal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        f"Journal(Path({str(path)!r})).append({{'step': 2, 'note': 'x' * 200}})"
    )
    done = finish(sys.executable, "-B", "-c", append)  # no bytecode, which would be cut short too
    assert done.returncode == 1 and "OSError" in done.stderr
    assert path.read_text() == '{"step": 1}\n'


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run with a page, predictions and an export of earlier on."""
    workdir = tmp_path_factory.mktemp("finished")
    run_folder.finish(workdir, run(tiny(num_epochs=1), workdir))
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(workdir / "a.png")
    for name in ("report.html", "predictions.json"):
        (workdir / name).write_text("of earlier on")
    (workdir / "export").mkdir()
    (workdir / "export" / "of earlier on").touch()
    return workdir


def predict_one(config, workdir: Path, **more) -> dict:
    return predict(config, workdir, [str(workdir / "a.png")], **more)


@pytest.mark.filterwarnings("ignore:Error writing persistent compilation cache")
@pytest.mark.parametrize(
    ("mode", "written"),
    [
        (predict_one, "predictions.json"),
        pytest.param(report, "report.html", marks=pytest.mark.long),
        pytest.param(export_run, "export", marks=pytest.mark.long),
    ],
    ids=["predict", "report", "export"],
)
def test_a_mode_that_finds_no_room_says_so_and_leaves_what_was_there(finished, mode, written, capsys):
    def there() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}

    before = there()
    with files_of_at_most(500), pytest.raises(Unsaved) as error:
        mode(tiny(num_epochs=1), finished, overrides={}, checkpoint="last")
    assert str(error.value) == f"cannot write {finished / written}: File too large"
    assert Unsaved.exit_code == 3
    assert there() == before  # no half file under another name either
    assert ("step by step" in capsys.readouterr().out) == (mode is predict_one)  # its answers are shown all the same


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    files.write_whole(path, "caf\udce9")
    assert path.read_bytes() == b"caf?"
    with files_of_at_most(100), pytest.raises(OSError, match="File too large"):
        files.write_whole(path, "x" * 200)
    assert path.read_bytes() == b"caf?" and list(tmp_path.iterdir()) == [path]
    files.write_whole(path, b"x" * 200)
    assert path.read_bytes() == b"x" * 200 and list(tmp_path.iterdir()) == [path]


def test_the_result_line_on_a_full_disk(tmp_path, monkeypatch):
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        with pytest.raises(Unsaved, match="the line of the result: No space left on device"):
            run_folder.finish(tmp_path, {"mode": "memory"})
    assert json.loads((tmp_path / "memory.json").read_text()) == {"mode": "memory"}


def test_no_room_for_what_a_library_writes_is_one_line():
    with (
        pytest.raises(Unsaved, match=r"^cannot write /somewhere: No space left on device$"),
        files.naming_lack_of_room(),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere")
    with pytest.raises(FileNotFoundError), files.naming_lack_of_room():
        Path("/nowhere").read_text()


def test_a_path_that_cannot_be_is_one_line_in_whatever_mode():
    long = Path("x" * 300)
    config = dblock_digits.get_config()
    for look in (
        lambda: load_run(long, checkpoint="best"),
        lambda: compare([long], long),
        lambda: merge([long], long, command=[]),
        lambda: train(config, long),
    ):
        with pytest.raises(UserError, match=r"^cannot use x+\S*: File name too long$"), files.naming_lack_of_room():
            look()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda place: place.symlink_to("gone"), "{place} is a link to gone, which is not there"),
        (lambda place: place.touch(), "{place} is a file, not a folder"),
    ],
    ids=["dangling link", "file"],
)
@pytest.mark.parametrize("below", ["", "run"])
def test_what_lies_in_the_place_of_a_folder_is_named(tmp_path, make, why, below):
    place = tmp_path / "place"
    make(place)
    with pytest.raises(UserError) as error, run_folder.claim(place / below):
        pytest.fail("it was claimed")
    assert why.format(place=place) in str(error.value) and "File exists" not in str(error.value)
    with pytest.raises(Unsaved) as error:
        write_page(place / below / "compare.html", {"tables": [], "charts": {}, "confidence": ""})
    assert why.format(place=place) in str(error.value)

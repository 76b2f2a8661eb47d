"""Runs that are killed, stopped by signals, or started twice: each ends in the bits of a run that was left alone."""

import json
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from runs import command, finish, logged, result_of, saved_steps, started, wait_until
from saved import state_of

from configs import dblock_digits
from dblocks_jax.modes.train import train
from dblocks_jax.run.errors import Stopped, UserError
from dblocks_jax.run.stop import Stop
from dblocks_jax.run.workdir import claim
from dblocks_jax.training import loop as trainer

FEW = {"num_epochs": 20}  # 80 steps, saved and scored at every 10th
TINY = {
    "num_layers": 2, "hidden_size": 12, "num_heads": 2, "intermediate_size": 16, "num_blocks": 2, "batch_size": 600,
    "num_epochs": 2, "save_every_n_epochs": 1, "log_every_n_steps": 1, "num_warmup_steps": 0, "val_fraction": 0.1,
}  # fmt: skip
SCORES = ("checkpoint", "num_images", "top1", "top5", "macro_f1", "cross_entropy", "accuracy_by_step")


def tiny(**changes):
    config = dblock_digits.get_config()
    config.update(TINY | changes)
    return config


def run(config, workdir: Path, stop: Stop | None = None) -> dict:
    return train(config, workdir, command=[], overrides={}, stop=stop)


def assert_same_state(one: Path, other: Path, step: int) -> None:
    expected, found = state_of(one, step), state_of(other, step)
    assert expected.keys() == found.keys() and len(expected) > 50
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, dict]:
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    done = finish(*command(workdir, **FEW))
    assert done.returncode == 0, done.stderr
    return workdir, result_of(done)


def kill_at_random(workdir: Path, rng: random.Random, kills: int, **fields: object) -> list[str]:
    """Start a run again and again, and kill it at some moment of its start, its steps, its saves or evaluations.

    Returns what could be seen of each moment.
    """
    moments = []
    while len(moments) < kills:
        with started(*command(workdir, **fields)) as process:
            if rng.random() < 0.25:  # in the first seconds: imports, data, compilation
                time.sleep(rng.uniform(0.0, 5.0))
            else:  # after it has begun to train
                lines = len(logged(workdir))
                wait_until(lambda lines=lines: len(logged(workdir)) != lines or process.poll() is not None)
                time.sleep(rng.uniform(0.0, 1.0))
            is_saving = any((workdir / "state").glob("*tmp*"))
            if process.poll() is not None:
                return moments  # the run is over
            process.kill()
            moments.append("saving" if is_saving else f"step {max(saved_steps(workdir), default=0)}")
    return moments


@pytest.mark.long  # test_growing.py has one that is killed, in every run of the suite
def test_a_killed_run_ends_in_the_same_bits(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    moments = kill_at_random(workdir, random.Random(1), kills=1, **FEW)
    assert moments
    done = finish(*command(workdir, **FEW))
    assert done.returncode == 0, done.stderr
    assert_same_state(undisturbed[0], workdir, 80)
    assert {name: result_of(done)[name] for name in SCORES} == {name: undisturbed[1][name] for name in SCORES}
    assert not [path.name for path in (workdir / "state").iterdir() if not path.name.isdecimal()]  # no half ones
    steps = [line["step"] for line in logged(workdir) if "blocks" in line]
    assert steps == list(range(5, 81, 5))


def stopped(workdir: Path) -> int:
    """The step at which a signal ended a run of `FEW`, after it was saved."""
    with started(*command(workdir, **FEW, log_every_n_steps=1, save_every_n_epochs=20)) as process:
        wait_until(lambda: len(logged(workdir)) > 1)
        asked = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert time.monotonic() - asked < 10
    step = saved_steps(workdir)[-1]
    assert 0 < step < 80 and f"stopped at step {step} of 80: the same command goes on" in errors.splitlines()[-1]
    return step


def test_a_signal_saves_the_step_and_ends_with_75(tmp_path):
    stopped(tmp_path / "run")


@pytest.mark.long  # test_growing.py has one that is killed and goes on, in every run of the suite
def test_a_run_that_a_signal_ended_goes_on_to_the_same_bits(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    step = stopped(workdir)
    done = finish(*command(workdir, **FEW))
    assert done.returncode == 0, done.stderr
    assert result_of(done)["steps_run"] == 80 - step
    assert_same_state(undisturbed[0], workdir, 80)


def test_a_signal_during_compilation_ends_at_once(tmp_path):
    with started(*command(tmp_path, **FEW), JAX_COMPILATION_CACHE_DIR="") as process:
        assert process.stderr
        line = process.stderr.readline()
        while "from the start" not in line:  # the last line before the step is compiled
            line = process.stderr.readline()
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 75
    assert time.monotonic() - asked < 2


@pytest.mark.parametrize(
    ("is_safe", "signals", "code", "told"),
    [
        ("True", [signal.SIGTERM], 75, "SIGTERM: ending at once: no step is lost by it"),
        ("False", [signal.SIGTERM, signal.SIGINT], 130, "SIGTERM: stopping when the step is saved; once more to end"),
        ("False", [signal.SIGINT, signal.SIGTERM], 143, "SIGINT: stopping when the step is saved; once more to end"),
    ],
)
def test_signals_are_answered_while_the_main_thread_is_busy(is_safe, signals, code, told):
    """At once where nothing can be lost, else at the second one. Python's own handlers would wait for the C call.

    What is said is what is done.
    """
    busy = (
        "import hashlib; from dblocks_jax.run.stop import Stop\n"
        f"stop = Stop(); stop.is_safe = lambda: {is_safe}; stop.listen()\n"
        "print('ready', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
    )
    with started(sys.executable, "-c", busy) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        for number in signals[:-1]:
            process.send_signal(number)
            time.sleep(0.3)
            assert process.poll() is None
        asked = time.monotonic()
        process.send_signal(signals[-1])
        _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert time.monotonic() - asked < 2
    assert errors.startswith(f"launch.py: {told}") and len(errors.splitlines()) == 1


def test_a_signal_during_the_imports_says_what_it_does(tmp_path):
    """They take seconds. A config file that sends the signal is read in the midst of them."""
    config = tmp_path / "config.py"
    config.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    done = finish(sys.executable, "launch.py", f"--config={config}")
    assert done.returncode == 75 and not done.stdout
    assert done.stderr == "launch.py: SIGTERM: ending at once: nothing has begun\n"


def test_a_signal_in_a_mode_that_saves_no_steps_says_what_it_does():
    """Such a mode leaves `is_safe` as it is."""
    send = (
        "import os, signal, time; from dblocks_jax.run.stop import Stop\n"
        "Stop().listen(); os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    )
    done = finish(sys.executable, "-c", send)
    assert (done.returncode, done.stderr) == (75, "launch.py: SIGINT: ending at once: no step is lost by it\n")


def test_a_signal_is_answered_where_nobody_reads_what_is_said():
    """Ctrl-C ends `tee` first: then the line about it cannot be printed."""
    wait = (
        "import time; from dblocks_jax.run.stop import Stop\n"
        "stop = Stop(); stop.is_safe = lambda: stop._asked; stop.listen()\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    with started(sys.executable, "-c", wait) as process:
        assert process.stdout and process.stderr and process.stdout.readline() == "ready\n"
        process.stderr.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 75


class StopAt(Stop):
    """Asks for a stop at its n-th check."""

    def __init__(self, check: int):
        super().__init__()
        self._left = check

    def check(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.ask()
        super().check()


@pytest.mark.long
def test_an_evaluation_that_was_abandoned_is_made_up_for(tmp_path):
    """However often it is stopped: at every check of a run, in the loop and between batches of evaluation."""
    expected = run(tiny(eval_batch_size=100), tmp_path / "whole")
    stops = 0
    for check in [3, 5] * 20:
        try:
            result = run(tiny(eval_batch_size=100), tmp_path / "cut", StopAt(check))
            break
        except Stopped:
            stops += 1
    assert stops > 5
    assert {name: result[name] for name in SCORES} == {name: expected[name] for name in SCORES}
    assert_same_state(tmp_path / "whole", tmp_path / "cut", expected["step"])

    def scored(workdir: Path) -> list:
        return [{**line} for line in logged(workdir) if "split" in line]

    assert scored(tmp_path / "cut") == scored(tmp_path / "whole")
    assert [line["split"] for line in scored(tmp_path / "whole")].count("val") == 4


@pytest.mark.long
def test_a_data_error_keeps_what_was_trained(tmp_path, monkeypatch):
    """An image that becomes unreadable under a running job: the steps before it are not lost."""
    expected = run(tiny(), tmp_path / "whole")
    make_feed = trainer.make_feed

    def make(*args, **kwargs):
        feed = make_feed(*args, **kwargs)
        take = feed.take

        def take_or_fail(position, count):
            if position >= 3:
                raise UserError("cannot read the image cat.jpg")
            return take(position, count)

        feed.take = take_or_fail
        return feed

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "make_feed", make)
        with pytest.raises(UserError, match=r"cat.jpg. Stopped at step 3 of 8: the same command goes on"):
            run(tiny(), tmp_path / "cut")
    assert run(tiny(), tmp_path / "cut")["steps_run"] == 5
    assert_same_state(tmp_path / "whole", tmp_path / "cut", expected["step"])


def test_the_second_run_in_a_workdir_is_refused_and_names_the_first(tmp_path):
    workdir = tmp_path / "run"
    with claim(workdir):
        before = sorted(path.name for path in workdir.iterdir())
        second = finish(*command(workdir, **FEW))
        owner = json.loads((workdir / "in_use_by.json").read_text())
    assert second.returncode == 1 and not second.stdout
    assert len(second.stderr.splitlines()) == 1
    assert "is in use by another run" in second.stderr and f'"process": {owner["process"]}' in second.stderr
    assert sorted(path.name for path in workdir.iterdir()) == before
    with claim(workdir):
        pass  # it was let go


@pytest.mark.long
def test_30_kills(undisturbed, tmp_path, capsys):
    seed = random.SystemRandom().randrange(2**32)
    rng, moments, rounds = random.Random(seed), [], 0
    while len(moments) < 30:
        workdir = tmp_path / f"run_{rounds}"
        moments += kill_at_random(workdir, rng, kills=min(8, 30 - len(moments)), **FEW)
        done = finish(*command(workdir, **FEW))
        assert done.returncode == 0, (seed, done.stderr)
        assert_same_state(undisturbed[0], workdir, 80)
        assert {name: result_of(done)[name] for name in SCORES} == {name: undisturbed[1][name] for name in SCORES}
        rounds += 1
    with capsys.disabled():
        print(f"\nkills survived: {len(moments)} in {rounds} runs (seed {seed}), at {', '.join(moments)}")


@pytest.mark.long
def test_20_signals(undisturbed, tmp_path, capsys):
    seed = random.SystemRandom().randrange(2**32)
    rng, waited, codes = random.Random(seed), [], []
    workdir = tmp_path / "run"
    for _ in range(20):
        with started(*command(workdir, **FEW)) as process:
            time.sleep(rng.uniform(0.5, 9.0))
            asked = time.monotonic()
            process.send_signal(rng.choice([signal.SIGTERM, signal.SIGINT]))
            _, errors = process.communicate(timeout=60)
            waited.append(time.monotonic() - asked)
        codes.append(process.returncode)
        assert process.returncode in (0, 75), (seed, errors)
    done = finish(*command(workdir, **FEW))
    assert done.returncode == 0, (seed, done.stderr)
    assert_same_state(undisturbed[0], workdir, 80)
    assert max(waited) < 10
    with capsys.disabled():
        print(f"\nsignals: codes {codes}, longest wait {max(waited):.1f} s (seed {seed})")

"""SIGTERM and SIGINT: finish the step, save, leave. A second signal, or one when nothing can be lost, ends at once.

A thread answers the signals, for the main thread may be deep inside a compilation. Of several processes a signal to one
is a signal to all: they agree on the step at which they stop.
"""

import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from dblocks_jax.run import processes
from dblocks_jax.run.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ENDING = "ending at once: no step is lost by it"
LOOK_SECONDS = 0.1  # how often the thread looks whether leaving has become safe
LOOK_AROUND_SECONDS = 1.0  # how often it looks whether another process was asked to stop


class Stop:
    """A request to stop, which may come at any time. `check` at every point where the main thread could stop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked = False
        self._checks = 0  # how many the main thread has passed
        self._last: int | None = None  # the check at which this and all other processes stop
        # Whether leaving this instant would lose nothing. Whoever trains says so.
        self.is_safe: Callable[[], bool] = lambda: True

    def listen(self) -> None:
        """Answer signals from now on. Call it from the main thread, and after `processes.join`."""
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # what the thread reads is written below Python, at once
        threading.Thread(target=self._answer, args=(read_end,), daemon=True, name="signals").start()

    def interrupt(self) -> None:
        """From now on a signal is a KeyboardInterrupt in the main thread, for what waits and has nothing to save."""
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.default_int_handler)

    def end(self) -> None:
        """Ignore signals from now on: all is done or said, and they must not change the exit code any more.

        Not among several processes, whose exit waits for the others.
        """
        if not processes.are_several():
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def check(self) -> None:
        """Pass, or stop here.

        Raises:
          Stopped: a stop was asked for; of several processes, in each at the same check.
        """
        with self._lock:
            self._checks += 1
            asked = self._asked
        if not asked:
            return
        if self._last is None:
            self._last = processes.largest_published()
        if self._checks >= self._last:
            raise Stopped

    def ask(self) -> None:
        """Ask for a stop at the next check."""
        with self._lock:
            if not self._asked:
                processes.publish(self._checks + 1)
            self._asked = True

    def _answer(self, signals: int) -> None:
        """What the thread does: wait for the first signal here or elsewhere, then for the second or a safe moment."""
        name = ""
        while not select.select([signals], [], [], LOOK_AROUND_SECONDS if processes.are_several() else None)[0]:
            if processes.is_stop_announced():
                break
        else:
            name = signal.Signals(os.read(signals, 1)[0]).name
        processes.announce_stop()
        self.ask()
        if name:
            at_once = self._may_end()
            what = ENDING if at_once else "stopping when the step is saved; once more to end at once"
            with suppress(OSError, ValueError):  # Ctrl-C may have ended whoever reads what we print
                print(f"launch.py: {name}: {what}", file=sys.stderr, flush=True)
        while True:
            if self._may_end():
                if processes.are_several():
                    processes.end_all("launch.py: stopped before the first step", Stopped.exit_code)
                os._exit(Stopped.exit_code)
            if select.select([signals], [], [], LOOK_SECONDS)[0]:
                os._exit(128 + os.read(signals, 1)[0])

    def _may_end(self) -> bool:
        """Whether ending this instant loses nothing."""
        if processes.are_several():
            return self._checks == 0  # nobody can have finished a step without this process
        try:
            return self.is_safe()
        except OSError:  # of a disk that cannot be asked
            return False

"""How far the host runs ahead of the device: enough to keep it busy, not so much that a request to stop must wait."""

import time
from collections import deque

import jax

from dblocks_jax.training.step import Log

SECONDS = 1.0  # of work that may be waiting for the device, and that one call may hold


class Pace:
    """Tells how many steps a call should make, and holds the host back. Results do not depend on either."""

    def __init__(self, most: int, *, adapt: bool):
        """Calls make up to `most` steps; with `adapt` fewer where steps take long. Several processes must not: they
        would choose differently.
        """
        self.steps = 1 if adapt else most
        self._most = most
        self._adapt = adapt
        self._queue: deque[tuple[int, Log]] = deque()
        self._asked: float | None = None  # when the last call was on its way
        self._since = 0.0  # when the calls in the queue began
        self._step_seconds: float | None = None

    def add(self, count: int, metrics: Log) -> None:
        """A call of `count` steps is on its way. Waits while the device has too much to do."""
        now = time.perf_counter()
        if not self._queue:
            self._since = max(self._since, self._asked or now)  # the first call is compiled before it is on its way
        self._asked = now
        self._queue.append((count, metrics))
        self._collect()
        # One call may wait behind the one under way, however long they are: the device must not wait for the host.
        while len(self._queue) > 1 and (
            len(self._queue) > 2
            if self._step_seconds is None
            else sum(count for count, _ in self._queue) * self._step_seconds > SECONDS
        ):
            jax.block_until_ready(self._queue[0][1])
            self._collect()

    def rest(self) -> None:
        """Wait for all calls, before the host does something else."""
        jax.block_until_ready(list(self._queue))
        self._collect()
        self._asked = None

    def _collect(self) -> None:
        """Take the calls that have come home, and the time that they took together."""
        steps = 0
        while self._queue and is_home(self._queue[0][1]):
            steps += self._queue.popleft()[0]
        if steps:
            now = time.perf_counter()
            self._step_seconds = (now - self._since) / steps
            self._since = now
            if self._adapt:
                self.steps = max(1, min(self._most, int(SECONDS / max(self._step_seconds, 1e-9))))


def is_home(metrics: Log) -> bool:
    """Whether the device has computed all of this."""
    return all(value.is_ready() for value in metrics.values())  # pyright: ignore[reportAttributeAccessIssue]

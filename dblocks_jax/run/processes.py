"""Several processes that run one job: how they meet, agree, take turns, and end together.

They talk through the coordination service of `jax.distributed`, which needs no device and knows of every process. In a
job of one process all of this does nothing. Nothing here starts a backend.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed  # the service's client has no public name; Orbax takes it from here too

from dblocks_jax.run.errors import UserError

# What `jax.distributed` does not read by itself, under the names of what it does: JAX_COORDINATOR_ADDRESS.
COUNT, INDEX = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
MEET_SECONDS = 120  # how long to wait for the others at the start
SILENCE_SECONDS = 30  # a process unheard of for so long is dead, and the others end
WATCH_SECONDS = 1
FOR_EVER = 7 * 24 * 3600 * 1000  # milliseconds: whoever fails ends all, so nobody waits in vain
FAILED, STOP, PUBLISHED = "dblocks_jax/failed/", "dblocks_jax/stop/", "dblocks_jax/published/"


def join() -> None:
    """Meet the other processes, as Slurm or the environment describes them; before anything touches a device.

    Raises:
      UserError: nothing describes them. (If they do not all come, `jax.distributed` aborts the process.)
    """
    # It would catch SIGTERM, as a wish for one more checkpoint: a process could then be ended by SIGKILL alone.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            num_processes=_number(COUNT),
            process_id=_number(INDEX),
            initialization_timeout=MEET_SECONDS,
            heartbeat_timeout_seconds=SILENCE_SECONDS,
        )
    except ValueError as error:
        raise UserError(
            f"--distributed: {error} Start it with srun, or set JAX_COORDINATOR_ADDRESS=HOST:PORT, {COUNT} and {INDEX}"
        ) from None
    threading.Thread(target=_end_when_another_fails, daemon=True).start()


def is_first() -> bool:
    """Whether this process writes, prints and downloads for all."""
    return distributed.global_state.process_id == 0


def are_several() -> bool:
    """Whether this job has processes that know of each other."""
    return distributed.global_state.client is not None


def announce_stop() -> None:
    """Tell all processes that one of them was asked to stop."""
    if client := distributed.global_state.client:
        client.key_value_set(f"{STOP}asked", "", allow_overwrite=True)


def is_stop_announced() -> bool:
    """Whether any process announced a stop."""
    with contextlib.suppress(Exception):  # the client is gone: the job is ending
        if client := distributed.global_state.client:
            return bool(client.key_value_dir_get(STOP))
    return False


def publish(number: int) -> None:
    """Tell all processes a number, once."""
    if client := distributed.global_state.client:
        client.key_value_set(f"{PUBLISHED}{distributed.global_state.process_id}", str(number))


def largest_published() -> int:
    """The largest of all processes' numbers; waits until each has published one. 0 in a job of one process."""
    client = distributed.global_state.client
    if client is None:
        return 0
    keys = [f"{PUBLISHED}{index}" for index in range(distributed.global_state.num_processes)]
    return max(int(client.blocking_key_value_get(key, FOR_EVER)) for key in keys)


def check_alike(what: str, value: Any) -> None:
    """Wait for all processes, once for each `what`, and compare what they have.

    Raises:
      UserError: naming `what`, if not all of them have the same `value`.
    """
    if client := distributed.global_state.client:
        client.key_value_set(f"dblocks_jax/{what}/{distributed.global_state.process_id}", repr(value))
        _wait_for_all(what)
        if len({found for _, found in client.key_value_dir_get(f"dblocks_jax/{what}/")}) > 1:
            raise UserError(f"the processes do not have the same {what}")


@contextlib.contextmanager
def first_process_first(what: str) -> Iterator[None]:
    """Let the first process do this before the others, and let all go on together, once for each `what`.

    Together, because on CPUs the first collective fails when others come 30 seconds late.
    """
    if not is_first():
        _wait_for_all(f"{what} by the first")
    yield
    if is_first():
        _wait_for_all(f"{what} by the first")
    _wait_for_all(f"{what} by all")


def _wait_for_all(what: str) -> None:
    if client := distributed.global_state.client:
        client.wait_at_barrier(f"dblocks_jax/{what}", FOR_EVER)


def end_all(message: str, code: int) -> None:
    """End every process of the job, with the message and exit code of whoever failed first.

    Returns only in a job of one process. Otherwise a process that leaves would wait for the others at the exit of
    `jax.distributed`, and they for it in a collective.
    """
    client = distributed.global_state.client
    if client is None:
        return
    try:
        client.key_value_set(f"{FAILED}first", str(code))
    except Exception as error:  # refused where the key is set already; else the service is gone, and this may be why
        first = "ALREADY_EXISTS" not in str(error)
    else:
        first = True
    if first:
        print(message, file=sys.stderr, flush=True)
    _leave(client, code)


def _end_when_another_fails() -> None:
    with contextlib.suppress(Exception):  # the client is gone: this process has ended well
        while client := distributed.global_state.client:
            if client.key_value_dir_get(FAILED):
                _leave(client, code=1)
            time.sleep(WATCH_SECONDS)


def _leave(client: Any, code: int) -> None:
    with contextlib.suppress(Exception):
        code = int(client.key_value_dir_get(FAILED)[0][1])  # of whoever failed first
    with contextlib.suppress(Exception):
        client.wait_at_barrier(FAILED, 5000)
    if is_first():
        time.sleep(0.5)  # the service lives in this process, and others abort with a stack trace when it is gone
    sys.stdout.flush()
    os._exit(code)


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise UserError(f"{name}={text} is not a number")
    return None if text is None else int(text)

"""Several processes serve one model, driven by one scheduler.

Each process holds the parts of weights and KV of its own devices, and all must run the same device programs in the same
order. Process 0 schedules. Whatever its executor is asked to run (a plan: packed arrays and page-table deltas follow
from it), it sends to the others first, which then run it too. Everything else is JAX's: `jax.distributed` connects the
processes, `broadcast_one_to_all` carries the calls, collectives inside the programs carry the numbers.

Calls are pickled: processes of one job trust each other. On CPU collectives go through gloo, which hangs with more than
one collective program in flight, so a process has one device there and waits for each program.
"""

from __future__ import annotations

import atexit
import contextlib
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from engine.config import EngineConfig, next_power_of_two
from engine.errors import ConfigError, FolioError
from engine.executor.jax_executor import JaxExecutor

MESSAGE = 1 << 14  # bytes of the first broadcast of a call, its length included; longer ones take another
LENGTH = 8  # bytes of the length

_in_call = False  # process 0: others are, or will be, running a program that needs this process


def check_address(coordinator: str) -> None:
    """Raises ConfigError for what is not `host:port`: JAX would end in an IndexError, or wait."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"coordinator {coordinator!r}: expected host:port of process 0, such as 10.0.0.1:1234")


def check(config: EngineConfig, num_processes: int) -> None:
    """What so many processes cannot do, found out before they wait for each other.

    Raises:
      ConfigError: a simulation, a host tier, or a process without a device of its own; on CPU each has one.
    """
    alone = "works in one process: run without a coordinator"
    if config.executor == "sim":
        raise ConfigError(f"executor=sim {alone}")
    if config.cache.host_bytes:
        raise ConfigError(f"host_bytes={config.cache.host_bytes}: a host tier {alone}, or set host_bytes=0")
    if config.tensor < num_processes:
        raise ConfigError(
            f"tensor={config.tensor}: {num_processes} processes have a device each at least; use them all"
        )
    if jax.config.values["jax_platforms"] == "cpu" and config.tensor > num_processes:
        raise ConfigError(f"tensor={config.tensor}: on CPU {num_processes} processes have {num_processes} devices")


def start(coordinator: str, num_processes: int, process_id: int) -> None:
    """Connects the processes; call it before anything else of JAX. When process 0 ends, so do the others.

    Args:
      coordinator: `host:port` of process 0, the same everywhere.

    Raises:
      ConfigError: the address or the numbers are wrong, or the processes do not find each other.
    """
    check_address(coordinator)
    if num_processes < 2 or not 0 <= process_id < num_processes:
        raise ConfigError(f"process {process_id} of {num_processes}: give num_processes >= 2 and ids below it")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, shutdown_timeout_seconds=30)
    except (RuntimeError, ValueError) as e:
        raise ConfigError(f"coordinator {coordinator}: {str(e).splitlines()[0]}") from e
    if process_id == 0:
        atexit.register(_stop)


def send(message: Any) -> None:
    """From process 0 to all others, which must be in `receive`."""
    _broadcast(pickle.dumps(message))


def receive() -> Any:
    """What process 0 sends next.

    Raises:
      FolioError: process 0 ended without a word.
    """
    try:
        return pickle.loads(_broadcast(b""))
    except jax.errors.JaxRuntimeError as e:
        raise FolioError(f"process 0 went away: {str(e).splitlines()[0]}") from e


def _broadcast(data: bytes) -> bytes:
    """Process 0's bytes, in every process. Shapes must agree beforehand: a fixed first part, then the rest."""
    first, room = np.zeros(MESSAGE, np.uint8), MESSAGE - LENGTH
    first[:LENGTH] = np.frombuffer(len(data).to_bytes(LENGTH, "little"), np.uint8)
    first[LENGTH : LENGTH + len(data)] = np.frombuffer(data[:room], np.uint8)
    head = np.asarray(multihost_utils.broadcast_one_to_all(first)).tobytes()
    length = int.from_bytes(head[:LENGTH], "little")
    if length <= room:
        return head[LENGTH : LENGTH + length]
    rest = np.zeros(next_power_of_two(length - room), np.uint8)
    if data:
        rest[: length - room] = np.frombuffer(data[room:], np.uint8)
    return head[LENGTH:] + np.asarray(multihost_utils.broadcast_one_to_all(rest)).tobytes()[: length - room]


def _stop() -> None:
    """Sends the others home, unless they wait for a program that this process did not finish dispatching."""
    if not _in_call:
        send(None)


def _mirrored(name: str) -> Callable[..., Any]:
    """A method of JaxExecutor that runs in every process."""

    def call(self: JaxExecutor, *args: Any) -> Any:
        global _in_call
        with _interrupts_later():
            _in_call = True
            send((name, args))
            result = getattr(JaxExecutor, name)(self, *args)
            _in_call = False
        return result

    return call


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Ctrl-C waits until all processes have run the call: one that half of them ran would leave the others waiting."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread
        return
    came: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda *signal_: came.append(signal_))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came and callable(before):
        before(*came[0])


class LeadingExecutor(JaxExecutor):
    """Process 0's executor."""

    submit = _mirrored("submit")
    poison = _mirrored("poison")
    warm_up = _mirrored("warm_up")
    warm_up_deltas = _mirrored("warm_up_deltas")


def follow(executor: JaxExecutor) -> int:
    """Runs what process 0 runs until it ends. Returns the number of calls.

    Raises:
      FolioError: process 0 ended without a word.
    """
    calls = 0
    while (message := receive()) is not None:
        name, args = message
        getattr(executor, name)(*args)
        calls += 1
    return calls

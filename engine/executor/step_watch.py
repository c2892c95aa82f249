"""When the device had finished each step, whatever the host was doing then.

JAX tells nobody when a program ends, and whoever collects a step may come late. So a thread waits for the result of
each step in turn and looks at the clock. It needs the interpreter for that: while other threads compute in Python, a
stamp is late by up to `sys.getswitchinterval()` (5 ms unless set otherwise), so idle times are rather too short than
too long.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import weakref
from dataclasses import dataclass

import jax

from engine.clock import WallClock


@dataclass(eq=False, slots=True)
class Finish:
    """The end of one step on the device."""

    time: float = math.inf  # seconds on the engine's clock; inf: not seen yet


_Work = queue.SimpleQueue[tuple[jax.Array, Finish] | None]


class StepWatch:
    """Stamps the ends of steps, in the order of their dispatch."""

    def __init__(self, clock: WallClock):
        self._work: _Work = queue.SimpleQueue()
        threading.Thread(target=_stamp, args=(self._work, clock), name="step watch", daemon=True).start()
        weakref.finalize(self, self._work.put, None)  # the thread ends with its executor

    def watch(self, result: jax.Array) -> Finish:
        """What becomes the time when `result`, an output of a step's last program, is there (or has failed)."""
        finish = Finish()
        self._work.put((result, finish))
        return finish


def _stamp(work: _Work, clock: WallClock) -> None:
    while (item := work.get()) is not None:
        result, finish = item
        with contextlib.suppress(Exception):  # whoever collects the step gets the error
            result.block_until_ready()
        finish.time = clock.now()
        del item, result  # an idle watch holds no array

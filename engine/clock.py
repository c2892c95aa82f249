"""Clocks. Every time in the engine is seconds on its clock."""

from __future__ import annotations

import time
from typing import Protocol

SLICE = 0.05  # seconds that a wall clock sleeps at a time, so that whoever waits can look up


class Clock(Protocol):
    """What the engine and those who drive it ask of a clock."""

    def now(self) -> float:
        """Seconds since the start."""
        ...

    def wait_until(self, due: float) -> None:
        """Lets time pass until `due`, or some of it: look at `now` again."""
        ...


class WallClock:
    """Monotonic seconds since the clock was made."""

    def __init__(self):
        self._start = time.perf_counter()

    def now(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def wait_until(self, due: float) -> None:
        """Sleeps until `due`, at most `SLICE` seconds."""
        time.sleep(min(SLICE, max(0.0, due - self.now())))


class VirtualClock:
    """Seconds that pass only when somebody says so."""

    def __init__(self, start: float = 0.0):
        self._now = start

    def now(self) -> float:
        """Seconds since the start."""
        return self._now

    def wait_until(self, due: float) -> None:
        """It is `due` now, or later already."""
        self._now = max(self._now, due)

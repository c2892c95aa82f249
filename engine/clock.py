"""Clocks. Every time in the engine is seconds on its clock."""

from __future__ import annotations

import time


class WallClock:
    """Monotonic seconds since the clock was made."""

    def __init__(self):
        self._start = time.perf_counter()

    def now(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

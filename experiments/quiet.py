"""What other processes take of this machine's CPUs, so that measurements they disturbed can be told and taken again.

Linux only: where the system does not say, nobody is ever taken to disturb anything.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from absl import flags

MAX_OTHERS = flags.DEFINE_float(
    "max_others", 0.1, "Share of the CPUs that other processes may take while something is measured.", lower_bound=0
)
PATIENCE = flags.DEFINE_float(
    "patience", 120.0, "Seconds, in all, for waiting until others are quiet and for measuring again.", lower_bound=0
)
LOOK = 0.5  # seconds that tell whether others are quiet
TICK = 1 / os.sysconf("SC_CLK_TCK")


class Others:
    """The CPU time of other processes, and how long their quiet has been waited for."""

    def __init__(self, limit: float, patience: float):
        self.limit, self.patience = limit, patience
        self.last = 0.0  # what `share` said last
        self._last = _now()

    def share(self) -> float:
        """Of all CPUs since the last call, in [0, 1]."""
        (wall, own, busy), self._last = self._last, _now()
        wall, own, busy = (new - old for new, old in zip(self._last, (wall, own, busy), strict=True))
        self.last = max(0.0, busy - own) / (wall * (os.cpu_count() or 1)) if wall > 0 else 0.0
        return self.last

    def disturb(self) -> bool:
        """Whether they took more than they may since the last call. If they did, and there is patience, sleeps until
        they are quiet; without patience nothing disturbs any more."""
        start = self._last[0]
        if self.share() <= self.limit or self.patience <= 0:
            return False
        self.patience -= self._last[0] - start
        self.wait()
        return True

    def wait(self) -> None:
        """Sleeps until they are quiet, as long as there is patience; what has happened is forgotten."""
        self.share()
        while self.patience > 0:
            time.sleep(LOOK)
            self.patience -= LOOK
            if self.share() <= self.limit:
                break

    def undisturbed(self, run: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
        """The summary of a run that others did not disturb or, when patience ends, of the least disturbed one, with
        the share that they took as `others`; None: interrupted. A summary has its `duration` in seconds."""
        best: dict[str, Any] | None = None
        while best is None or (best["others"] > self.limit and self.patience > 0):
            self.wait()
            summary = run()
            if summary is None:
                return None
            summary["others"] = self.share()
            if best is None or summary["others"] < best["others"]:
                best = summary
            if best["others"] > self.limit:
                self.patience -= summary["duration"]
        return best

    @staticmethod
    def from_flags() -> Others:
        """As --max_others and --patience say."""
        return Others(MAX_OTHERS.value, PATIENCE.value)


def _now() -> tuple[float, float, float]:
    """Seconds of the wall clock, of this process's CPU time, and of everybody's: a hypervisor's theft too, and that of
    nice processes, which give way to no more than a part (measured: steps take 1.5 times as long beside one)."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
    except (OSError, ValueError):
        return time.perf_counter(), 0.0, 0.0
    return time.perf_counter(), time.process_time(), (user + nice + system + irq + softirq + steal) * TICK

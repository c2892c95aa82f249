"""LayerKV as it is, counting which pages leave the device ahead of need, and which when somebody waits for them.

A summary does not say why a page left; this policy does, and decides nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine import Engine
from engine.scheduler.layerkv.policy import LayerKV
from experiments.outcomes import measure
from experiments.points import Point
from experiments.replay import StopFlag

AHEAD, LATE, WAITED = "pages_ahead", "pages_late", "rows_waited"


class Watched(LayerKV):
    """`policy=experiments.figures.layerkv.watched:Watched`."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.counts = {AHEAD: 0, LATE: 0, WAITED: 0}
        self._when, leave = LATE, self.residency.leave

        def counted(slots: np.ndarray, num_pages: int) -> int:
            going = leave(slots, num_pages)
            self.counts[self._when] += going
            return going

        self.residency.leave = counted  # type: ignore[method-assign]

    def _look_ahead(self, slots: np.ndarray, at_home: np.ndarray) -> int:
        """What leaves here leaves because of the forecast; elsewhere, because a prompt or a row has no pages."""
        self._when = AHEAD
        spare = super()._look_ahead(slots, at_home)
        self._when = LATE
        return spare

    def _make_room(self, rows: np.ndarray) -> tuple[np.ndarray, int]:
        """Rows that do not go on wait for pages that are leaving, unless somebody was preempted."""
        found, num_preempted = super()._make_room(rows)
        self.counts[WAITED] += 0 if num_preempted else len(rows) - len(found)
        return found, num_preempted


def watch(point: Point) -> dict[str, Any]:
    """The summary of a run under `Watched`, with its counts: pages that left `AHEAD` of need and too `LATE`, and rows
    that waited for these, once for each step that they missed.

    Raises:
      FolioError: as `points.run_point`.
    """
    engine = Engine.from_pretrained(point.model, point.config)
    summary = measure(engine, point.requests(), StopFlag(), point.objectives)
    assert summary is not None and isinstance(engine.policy, Watched)  # nobody sets the flag
    return summary | engine.policy.counts

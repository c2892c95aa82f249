"""A simulated run judged by the objectives, in place of its summary. Imports no JAX."""

from __future__ import annotations

from typing import Any

from engine import Engine
from experiments.objectives import objectives
from experiments.outcomes import serve_once
from experiments.points import Point
from experiments.replay import StopFlag

EARLIER = 1e-9  # seconds: an arrival on the clock is a sum


def judge(point: Point) -> dict[str, Any]:
    """One run: `shares` of the second half of the requests by scale and set, `rate` (requests/s that all were completed
    at) and `asked` (bytes of host tier that were wanted at once). It follows from the point alone.

    Raises:
      FolioError: a point that cannot be run, or a run in which no request completes.
    """
    engine = Engine.from_pretrained(point.model, point.config)
    requests = point.requests()
    served = serve_once(engine, requests, StopFlag())
    assert served is not None  # nobody sets the flag
    outcomes, window = served
    host, page = getattr(engine.store, "host", None), engine.memory.page_bytes * point.config.tensor
    late = requests[len(requests) // 2 :]
    judged = [m for m in outcomes.completed if m.arrival >= window.start + late[0].arrival_s - EARLIER]
    return {
        "shares": objectives().shares(judged, len(late)),
        "rate": len(outcomes.completed) / window.seconds,
        "asked": host.asked * page if host else 0,
    }

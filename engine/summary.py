"""Figures of a run, or of a window of it, under vLLM's bench names. NumPy only.

A window is an interval of the engine's clock. Latencies, counts and attainment are those of the requests that were due
in it; rates count what happened in it (requests completed, tokens produced, bytes moved). So the warm-up before it and
the drain after it change neither, and over the whole run both are what vLLM's bench reports.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from engine.errors import ConfigError
from engine.metrics import RequestMetrics, StepRecord

SLO_LIMITS = ("ttft", "tpot", "e2el")  # vLLM's --goodput names, in milliseconds
SLACK = 1e-6  # times rebuilt from differences are off by a rounding
PARTS = ("ttft", "queue", "prefill", "ttst", "tpot", "itl", "e2el", "max_gap", "injection_lag")


class Window(NamedTuple):
    """An interval, seconds on the engine's clock, both ends included."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.start

    def holds(self, time: float) -> bool:
        """True when `time` lies in it."""
        return self.start - SLACK <= time <= self.end + SLACK

    def count(self, times: Sequence[float] | np.ndarray) -> int:
        """How many of `times` lie in it."""
        t = np.asarray(times, np.float64)
        return int(((t >= self.start - SLACK) & (t <= self.end + SLACK)).sum())


@dataclass(frozen=True)
class Slo:
    """Limits in milliseconds; a request is good when it completed and meets every limit given."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2el_ms: float | None = None

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Reads `ttft:500,tpot:100` (milliseconds; also separated by blanks).

        Raises:
          ConfigError: an unknown metric, or a limit that is not a number > 0.
        """
        limits: dict[str, float] = {}
        for item in re.split(r"[,\s]+", text.strip()):
            name, _, value = item.partition(":")
            if name not in SLO_LIMITS:
                raise ConfigError(f"goodput {item!r}: expected one of {', '.join(SLO_LIMITS)} as name:milliseconds")
            if not re.fullmatch(r"\d+(\.\d*)?", value) or float(value) <= 0:
                raise ConfigError(f"goodput {item!r}: the limit must be milliseconds > 0, got {value!r}")
            limits[f"{name}_ms"] = float(value)
        return cls(**limits)

    def met_by(self, m: RequestMetrics) -> bool:
        """True when every limit holds. A single-token answer has TPOT 0, as in vLLM's bench."""
        pairs = ((m.ttft_s, self.ttft_ms), (m.tpot_s or 0.0, self.tpot_ms), (m.e2e_s, self.e2el_ms))
        return all(limit is None or (x is not None and x * 1e3 <= limit) for x, limit in pairs)


@dataclass(frozen=True)
class Outcomes:
    """Every request that was sent, by what became of it, and the steps that served them. The last two kinds count
    against attainment and appear in no latency."""

    completed: Sequence[RequestMetrics]
    failed: Sequence[float] = ()  # arrivals of requests refused, aborted or failed
    unfinished: Sequence[float] = ()  # arrivals of requests that still waited or ran at the end
    steps: Sequence[StepRecord] = ()

    def arrivals(self) -> Window:
        """From the first to the last arrival: the default window. Empty at 0 when nothing was sent."""
        times = [*(m.arrival for m in self.completed), *self.failed, *self.unfinished]
        return Window(min(times, default=0.0), max(times, default=0.0))


def summarise(run: Outcomes, window: Window, slo: Slo | None = None) -> dict[str, Any]:
    """Summary under vLLM's bench names (latencies in ms), plus the queue / prefill parts of TTFT, time to second token,
    the largest gap, injection lag, preemptions, link and host memory.

    Args:
      window: over the whole run it starts before the first arrival and ends after the last token.
      slo: adds goodput (good requests completed in the window / s) and attainment (good / sent).

    Returns:
      A dict of plain JSON types; statistics of an empty set and rates over no time are None.
    """
    cohort = [m for m in run.completed if window.holds(m.arrival)]
    failed, unfinished = window.count(run.failed), window.count(run.unfinished)
    outputs = sum(window.count(_token_times(m)) for m in run.completed)
    inputs = sum(m.num_prompt_tokens for m in run.completed if window.count(_token_times(m)[:1]))
    summary: dict[str, Any] = {
        "duration": window.seconds,
        "sent": len(cohort) + failed + unfinished,
        "completed": len(cohort),
        "failed": failed,
        "unfinished": unfinished,
        "total_input_tokens": sum(m.num_prompt_tokens for m in cohort),
        "total_output_tokens": sum(m.num_output_tokens for m in cohort),
        "request_throughput": _rate(_num_ended(run.completed, window), window.seconds),
        "output_throughput": _rate(outputs, window.seconds),
        "total_token_throughput": _rate(inputs + outputs, window.seconds),
        "total_preemptions": sum(m.num_preemptions for m in cohort),
        "swapped_preemptions": sum(m.num_swaps for m in cohort),
        "recomputed_preemptions": sum(m.num_preemptions - m.num_swaps for m in cohort),
        "preempted_requests": sum(m.num_preemptions > 0 for m in cohort),
    }
    for part in PARTS:
        field = {"e2el": "e2e_s"}.get(part, f"{part}_s")
        values = [getattr(m, field) for m in cohort]
        if part == "itl":
            values = [gap for gaps in values for gap in gaps]
        summary |= _statistics(part, [v for v in values if v is not None])
    if slo is not None:
        good = [m for m in run.completed if slo.met_by(m)]
        in_cohort = window.count([m.arrival for m in good])
        summary["slo"] = dataclasses.asdict(slo)
        summary["request_goodput"] = _rate(_num_ended(good, window), window.seconds)
        summary["slo_attainment"] = in_cohort / summary["sent"] if summary["sent"] else None
    return summary | _traffic([s for s in run.steps if window.holds(s.end)])


def _token_times(m: RequestMetrics) -> np.ndarray:
    """When each token became known, float64 [n]."""
    return m.arrival + np.cumsum([m.ttft_s, *m.itl_s]) if m.ttft_s is not None else np.empty(0)


def _num_ended(requests: Sequence[RequestMetrics], window: Window) -> int:
    return window.count([m.arrival + m.e2e_s for m in requests if m.e2e_s is not None])


def _rate(count: float, seconds: float) -> float | None:
    return count / seconds if seconds > 0 else None


def _statistics(part: str, seconds: Sequence[float]) -> dict[str, float | None]:
    names = ("mean", "median", "std", "p90", "p99", "max")
    if not seconds:
        return {f"{n}_{part}_ms": None for n in names}
    ms = np.asarray(seconds, np.float64) * 1e3
    values = (ms.mean(), np.median(ms), ms.std(), np.percentile(ms, 90), np.percentile(ms, 99), ms.max())
    return {f"{n}_{part}_ms": float(v) for n, v in zip(names, values, strict=True)}


def _traffic(steps: Sequence[StepRecord]) -> dict[str, Any]:
    """Bytes, seconds and GB/s over the link by direction, and the most that the host tier held."""
    traffic: dict[str, Any] = {"peak_host_bytes": max((s.host_bytes for s in steps), default=0)}
    for way in ("out", "in"):
        moved, seconds = (sum(getattr(s, f"{what}_{way}") for s in steps) for what in ("bytes", "seconds"))
        traffic |= {f"link_bytes_{way}": moved, f"link_seconds_{way}": seconds}
        traffic[f"link_gbs_{way}"] = _rate(moved / 1e9, seconds)
    return traffic

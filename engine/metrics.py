"""Per-request latencies, per-step records, and their summary under vLLM's bench names. NumPy only.

Every latency starts at t0, when the request was *due*, so a late hand-over counts as latency (no coordinated
omission). TTFT splits exactly in two: queue (t0 until its first prefill is submitted) + prefill (until the first token
is known to the host).
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import ConfigError

if TYPE_CHECKING:
    from engine.memory.moves import Copy
    from engine.request import Request

SLO_LIMITS = ("ttft", "tpot", "e2el")  # vLLM's --goodput names, in milliseconds
SUMMARY_PARTS = ("ttft", "queue", "prefill", "tpot", "itl", "e2el", "max_gap", "injection_lag")


@dataclass(frozen=True)
class RequestMetrics:
    """Latencies of one request in seconds. None: it never got that far (aborted), or is undefined for one token."""

    num_prompt_tokens: int
    num_output_tokens: int
    arrival: float  # t0 on the engine's clock
    injection_lag_s: float | None  # handed over - t0
    queue_s: float | None  # first prefill submitted - t0
    prefill_s: float | None  # first token - first prefill submitted
    ttft_s: float | None  # queue + prefill
    tpot_s: float | None  # (last token - first token) / (n - 1); None for n < 2
    itl_s: tuple[float, ...]  # gaps between consecutive tokens, n - 1 of them
    e2e_s: float | None  # finished - t0
    max_gap_s: float | None  # largest of itl_s: stalls that hide in a TPOT
    num_preemptions: int

    @classmethod
    def from_request(cls, request: Request) -> RequestMetrics:
        """The metrics of a request in any phase; parts that did not happen are None."""
        t0, times = request.arrival, request.token_times
        gaps = tuple(float(b - a) for a, b in itertools.pairwise(times))
        queue = None if request.scheduled is None else request.scheduled - t0
        prefill = times[0] - request.scheduled if times and request.scheduled is not None else None
        return cls(
            num_prompt_tokens=len(request.prompt),
            num_output_tokens=len(request.output),
            arrival=t0,
            injection_lag_s=None if request.injected is None else request.injected - t0,
            queue_s=queue,
            prefill_s=prefill,
            ttft_s=None if queue is None or prefill is None else queue + prefill,
            tpot_s=(times[-1] - times[0]) / len(gaps) if gaps else None,
            itl_s=gaps,
            e2e_s=None if request.finished is None else request.finished - t0,
            max_gap_s=max(gaps, default=None),
            num_preemptions=request.num_preemptions,
        )


@dataclass(frozen=True)
class StepRecord:
    """What one engine step did. Times in seconds on the engine's clock; counts as they stand after the step."""

    step: int
    start: float
    end: float
    num_decode: int  # decode rows
    num_prefill_seqs: int
    prefill_tokens: int
    num_waiting: int
    num_running: int
    free_pages: int
    num_preempted: int  # in this step
    num_finished: int  # in this step
    num_late: int = 0  # rows dropped because their request had ended when the step was submitted


class TransferAccount:
    """Copies between device and host: every byte, by direction and layer. Row 0 is in, row 1 is out."""

    def __init__(self, num_layers: int):
        self.num_bytes = np.zeros((2, num_layers), np.int64)
        self.seconds = np.zeros((2, num_layers))  # that the link was busy with them
        self.num_copies = np.zeros((2, num_layers), np.int64)
        self.num_failed = 0

    def add(self, copy: Copy) -> None:
        """Counts a copy that has ended; a failed one moved nothing."""
        if not copy.ok:
            self.num_failed += 1
            return
        at = (int(copy.out), copy.layer)
        self.num_bytes[at] += copy.num_bytes
        self.seconds[at] += copy.end - copy.start
        self.num_copies[at] += 1

    def gbs(self, out: bool) -> float:
        """1e9 bytes per second of link time in a direction; 0 when nothing was copied."""
        seconds = float(self.seconds[int(out)].sum())
        return float(self.num_bytes[int(out)].sum()) / seconds / 1e9 if seconds else 0.0


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


def summarise(
    metrics: Sequence[RequestMetrics],
    duration: float,
    *,
    failed: int = 0,
    slo: Slo | None = None,
) -> dict[str, Any]:
    """Summary of a run under vLLM's bench names (latencies in ms), plus the queue / prefill parts of TTFT,
    the largest gap, injection lag and preemptions.

    Args:
      metrics: of the completed requests only.
      duration: seconds from the start of the run to its end, drain included.
      failed: requests refused or aborted; they count against attainment, never in latencies.
      slo: adds goodput (good / duration), attainment (good / sent) and goodput without the drain tail (good requests
        finished by the last arrival, over that time).

    Returns:
      A dict of plain JSON types; statistics of an empty set are None.
    """
    inputs = sum(m.num_prompt_tokens for m in metrics)
    outputs = sum(m.num_output_tokens for m in metrics)
    summary: dict[str, Any] = {
        "duration": duration,
        "completed": len(metrics),
        "failed": failed,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": _rate(len(metrics), duration),
        "output_throughput": _rate(outputs, duration),
        "total_token_throughput": _rate(inputs + outputs, duration),
        "total_preemptions": sum(m.num_preemptions for m in metrics),
        "preempted_requests": sum(m.num_preemptions > 0 for m in metrics),
    }
    for part in SUMMARY_PARTS:
        field = {"e2el": "e2e_s"}.get(part, f"{part}_s")
        values = [getattr(m, field) for m in metrics]
        if part == "itl":
            values = [gap for gaps in values for gap in gaps]
        summary |= _statistics(part, [v for v in values if v is not None])
    if slo is not None:
        summary |= _goodput(metrics, duration, failed, slo)
    return summary


def _rate(count: float, duration: float) -> float | None:
    return count / duration if duration > 0 else None


def _statistics(part: str, seconds: Sequence[float]) -> dict[str, float | None]:
    names = ("mean", "median", "std", "p90", "p99", "max")
    if not seconds:
        return {f"{n}_{part}_ms": None for n in names}
    ms = np.asarray(seconds, np.float64) * 1e3
    values = (ms.mean(), np.median(ms), ms.std(), np.percentile(ms, 90), np.percentile(ms, 99), ms.max())
    return {f"{n}_{part}_ms": float(v) for n, v in zip(names, values, strict=True)}


def _goodput(metrics: Sequence[RequestMetrics], duration: float, failed: int, slo: Slo) -> dict[str, Any]:
    good = [m for m in metrics if slo.met_by(m)]
    sent = len(metrics) + failed
    result: dict[str, Any] = {
        "slo": dataclasses.asdict(slo),
        "request_goodput": _rate(len(good), duration),
        "slo_attainment": len(good) / sent if sent else None,
        "request_goodput_without_drain": None,
    }
    if metrics:
        first, last = min(m.arrival for m in metrics), max(m.arrival for m in metrics)
        in_time = sum(m.e2e_s is not None and m.arrival + m.e2e_s <= last for m in good)
        result["request_goodput_without_drain"] = _rate(in_time, last - first)
    return result

"""Per-request latencies, and records of steps and copies; `summary.py` makes figures of them.

Every latency starts at t0, when the request was *due*, so a late hand-over counts as latency (no coordinated
omission). TTFT splits exactly in two: queue (t0 until its first prefill is submitted) + prefill (until the first token
is known to the host).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.memory.moves import Copy
    from engine.request import Request


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
    ttst_s: float | None  # second token - first token, as AIPerf defines time to second token; None for n < 2
    tpot_s: float | None  # (last token - first token) / (n - 1); None for n < 2
    itl_s: tuple[float, ...]  # gaps between consecutive tokens, n - 1 of them
    e2e_s: float | None  # finished - t0
    max_gap_s: float | None  # largest of itl_s: stalls that hide in a TPOT
    num_preemptions: int
    num_swaps: int = 0  # of the preemptions, those that moved its KV to the host; after the others it was recomputed

    @classmethod
    def from_request(cls, request: Request) -> RequestMetrics:
        """The metrics of a request in any phase; parts that did not happen are None."""
        t0, times = request.arrival, request.token_times
        gaps = tuple(map(operator.sub, times[1:], times))
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
            ttst_s=gaps[0] if gaps else None,
            tpot_s=(times[-1] - times[0]) / len(gaps) if gaps else None,
            itl_s=gaps,
            e2e_s=None if request.finished is None else request.finished - t0,
            max_gap_s=max(gaps, default=None),
            num_preemptions=request.num_preemptions,
            num_swaps=request.num_swaps,
        )


@dataclass(slots=True)
class StepRecord:
    """What one engine step did. Times in seconds on the engine's clock; counts as they stand after the step. Steps do
    not overlap: one that was submitted before the last was collected starts when that one ends."""

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
    num_swapped: int = 0
    num_late: int = 0  # rows dropped because their request had ended when the step was submitted
    bytes_out: int = 0  # device to host, landed in this step
    bytes_in: int = 0  # host to device
    seconds_out: float = 0.0  # that the link was busy with bytes_out
    seconds_in: float = 0.0
    host_bytes: int = 0  # held by the host tier after the step
    mapped_pages: int = 0  # for tokens; neither free nor mapped: reserved and empty
    copies: tuple[Copy, ...] = ()  # behind bytes and seconds, one by one
    num_tokens: int = 0  # that requests got
    device_start: float | None = None  # when the device could begin: dispatched, and the step before had finished
    device_end: float | None = None  # when it had finished; what lies between two steps it was idle. None: no device
    repeat: int = (
        1  # steps alike that this one record stands for, `step` the first: a virtual clock passes them at once
    )

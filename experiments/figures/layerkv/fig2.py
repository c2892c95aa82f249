"""Figure 2: a long prompt that comes while others decode, under a request-level and a layer-level allocator."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from engine.metrics import RequestMetrics, StepRecord
from experiments.figures.base import PREDICTED, Band, Figure, Result, Table, Verdict
from experiments.figures.layerkv.setting import LAYERKV, LLAMA2_7B, VLLM, engine_of
from experiments.plots import PREFILL, QUEUE, figure
from experiments.replay import Observer, StopFlag, replay
from experiments.seeded import Cell
from experiments.workloads import WorkloadRequest

LONG, SHORT, DECODERS = "long", "short", ("A", "B", "C")
REQUESTS = (
    WorkloadRequest("A", 0.0, 2048, 150),
    WorkloadRequest("B", 0.0, 2048, 250),
    WorkloadRequest("C", 0.0, 2048, 350),
    WorkloadRequest(SHORT, 2.5, 256, 100),
    WorkloadRequest(LONG, 3.5, 3072, 100),
)
POOL = 32 * 512  # pages: all layers of 8,192 tokens, so that the long prompt does not fit beside the others
ALLOCATORS = {VLLM: "request-level", LAYERKV: "layer-level"}
PAUSED = 0.1  # seconds between two tokens from which on a request is said to wait
AHEAD = 1  # step that was submitted before anybody knew of an arrival
HEADER = (
    "allocator", "request", "prompt", "arrival s", "prefill s", "first token s", "second token s", "end s",
    "steps before",
)  # fmt: skip


@dataclass
class Trace(Observer):
    """What happened. Seconds since the start."""

    requests: dict[str, RequestMetrics] = field(default_factory=dict)  # by id
    steps: list[StepRecord] = field(default_factory=list)

    def on_finished(self, request, output):
        self.requests[request.id] = output.metrics

    def on_step(self, record, progress):
        self.steps.append(record)

    def begins(self, name: str) -> float:
        """When the prefill of a request begins."""
        queue = self.requests[name].queue_s
        assert queue is not None  # it has completed
        return self.requests[name].arrival + queue

    def tokens(self, name: str) -> np.ndarray:
        """When the tokens of a request came, float64 [n]."""
        of = self.requests[name]
        assert of.ttft_s is not None
        return of.arrival + np.cumsum([of.ttft_s, *of.itl_s])

    def steps_before(self, name: str) -> int:
        """Steps that began while a request waited for its prefill."""
        arrival, begin = self.requests[name].arrival, self.begins(name)
        return sum(step.repeat for step in self.steps if arrival <= step.start < begin)

    def first_release(self) -> float:
        """When the first of the decoders has ended."""
        return min(float(self.tokens(name)[-1]) for name in DECODERS)


def run(policy: str) -> Trace:
    """Serves `REQUESTS` under one of `setting.POLICIES`."""
    context = max(request.prompt_len + request.output_len for request in REQUESTS)
    point = LLAMA2_7B.point(policy, "burst", context, f"num_pages={POOL}")
    trace = Trace()
    replay(engine_of(point), REQUESTS, trace, StopFlag())
    return trace


class Fig2(Figure):
    """The cartoon, as a trace."""

    title = "A long prompt behind three decoders, request-level and layer-level"
    source = "LayerKV (arXiv 2410.00428), figure 2 (a cartoon; the numbers are ours)"
    about = (
        "Llama2-7B on one L20 with a pool of 8,192 tokens: A, B and C (2,048 tokens) decode; a short prompt (256) "
        "comes, for which there is room, and then a long one (3,072), for which there is none."
    )

    def evaluate(self, cells: Mapping[Hashable, Cell], executor: str) -> Result:
        """See `Figure`."""
        traces = {policy: run(policy) for policy in ALLOCATORS}
        rows = []
        for policy, trace in traces.items():
            for request in REQUESTS:
                tokens = trace.tokens(request.id)
                times = [request.arrival_s, trace.begins(request.id), tokens[0], tokens[1], tokens[-1]]
                before = trace.steps_before(request.id)
                rows.append([ALLOCATORS[policy], request.id, request.prompt_len, *map(float, times), before])
        notes = [
            f"steps before: that began while a request waited; {AHEAD} was on its way before the request was known",
            "layer-level: the long prompt begins at once, and then waits until its parked layers find room at home",
        ]
        return Result(Table(HEADER, rows), verdicts(traces), notes, traces)

    def draw(self, result: Result, stem: Path) -> None:
        """A panel per allocator, a lane per request; below the second, the link."""
        traces: dict[str, Trace] = result.extra
        lanes = [request.id for request in REQUESTS]
        last = max(float(trace.tokens(name)[-1]) for trace in traces.values() for name in lanes)
        heights = (len(lanes), len(lanes) + 2)
        with figure(stem, 3.6, nrows=2, sharex=True, height_ratios=heights) as axes:
            for ax, (policy, trace) in zip(axes, traces.items(), strict=True):
                _lanes(ax, trace, lanes)
                names = list(lanes)
                if policy == LAYERKV:
                    _link(ax, trace, len(lanes))
                    names += ["to host", "from host"]
                ax.set_yticks(range(len(names)), names)
                ax.set_ylim(len(names) - 0.4, -0.6)
                ax.axvline(trace.first_release(), color="black", linewidth=0.6, linestyle="--")
                ax.set_title(f"{ALLOCATORS[policy]} ({policy})", loc="left")
            axes[0].set_xlim(0, last * 1.02)
            axes[1].set_xlabel("seconds (dashed: A ends, the first release)")
            axes[0].legend(frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1.0, 1.1), columnspacing=0.8)


def verdicts(traces: Mapping[str, Trace]) -> list[Verdict]:
    """Of the traces of both allocators."""
    plain, layered = traces[VLLM], traces[LAYERKV]
    after = plain.begins(LONG) - plain.first_release()
    within = Verdict.within
    return [
        within("request-level: long prefill after the first release", PREDICTED, Band(0), after, " s"),
        within("layer-level: steps before the long prefill", PREDICTED, Band(high=AHEAD), layered.steps_before(LONG)),
        Verdict.every(
            "steps before the short prefill, which fits in both", PREDICTED, Band(high=AHEAD),
            {ALLOCATORS[policy]: float(trace.steps_before(SHORT)) for policy, trace in traces.items()},
        ),
    ]  # fmt: skip


def _lanes(ax: Any, trace: Trace, names: list[str]) -> None:
    waiting = QUEUE | {"edgecolor": "black", "linewidth": 0.3}
    for y, name in enumerate(names):
        arrival, begin, tokens = trace.requests[name].arrival, trace.begins(name), trace.tokens(name)
        label = (lambda text: text) if y == 0 else (lambda text: None)
        ax.plot(
            [tokens[0], tokens[-1]], [y, y], color="gray", linewidth=0.8, zorder=0, label=label("parked or stalled")
        )
        ax.barh(y, begin - arrival, 0.7, left=arrival, label=label("waits"), **waiting)
        ax.barh(y, tokens[0] - begin, 0.7, left=begin, label=label("prefill"), **PREFILL)
        bars = [(a, b - a) for a, b in pairwise(tokens) if b - a < PAUSED]
        ax.broken_barh(bars, (y - 0.35, 0.7), facecolor="#009E73", label=label("decodes"))


def _link(ax: Any, trace: Trace, first: int) -> None:
    for lane, out in enumerate((True, False)):
        copies = [copy for step in trace.steps for copy in step.copies if copy.out is out]
        bars = [(copy.start, copy.end - copy.start) for copy in copies]
        ax.broken_barh(bars, (first + lane - 0.3, 0.6), color="#CC79A7", linewidth=0.8)

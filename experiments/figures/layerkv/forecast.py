"""The forecast (ours): layers that leave ahead of need, or when pages are lacking, or not at all."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments import seeded
from experiments.figures.base import PREDICTED, Band, Estimate, Figure, Result, Table, Verdict
from experiments.figures.layerkv.setting import (
    HYGIENE,
    LAYERKV,
    LLAMA2_7B,
    OUTPUT,
    POLICIES,
    estimate,
    hygiene,
    yardsticks,
)
from experiments.figures.layerkv.watched import AHEAD, LATE, WAITED, watch
from experiments.plots import figure
from experiments.points import Point, run_points
from experiments.seeded import Cell, mean, throughput_ratio

PROACTIVE, REACTIVE, OFF = MODES = ("proactive", "reactive", "off")
COUNTED = (PROACTIVE, REACTIVE)  # else nothing leaves
SETTINGS = {
    PROACTIVE: "",
    REACTIVE: "layerkv_forecast=false",
    OFF: "layerkv_forecast=false,layerkv_layerwise=false",  # layers stay together, and on the device
}
CONTEXT, RATE = 2048, 1.0
LOADS = {"full link": "", "a tenth of the link": "link_gbs=2.5"}
WATCHED = "policy=experiments.figures.layerkv.watched:Watched"
COUNTS = (LATE, AHEAD, WAITED)
SHOWN = ("mean_queue_ms", "p99_ttft_ms", "p99_itl_ms", "max_max_gap_ms", "mean_tpot_ms", "steps")
HEADER = (
    "load", "mode", "pages late", "pages ahead", "rows waited", "preemptions", "TTFT ms", "TTFT low",
    "TTFT high", "queue ms", "P99 TTFT ms", "P99 ITL ms", "largest gap ms", "TPOT ms", "steps", "tok/s ratio", *HYGIENE,
)  # fmt: skip
COLORS = {PROACTIVE: "#0072B2", REACTIVE: "#E69F00", OFF: "#D55E00"}
Key = tuple[str, str]  # load, mode
Counts = Mapping[Key, Mapping[str, list[int]]]  # by name, per seed


def point(load: str, mode: str) -> Point:
    """A run, without a seed."""
    extra = ",".join(filter(None, (LOADS[load], SETTINGS[mode])))
    return LLAMA2_7B.fixed(LAYERKV, CONTEXT, RATE, extra=extra)


def count(num_seeds: int) -> Counts:
    """The runs in which layers leave once more, under a policy that counts."""
    keys = [(load, mode) for load in LOADS for mode in COUNTED]
    runs = [
        replace(p, engine=p.engine.replace(POLICIES[LAYERKV], WATCHED, 1), seed=seed)
        for p in (point(*key) for key in keys)
        for seed in range(num_seeds)
    ]
    kept = Path(seeded.KEPT.value) / "layerkv_forecast"
    found = dict(run_points(runs, seeded.PROCESSES.value, kept, watch))
    return {
        key: {name: [found[i * num_seeds + seed][name] for seed in range(num_seeds)] for name in COUNTS}
        for i, key in enumerate(keys)
    }


class Forecast(Figure):
    """What it is good for."""

    title = "Layers that leave by forecast, when pages are lacking, or not at all"
    source = "ours; that LayerKV (arXiv 2410.00428) forecasts free blocks is known, its equation is not"
    about = (
        f"Llama2-7B on one L20 under LayerKV, {CONTEXT} tokens and {OUTPUT} output tokens, {RATE:g} request/s, 100 "
        "requests, over the whole link and a tenth of it. Off: a request is admitted when all its layers fit, and one "
        "is preempted when pages are lacking."
    )

    def points(self, executor: str) -> dict[Hashable, Point]:
        """By (load, mode), and what the place can serve."""
        runs: dict[Hashable, Point] = {(load, mode): point(load, mode) for load in LOADS for mode in MODES}
        return runs | yardsticks(LLAMA2_7B, CONTEXT)

    def evaluate(self, cells: Mapping[Hashable, Cell], executor: str) -> Result:
        """See `Figure`."""
        counts = count(len(cells[next(iter(LOADS)), PROACTIVE]["steps"]))
        rows: list[list[Any]] = []
        for load in LOADS:
            for mode in MODES:
                cell, counted = cells[load, mode], counts.get((load, mode), {})
                left = [float(np.mean(counted.get(name, 0))) for name in COUNTS]
                ttft, shown = estimate(cell, "mean_ttft_ms"), [mean(cell, name) for name in SHOWN]
                means = [mean(cell, "total_preemptions"), ttft.mean, ttft.low, ttft.high, *shown]
                ratio = throughput_ratio(cell, cells[load, PROACTIVE])
                rows.append([load, mode, *left, *means, ratio, *hygiene(cells, LLAMA2_7B, CONTEXT, RATE, cell)])
        notes = [
            "late: pages that begin to leave when a prompt or a row has none, so that it waits for the copy; ahead: by "
            "forecast. Counted in runs of their own, by a policy that decides the same",
            "rows waited: rows that did not decode in a step because pages were on their way out",
        ]
        return Result(Table(HEADER, rows), verdicts(cells, counts), notes)

    def draw(self, result: Result, stem: Path) -> None:
        """Pages that leave, preemptions and TTFT, by load. Where more comes than can be served bars are hollow."""
        panels = {"pages late": "pages that leave\ntoo late", "preemptions": "preemptions", "TTFT ms": "mean TTFT (ms)"}
        at = np.arange(len(LOADS))
        with figure(stem, 3.6, nrows=len(panels), sharex=True) as axes:
            for ax, (name, label) in zip(axes, panels.items(), strict=True):
                for i, mode in enumerate(MODES):
                    values, states = (result.table.column(of, mode=mode) for of in (name, "state"))
                    fill = ["white" if state == "overloaded" else COLORS[mode] for state in states]
                    look = {"color": fill, "edgecolor": COLORS[mode], "linewidth": 1.2, "label": mode}
                    if name == "TTFT ms":
                        ends = [result.table.column(of, mode=mode) for of in ("TTFT low", "TTFT high")]
                        look |= {"yerr": np.abs(np.array(ends) - values), "error_kw": {"linewidth": 0.8}}
                    bars = ax.bar(at + (i - 1) * 0.27, values, 0.24, **look)
                    ax.bar_label(bars, [f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in values], size=6, padding=1)
                ax.set_ylabel(label)
                ax.margins(y=0.2)
            axes[-1].set_yscale("log")
            axes[-1].set_xticks(at, list(LOADS))
            axes[-1].set_xlabel("hollow: more comes than can be served")
            axes[0].legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def verdicts(cells: Mapping[Hashable, Cell], counts: Counts) -> list[Verdict]:
    """Of values per seed. Fewer: the whole interval of the paired ratio lies below 1."""
    fewer, every = Band(high=1 - 1e-9), Verdict.every

    def ratio(name: str, over: Mapping[Hashable, Mapping[str, list[Any]]]) -> dict[str, Estimate | float]:
        pairs = {load: (over[load, PROACTIVE][name], over[load, REACTIVE][name]) for load in LOADS}
        return {load: Estimate.of(np.array(a) / np.array(b)) for load, (a, b) in pairs.items() if min(b) > 0}

    queue_why = "over the whole link what leaves too late has left within a step or two: nobody notices"
    preempted = {mode: {load: mean(cells[load, mode], "total_preemptions") for load in LOADS} for mode in MODES}
    return [
        every("pages that leave too late, over reactive", PREDICTED, fewer, ratio(LATE, counts), "x"),
        every("rows that wait for pages, over reactive", PREDICTED, fewer, ratio(WAITED, counts), "x"),
        every("preemptions, proactive", PREDICTED, Band(0, 0), preempted[PROACTIVE]),
        every("preemptions, off", PREDICTED, Band(1), preempted[OFF]),
        every("time in the queue, over reactive", PREDICTED, fewer, ratio("mean_queue_ms", cells), "x", queue_why),
        every("P99 ITL, over reactive", PREDICTED, fewer, ratio("p99_itl_ms", cells), "x"),
    ]

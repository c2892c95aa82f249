"""Figure 1: TTFT and TPOT over the context length, and how much of TTFT is queueing."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from functools import cache
from pathlib import Path

import numpy as np

from experiments.figures.base import FITTED, PREDICTED, Band, Figure, Result, Table, Verdict
from experiments.figures.layerkv.setting import (
    HYGIENE,
    LLAMA2_7B,
    OUTPUT,
    PAPER,
    STYLES,
    VLLM,
    estimate,
    hygiene,
    kilo,
    queue_share,
    yardsticks,
)
from experiments.plots import PREFILL, QUEUE, figure
from experiments.points import Point
from experiments.seeded import Cell, mean

PUBLISHED = Path(__file__).parents[2] / "published" / "layerkv_fig1.json"
CONTEXTS, RATE = (128, 256, 512, 1024, 2048, 4096, 8192, 16384), 1.0
OUTPUTS = (400, OUTPUT, 512)  # the paper does not say: its TPOT and pool allow for these
FITTED_TO = 512  # the constants of the stack come from contexts up to here; all else is predicted
KNEE = 1024  # a point on the knee may be off by a factor of 10
HEADER = (
    "context", "output", "ttft ms", "ttft low", "ttft high", "tpot ms", "queue share", *HYGIENE,
    "paper ttft ms", "paper tpot ms", "paper queue share",
)  # fmt: skip


@cache
def published() -> dict[str, dict[int, float]]:
    """By series, over the context."""
    return {name: dict(points) for name, points in json.loads(PUBLISHED.read_bytes()).items() if name != "source"}


class Fig1(Figure):
    """Where queueing begins to rule."""

    title = "TTFT and TPOT over the context length, and the share of queueing"
    source = "LayerKV (arXiv 2410.00428), figure 1"
    about = (
        f"Llama2-7B on one L20 under vllm_v0, {RATE:g} request/s, 100 requests of {OUTPUT} output tokens "
        f"({OUTPUTS[0]} and {OUTPUTS[-1]} as a band: the paper does not say)."
    )

    def points(self, executor: str) -> dict[Hashable, Point]:
        """By (context, output), and what a place can serve."""
        runs: dict[Hashable, Point] = {}
        for context in CONTEXTS:
            for output in OUTPUTS:
                runs[context, output] = LLAMA2_7B.fixed(VLLM, context, RATE, output=output)
                runs |= yardsticks(LLAMA2_7B, context, output)
        return runs

    def evaluate(self, cells: Mapping[Hashable, Cell], executor: str) -> Result:
        """See `Figure`."""
        paper, rows = published(), []
        for context in CONTEXTS:
            for output in OUTPUTS:
                cell = cells[context, output]
                ttft = estimate(cell, "mean_ttft_ms")
                ours = [ttft.mean, ttft.low, ttft.high, mean(cell, "mean_tpot_ms"), queue_share(cell).mean]
                theirs = [paper[name].get(context) for name in ("ttft_ms", "tpot_ms", "queue_share")]
                rows.append([context, output, *ours, *hygiene(cells, LLAMA2_7B, context, RATE, cell, output), *theirs])
        return Result(Table(HEADER, rows), self._verdicts(cells))

    def _verdicts(self, cells: Mapping[Hashable, Cell]) -> list[Verdict]:
        paper = published()["ttft_ms"]
        share = {context: queue_share(cells[context, OUTPUT]) for context in CONTEXTS}
        ratio = {c: estimate(cells[c, OUTPUT], "mean_ttft_ms").over(paper[c]) for c in CONTEXTS if c in paper}
        tpot = {str(c): estimate(cells[c, OUTPUT], "mean_tpot_ms") for c in CONTEXTS if c > KNEE}
        knee = next(c for c in CONTEXTS if all(share[longer].mean >= 0.5 for longer in CONTEXTS if longer >= c))
        low = {str(c): value for c, value in ratio.items() if c <= FITTED_TO}
        high = {str(c): value for c, value in ratio.items() if c > KNEE}
        knee_why = "the load there is 0.9: whether a queue forms depends on the arrivals and the output length"
        every = Verdict.every
        return [
            Verdict.within("context from which queueing takes half", PREDICTED, Band(KNEE, 2 * KNEE), knee, " tokens"),
            every(
                f"queue share up to {FITTED_TO}", FITTED, Band(high=0.3),
                {str(c): share[c] for c in CONTEXTS if c <= FITTED_TO},
                why="our prefill of 128 tokens takes 30 ms, the paper's 41: the wait for the running step weighs more",
            ),
            every(
                f"queue share from {2 * KNEE}", PREDICTED, Band(0.9), {str(c): share[c] for c in CONTEXTS if c > KNEE}
            ),
            every(f"TTFT over the paper's up to {FITTED_TO}", FITTED, Band(0.5, 2), low, "x"),
            every(f"TTFT over the paper's from {2 * KNEE}", PREDICTED, Band(0.5, 2), high, "x"),
            Verdict.within(
                f"TTFT over the paper's at {KNEE}, the knee", PREDICTED, Band(0.1, 10), ratio[KNEE], "x", knee_why
            ),
            every(
                "TPOT under saturation", PREDICTED, Band(60, 80), tpot, " ms",
                "just past the knee the pool is full of sequences, and every prefill stalls them; the paper has 69 ms",
            ),
        ]  # fmt: skip

    def draw(self, result: Result, stem: Path) -> None:
        """TTFT and TPOT above, shares below, each with the paper's points."""
        table, paper = result.table, published()
        at = np.arange(len(CONTEXTS))
        of = lambda name, output=OUTPUT: np.array(table.column(name, output=output), float)  # noqa: E731
        with figure(stem, 4.2, nrows=2, sharex=True, height_ratios=(3, 2)) as (top, bottom):
            style = STYLES[VLLM]
            for name, label, color in (("ttft", "TTFT", style["color"]), ("tpot", "TPOT", "#0072B2")):
                band = [of(f"{name} ms", output) for output in (OUTPUTS[0], OUTPUTS[-1])]
                top.fill_between(at, *band, color=color, alpha=0.25, linewidth=0)
                top.plot(at, of(f"{name} ms"), color=color, linewidth=1, label=f"{label}, ours")
                for state, fill in (("stable", color), ("overloaded", "white")):
                    here = [i for i, s in enumerate(table.column("state", output=OUTPUT)) if s == state]
                    top.plot(at[here], of(f"{name} ms")[here], "o", markersize=3.5, color=color, markerfacecolor=fill)
                theirs = of(f"paper {name} ms")
                top.plot(at, theirs, **PAPER | {"label": PAPER["label"] if name == "ttft" else None}, markersize=5)
            top.set_yscale("log")
            top.set_ylabel("mean (ms)")
            top.set_title("Llama2-7B, one L20, 1 request/s; hollow: overloaded\nband: 400 to 512 output tokens")
            top.legend(frameon=False, loc="upper left")
            share = of("queue share")
            bottom.bar(at, 1 - share, 0.7, label="prefill", edgecolor="black", linewidth=0.4, **PREFILL)
            bottom.bar(at, share, 0.7, bottom=1 - share, label="queueing", edgecolor="black", linewidth=0.4, **QUEUE)
            marks = [(i, 1 - paper["queue_share"][c]) for i, c in enumerate(CONTEXTS) if c in paper["queue_share"]]
            bottom.plot(*zip(*marks, strict=True), **PAPER, markersize=5)
            bottom.set_ylabel("share of TTFT")
            bottom.set_ylim(0, 1)
            bottom.set_xticks(at, [kilo(c) for c in CONTEXTS])
            bottom.set_xlabel("context length (tokens)")
            bottom.legend(frameon=True, framealpha=0.9, loc="upper right")

"""Beside figure 6: what its largest gain owes to the number of requests."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from experiments.figures.base import PREDICTED, Band, Estimate, Figure, Result, Table, Verdict
from experiments.figures.layerkv.curves import EQUAL, HEADER, Place, draw_line
from experiments.figures.layerkv.setting import LAYERKV, LLAMA2_7B, OUTPUT, STYLES, VLLM, yardsticks
from experiments.plots import figure
from experiments.points import Point
from experiments.seeded import Cell

CONTEXT = 2048
STABLE, PAPER = RATES = (0.45, 1.0)  # requests/s: three quarters of the baseline's capacity, and the paper's
COUNTS = (25, 50, 100, 200, 400)
SHOWN = (VLLM, LAYERKV)


class Fig6Count(Figure):
    """An unstable queue's TTFT grows for as long as requests come, and so does any ratio to it."""

    title = "how many times lower TTFT is, over the number of requests"
    source = "ours, beside LayerKV (arXiv 2410.00428), figure 6"
    about = (
        f"Llama2-7B on one L20, prompts of {CONTEXT:,} and outputs of {OUTPUT} tokens, at {PAPER:g} request/s, where "
        f"the baseline is overloaded, and at {STABLE:g}/s, where it is not; {COUNTS[0]} to {COUNTS[-1]} requests."
    )

    def points(self, executor: str) -> dict[Hashable, Point]:
        """By (rate, count, policy), and what the place can serve."""
        runs = yardsticks(LLAMA2_7B, CONTEXT)
        for rate in RATES:
            for num in COUNTS:
                runs |= {(rate, num, policy): LLAMA2_7B.fixed(policy, CONTEXT, rate, num) for policy in SHOWN}
        return runs

    def evaluate(self, cells: Mapping[Hashable, Cell], executor: str) -> Result:
        """See `Figure`."""
        full, alone = (cells[what, LLAMA2_7B.name, CONTEXT, OUTPUT] for what in ("full", "alone"))
        places = [
            Place(f"{num} requests, {rate:g}/s", (rate,), rate, {p: cells[rate, num, p] for p in SHOWN}, full, alone)
            for rate in RATES
            for num in COUNTS
        ]
        return Result(Table(("rate", *HEADER), [row for p in places for row in p.rows()]), self._verdicts(places))

    def _verdicts(self, places: Sequence[Place]) -> list[Verdict]:
        stable = {p.where: p.lower_by() for p in places if p.rate == STABLE}
        return [
            Verdict.every(f"times lower with twice as many requests, over before, {PAPER:g}/s", PREDICTED, Band(1),
                          growth([p for p in places if p.rate == PAPER]), "x"),
            Verdict.every(f"times lower at {STABLE:g}/s", PREDICTED, EQUAL, stable, "x",
                          "arrivals are random: below capacity, too, a burst may fill the pool for a while"),
        ]  # fmt: skip

    def draw(self, result: Result, stem: Path) -> None:
        """TTFT of both policies, their ratio, and how many requests miss an objective."""
        table = result.table
        with figure(stem, 4.4, nrows=3, sharex=True, height_ratios=(3, 3, 2)) as (top, middle, bottom):
            for rate, line in zip(RATES, (":", "-"), strict=True):
                of = lambda name, policy: table.column(name, rate=rate, policy=policy)  # noqa: B023, E731
                for policy in SHOWN:
                    seconds = np.array(of("ttft ms", policy), float) / 1e3
                    label = f"{policy}, {rate:g}/s"
                    draw_line(top, COUNTS, seconds, of("state", policy), STYLES[policy], label=label, linestyle=line)
                    missed = of("violations", policy)
                    draw_line(bottom, COUNTS, missed, of("state", policy), STYLES[policy], linestyle=line)
                ends = of("lower by low", LAYERKV), of("lower by high", LAYERKV)
                states, style = of("state", LAYERKV), STYLES[LAYERKV]
                draw_line(middle, COUNTS, of("lower by", LAYERKV), states, style, ends, linestyle=line)
            for axes, label in ((top, "mean TTFT (s)"), (middle, "LayerKV's TTFT,\ntimes lower")):
                axes.set_yscale("log")
                axes.set_ylabel(label)
            top.set_title(f"Llama2-7B, one L20, {CONTEXT:,} tokens\nhollow: overloaded")
            top.legend(frameon=False)
            bottom.set_ylabel("violations")
            bottom.set_ylim(bottom=0)
            bottom.set_xscale("log")
            bottom.set_xticks(COUNTS, [str(num) for num in COUNTS])
            bottom.minorticks_off()
            bottom.set_xlabel("requests")


def growth(places: Sequence[Place]) -> dict[str, Estimate]:
    """From each place to the next, what becomes of the ratio; seeds have the same first requests."""
    found = {}
    for before, after in pairwise(places):
        ratios = [np.array(p.cells[VLLM]["mean_ttft_ms"]) / p.cells[LAYERKV]["mean_ttft_ms"] for p in (before, after)]
        found[after.where] = Estimate.of(ratios[1] / ratios[0])
    return found

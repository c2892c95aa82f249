"""Figure 8: TTFT and tokens/s over the arrival rate, with ShareGPT's lengths."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.figures.base import PREDICTED, Band, Figure, Result, Table, Verdict
from experiments.figures.layerkv import sharegpt
from experiments.figures.layerkv.curves import HEADER, Place, draw_line, equal_below_knee, throughput
from experiments.figures.layerkv.setting import STYLES
from experiments.figures.layerkv.sharegpt import NUM, RATES, SHOWN
from experiments.plots import figure
from experiments.points import Point
from experiments.seeded import Cell

JUST_PAST = (1.0, 1.25)  # times capacity: past the knee, and not far
LEAST_P99_GAIN, PAPER_P99_GAIN, LEAST_SPEED = 10, 45, 0.97

# What is drawn, from top to bottom: column, label, scale, whether its intervals are.
PANELS = (
    ("ttft ms", "mean TTFT (s)", 1e-3, False),
    ("p99 ttft ms", "P99 TTFT (s)", 1e-3, False),
    ("p99 lower by", "P99 TTFT,\ntimes lower", 1.0, True),
    ("tok/s ratio", "tok/s over\nvLLM's", 1.0, True),
)


class Fig8(Figure):
    """Where queueing begins with lengths as people write them."""

    title = "mean and P99 TTFT and tokens/s over the arrival rate, ShareGPT's lengths"
    source = "LayerKV (arXiv 2410.00428), figure 8 (its number and rates are not certain)"
    about = (
        f"Llama2-7B on one L20; {NUM} requests with the lengths of ShareGPT's first turns at {RATES[0]:g} to "
        f"{RATES[-1]:g} requests/s."
    )

    def points(self, executor: str) -> dict[Hashable, Point]:
        """See `sharegpt.points`."""
        return sharegpt.points(SHOWN)

    def evaluate(self, cells: Mapping[Hashable, Cell], executor: str) -> Result:
        """See `Figure`."""
        places = sharegpt.places(cells)
        return Result(Table(("rate", *HEADER), [row for p in places for row in p.rows()]), self._verdicts(places))

    def _verdicts(self, places: Sequence[Place]) -> list[Verdict]:
        return [
            equal_below_knee(places, "mean_ttft_ms", "mean TTFT"),
            equal_below_knee(places, "p99_ttft_ms", "P99 TTFT"),
            p99_gain_past_the_knee(places),
            throughput(places, LEAST_SPEED, "sequences that were admitted early wait, parked, for others to end"),
        ]

    def draw(self, result: Result, stem: Path) -> None:
        """TTFT, its P99, how many times lower that is, tokens/s."""
        table = result.table
        with figure(stem, 5.2, nrows=len(PANELS), sharex=True) as panels:
            capacity = table.column("rate")[0] / table.column("load")[0]
            for axes, (name, label, scale, spread) in zip(panels, PANELS, strict=True):
                for policy in SHOWN:
                    of = lambda key: scale * np.array(table.column(key, policy=policy))  # noqa: B023, E731
                    states, rates = table.column("state", policy=policy), table.column("rate", policy=policy)
                    ends = (of(f"{name} low"), of(f"{name} high")) if spread else None
                    draw_line(axes, rates, of(name), states, STYLES[policy], ends, label=policy)
                axes.set_ylabel(label)
                axes.axvline(capacity, color="gray", linewidth=0.6, linestyle=":", zorder=0)
            for axes in panels[:3]:
                axes.set_yscale("log")
            panels[0].set_title("Llama2-7B, one L20, ShareGPT's lengths\nhollow: overloaded; dotted: vLLM's capacity")
            panels[0].legend(frameon=False, loc="upper left", fontsize=6)
            panels[3].set_xlabel("requests/s")


def p99_gain_past_the_knee(places: Sequence[Place]) -> Verdict:
    """At the load just past the knee where it is largest."""
    low, high = JUST_PAST
    found = {p.where: p.lower_by("p99_ttft_ms") for p in places if low <= p.load <= high}
    best = max(found, key=lambda where: found[where].mean, default=None)
    return Verdict.every(
        f"P99 TTFT, times lower, loads {low:g} to {high:g}, where most (the paper's: {PAPER_P99_GAIN})",
        PREDICTED,
        Band(LEAST_P99_GAIN),
        {best: found[best]} if best else {},
        "x",
        "seeds differ in load: in some of them the baseline's queue is short, and the interval wide",
    )

"""Figure 9: how many requests miss an objective, over the arrival rate; without the SLO rule; by length predictor."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.figures.base import PREDICTED, Band, Figure, Result, Table, Verdict
from experiments.figures.layerkv import sharegpt
from experiments.figures.layerkv.curves import HEADER, Place, draw_line, more_than_vllm_somewhere
from experiments.figures.layerkv.setting import LAYERKV, NO_RULE, STYLES
from experiments.figures.layerkv.sharegpt import NUM, RATES, SHOWN, VARIANTS
from experiments.paper_models import SLO_TPOT_MS, SLO_TTFT_MS
from experiments.plots import figure
from experiments.points import Point
from experiments.seeded import Cell

VARIED_AT = RATES[3:]  # where the rule has something to weigh
LEAST_GAP, PAPER_GAP = 0.15, ".177 to .287"
DODGE = 0.03  # requests/s, so that intervals stand side by side
OTHERS = dict(zip(VARIANTS, (("black", "X"), ("#009E73", "D"), ("#CC79A7", "P"), ("#E69F00", "v")), strict=True))


class Fig9(Figure):
    """Whether what LayerKV wins in TTFT is worth what it costs in TPOT."""

    title = "requests that miss an objective over the arrival rate, ShareGPT's lengths"
    source = "LayerKV (arXiv 2410.00428), figure 9 (its number and rates are not certain)"
    about = (
        f"The runs of figure 8 ({NUM} requests each); objectives: TTFT {SLO_TTFT_MS:,} ms, TPOT {SLO_TPOT_MS} ms. "
        "Beside LayerKV: its rule as in the paper, which knows TPOT alone; and lengths from an oracle, buckets "
        "that are right in 85%, and the mean, in place of a quantile of past outputs."
    )

    def points(self, executor: str) -> dict[Hashable, Point]:
        """See `sharegpt.points`."""
        return sharegpt.points(SHOWN) | sharegpt.points(tuple(VARIANTS), VARIED_AT)

    def evaluate(self, cells: Mapping[Hashable, Cell], executor: str) -> Result:
        """See `Figure`."""
        places = sharegpt.places(cells)
        return Result(Table(("rate", *HEADER), [row for p in places for row in p.rows()]), self._verdicts(places))

    def _verdicts(self, places: Sequence[Place]) -> list[Verdict]:
        fewer = {p.where: p.fewer_violations() for p in places}
        most = max(fewer, key=lambda where: fewer[where].mean)
        name = f"largest difference (the paper's: {PAPER_GAP})"
        return [
            Verdict.every("vLLM's violations less LayerKV's", PREDICTED, Band(0), fewer),
            Verdict.every(
                name,
                PREDICTED,
                Band(LEAST_GAP),
                {most: fewer[most]},
                why="seeds of 400 requests differ in their load, so that the interval is wide",
            ),
            more_than_vllm_somewhere(
                places,
                NO_RULE,
                "prompts of ShareGPT are short, 35 tokens in the median: to admit them all hardly stalls decodes; "
                "prompts of 4,096 tokens do (figure 6)",
            ),
        ]

    def draw(self, result: Result, stem: Path) -> None:
        """Policies above; below, what each has fewer than the baseline, with length predictors."""
        table = result.table
        styles = STYLES | {name: {"color": color, "marker": marker} for name, (color, marker) in OTHERS.items()}
        with figure(stem, 4.4, nrows=2, sharex=True, height_ratios=(2, 3)) as (top, bottom):
            of = lambda name, policy: np.array(table.column(name, policy=policy))  # noqa: E731
            for policy in SHOWN:
                states = of("state", policy)
                draw_line(top, of("rate", policy), 100 * of("violations", policy), states, styles[policy], label=policy)
            below = (NO_RULE, LAYERKV, *VARIANTS)
            for i, policy in enumerate(below):
                x = of("rate", policy) + DODGE * (i - len(below) / 2)
                ends = 100 * of("fewer low", policy), 100 * of("fewer high", policy)
                label = {LAYERKV: "LayerKV, quantile"}.get(policy, policy)
                draw_line(bottom, x, 100 * of("fewer", policy), of("state", policy), styles[policy], ends, label=label)
            capacity = table.column("rate")[0] / table.column("load")[0]
            for axes in (top, bottom):
                axes.axvline(capacity, color="gray", linewidth=0.6, linestyle=":", zorder=0)
                axes.legend(frameon=False, loc="upper left", fontsize=6)
            top.set_ylim(bottom=0)
            top.set_ylabel("requests that violate (%)")
            top.set_title("Llama2-7B, one L20, ShareGPT's lengths\nhollow: overloaded; dotted: vLLM's capacity")
            bottom.axhline(0, color="gray", linewidth=0.6, zorder=0)
            bottom.set_ylabel("fewer than vLLM's (points)")
            bottom.set_xlabel("requests/s")

"""Figure 6: TTFT, TPOT and tokens/s over the context length, for three models."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.figures.base import PREDICTED, Band, Estimate, Figure, Result, Table, Verdict
from experiments.figures.layerkv.curves import (
    HEADER,
    Place,
    draw_line,
    equal_below_knee,
    more_than_vllm_somewhere,
    throughput,
    tpot_where_served,
)
from experiments.figures.layerkv.setting import (
    LLAMA2_7B,
    LLAMA3_70B,
    NO_RULE,
    OUTPUT,
    POLICIES,
    STYLES,
    YI_34B,
    kilo,
    yardsticks,
)
from experiments.paper_models import SLO_TPOT_MS
from experiments.plots import figure
from experiments.points import Point
from experiments.seeded import Cell

# Requests/s. The paper's for Llama2-7B; those of the others could not be read, and are where their load at 2,048 tokens
# is that of Llama2-7B (`paper_layerkv`).
RATES = {LLAMA2_7B: 1.0, YI_34B: 0.65, LLAMA3_70B: 0.338}
# At 16,384 tokens a request that is alone takes 10 and 25 s on the larger models, several times the objective.
SHORT = (512, 1024, 2048, 4096)
CONTEXTS = {LLAMA2_7B: (*SHORT, 16384), YI_34B: SHORT, LLAMA3_70B: SHORT}
LONGEST = CONTEXTS[LLAMA2_7B]
LEAST_GAIN, PAPER_GAIN, LEAST_SPEED = 20, 69, 0.95
# What is drawn, from top to bottom: column, label, scale, whether its intervals are.
PANELS = (
    ("ttft ms", "mean TTFT (s)", 1e-3, False),
    ("p99 ttft ms", "P99 TTFT (s)", 1e-3, False),
    ("lower by", "TTFT,\ntimes lower", 1.0, True),
    ("tpot ms", "TPOT (ms)", 1.0, False),
    ("tok/s ratio", "tok/s over\nvLLM's", 1.0, True),
)


class Fig6(Figure):
    """Where LayerKV helps, and what it costs."""

    title = "TTFT, TPOT and tokens/s over the context length, three models"
    source = "LayerKV (arXiv 2410.00428), figure 6 (its number and rates are not certain)"
    about = (
        f"100 requests of {OUTPUT} output tokens, {', '.join(f'{s.name}: {rate:g}/s' for s, rate in RATES.items())}, "
        "under vLLM's policy, LayerKV without and with its SLO rule, and parking of whole requests."
    )

    def points(self, executor: str) -> dict[Hashable, Point]:
        """By (model, context, policy), and what a place can serve."""
        runs: dict[Hashable, Point] = {}
        for setup, rate in RATES.items():
            for context in CONTEXTS[setup]:
                runs |= yardsticks(setup, context)
                runs |= {(setup.name, context, policy): setup.fixed(policy, context, rate) for policy in POLICIES}
        return runs

    def evaluate(self, cells: Mapping[Hashable, Cell], executor: str) -> Result:
        """See `Figure`."""
        places = [
            Place(
                f"{setup.name.split(',')[0]} at {kilo(context)}",
                (setup.name, context, rate),
                rate,
                {policy: cells[setup.name, context, policy] for policy in POLICIES},
                cells["full", setup.name, context, OUTPUT],
                cells["alone", setup.name, context, OUTPUT],
            )
            for setup, rate in RATES.items()
            for context in CONTEXTS[setup]
        ]
        rows = [row for place in places for row in place.rows()]
        return Result(Table(("model", "context", "rate", *HEADER), rows), self._verdicts(places))

    def _verdicts(self, places: Sequence[Place]) -> list[Verdict]:
        return [
            equal_below_knee(places, "mean_ttft_ms", "mean TTFT"),
            Verdict.every(
                f"largest gain in mean TTFT of each model (the paper's: {PAPER_GAIN})",
                PREDICTED,
                Band(LEAST_GAIN),
                largest_gains(places),
                "x",
                "prefills of larger models take seconds, so compute is short, too: under 20 with no rule, as well",
            ),
            tpot_where_served(places, SLO_TPOT_MS),
            throughput(
                places,
                LEAST_SPEED,
                "at several times the capacity, sequences that wait hold their tails and some layers on the device",
            ),
            more_than_vllm_somewhere(places, NO_RULE),
        ]

    def draw(self, result: Result, stem: Path) -> None:
        """A column per model; TTFT, its P99, how many times lower it is, TPOT, tokens/s."""
        table = result.table
        with figure(stem, 6.2, nrows=len(PANELS), ncols=len(RATES), sharex=True, sharey="row") as axes:
            for column, (setup, rate) in zip(axes.T, RATES.items(), strict=True):
                for panel, (name, _, scale, spread) in zip(column, PANELS, strict=True):
                    for policy, style in STYLES.items():
                        where = {"model": setup.name, "policy": policy}
                        of = lambda key: scale * np.array(table.column(key, **where), float)  # noqa: B023, E731
                        ends = (of(f"{name} low"), of(f"{name} high")) if spread else None
                        x = [LONGEST.index(context) for context in CONTEXTS[setup]]
                        draw_line(panel, x, of(name), table.column("state", **where), style, ends, label=policy)
                    if name != "tok/s ratio":
                        panel.set_yscale("log")
                column[0].set_title(f"{setup.name.replace(', ', chr(10))}, {rate:g}/s")
                for panel, level in ((column[2], 1), (column[3], SLO_TPOT_MS), (column[4], 1)):
                    panel.axhline(level, color="gray", linewidth=0.6, zorder=0)
                column[-1].set_xticks(range(len(LONGEST)), [f"{c / 1024:g}" for c in LONGEST], size=6)
            for panel, (_, label, *_) in zip(axes[:, 0], PANELS, strict=True):
                panel.set_ylabel(label)
            axes[-1, 1].set_xlabel("context length (1,024 tokens); hollow: overloaded")
            handles, labels = axes[0, 0].get_legend_handles_labels()
            axes[0, 0].figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)


def largest_gains(places: Sequence[Place]) -> dict[str, Estimate]:
    """Of each model, how many times lower its mean TTFT is at the context where that is most."""
    best: dict[str, Place] = {}
    for place in places:
        model = place.at[0]
        if model not in best or place.lower_by().mean > best[model].lower_by().mean:
            best[model] = place
    return {place.where: place.lower_by() for place in best.values()}

"""Figure 7: TTFT over the tensor degree: the more devices, the larger the pool."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from experiments.figures.base import PREDICTED, Band, Figure, Result, Table, Verdict
from experiments.figures.layerkv.curves import HEADER, Place, draw_line
from experiments.figures.layerkv.setting import LAYERKV, LLAMA2_7B, OUTPUT, STYLES, VLLM, Setup, engine_of, yardsticks
from experiments.plots import figure
from experiments.points import Point
from experiments.seeded import Cell

CONTEXT, RATE = 2048, 1.0  # of figure 1
SETUPS = [Setup(f"Llama2-7B, {n} L20", LLAMA2_7B.model, n) for n in (1, 2, 4, 8)]
SHOWN = (VLLM, LAYERKV)
FALLS, NOT_MORE = Band(high=0.5), Band(high=1.1)


class Fig7(Figure):
    """Memory that is not scarce needs no LayerKV."""

    title = "TTFT over the tensor degree"
    source = "LayerKV (arXiv 2410.00428), figure 7 (its number and setting are not certain)"
    about = f"Llama2-7B on 1 to 8 L20s, 100 requests of {CONTEXT:,} and {OUTPUT} tokens, {RATE:g}/s."

    def points(self, executor: str) -> dict[Hashable, Point]:
        """By (setup, policy), and what the places can serve."""
        runs: dict[Hashable, Point] = {}
        for setup in SETUPS:
            runs |= yardsticks(setup, CONTEXT)
            runs |= {(setup.name, policy): setup.fixed(policy, CONTEXT, RATE) for policy in SHOWN}
        return runs

    def evaluate(self, cells: Mapping[Hashable, Cell], executor: str) -> Result:
        """See `Figure`."""
        places = [
            Place(
                f"{setup.tensor} L20s",
                (setup.tensor, pool_tokens(setup)),
                RATE,
                {policy: cells[setup.name, policy] for policy in SHOWN},
                *(cells[what, setup.name, CONTEXT, OUTPUT] for what in ("full", "alone")),
            )
            for setup in SETUPS
        ]
        rows = [row for place in places for row in place.rows()]
        return Result(Table(("tensor", "pool tokens", *HEADER), rows), self._verdicts(places))

    def _verdicts(self, places: Sequence[Place]) -> list[Verdict]:
        gains = {place.where: place.lower_by().mean for place in places}
        first, *rest = gains
        over_one = {name: gains[name] / gains[first] for name in rest}
        over_half = {more: gains[more] / gains[fewer] for fewer, more in pairwise(gains)}
        return [
            Verdict.every("times lower TTFT, over that on one L20", PREDICTED, FALLS, over_one, "x"),
            Verdict.every("times lower TTFT, over that on half as many", PREDICTED, NOT_MORE, over_half, "x"),
        ]

    def draw(self, result: Result, stem: Path) -> None:
        """TTFT of both policies above, their ratio below."""
        table, x = result.table, range(len(SETUPS))
        of = lambda name, policy=LAYERKV: np.array(table.column(name, policy=policy))  # noqa: E731
        states = of("state")
        with figure(stem, 3.2, nrows=2, sharex=True, height_ratios=(3, 2)) as (top, bottom):
            for policy in SHOWN:
                draw_line(top, x, of("ttft ms", policy) / 1e3, states, STYLES[policy], label=policy)
            top.set_ylabel("mean TTFT (s)")
            top.set_title(f"Llama2-7B, {CONTEXT:,} tokens, {RATE:g} request/s\nhollow: overloaded")
            top.legend(frameon=False)
            ends = of("lower by low"), of("lower by high")
            draw_line(bottom, x, of("lower by"), states, STYLES[LAYERKV], ends)
            bottom.axhline(1, color="gray", linewidth=0.6, zorder=0)
            bottom.set_ylabel("LayerKV's TTFT,\ntimes lower")
            for axes in (top, bottom):
                axes.set_yscale("log")
            pools = zip(of("tensor"), of("pool tokens"), strict=True)
            bottom.set_xticks(x, [f"{n}\n{tokens / 1e3:,.0f}K" for n, tokens in pools])
            bottom.set_xlabel("L20s; tokens that their pool holds")


def pool_tokens(setup: Setup) -> int:
    """What the devices have room for."""
    engine = engine_of(setup.fixed(VLLM, CONTEXT, RATE))
    return engine.num_pages // engine.model_config.num_layers * engine.config.cache.page_size

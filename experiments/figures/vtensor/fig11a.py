"""Figure 11a: the memory that is held, over the number of sequences."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path

import numpy as np

from experiments.figures.base import ARITHMETIC, FITTED, Band, Figure, Result, Table, Verdict
from experiments.figures.vtensor.accounting import PAGE_GIB, ROW_GIB, fill, make, page_gib, row_gib
from experiments.figures.vtensor.setting import PAPER, published
from experiments.plots import figure
from experiments.seeded import Cell

TOKENS = 12288  # the longest of the paper's sequences: prompts of 6K to 8K, outputs of 2K to 4K
SLOPE = row_gib(TOKENS)  # GiB per sequence
CLOSE, CAP = Band(0.97, 1.03), 77.0
HEADER = (
    "sequences",
    "paged held GiB",
    "paged in use GiB",
    "in the store",
    "vTensor GiB",
    "paper vLLM",
    "paper FlexInfer",
)
LOW_WHY = (
    "the paper's points at 1 and 4 sequences lie 0.96 GiB, more than 7 rows, below the line through all others: as if "
    "a sequence had not been counted; the paper does not say when the memory was read"
)


def base(flexinfer: Mapping[int, float], cap: float) -> float:
    """GiB without a sequence: what is left of the paper's points below the cap, less our slope; their median."""
    return float(np.median([gib - SLOPE * num for num, gib in flexinfer.items() if gib < cap]))


class Fig11a(Figure):
    """The pool that is claimed at once, and rows that are claimed as sequences come."""

    title = "Memory held over the number of sequences"
    source = f"{PAPER}, figure 11a"
    about = (
        f"Yi-6B on one A100, sequences of {TOKENS} tokens: the store `paged`, and vTensor by a formula, rows filled "
        "and one ahead (there is no such store yet). Nothing is run."
    )

    def evaluate(self, cells: Mapping[Hashable, Cell], executor: str) -> Result:
        """See `Figure`."""
        paper = {name: {int(n): gib for n, gib in points} for name, points in published("fig11a", "memory").items()}
        vllm, flex = paper["vllm"], paper["flexinfer"]
        budget = max(vllm.values())  # what vLLM was given: an input
        empty = base(flex, budget)
        room = budget - empty
        full = int(room // SLOPE), fill(make("paged", room, max(vllm), TOKENS), max(vllm), TOKENS)  # vTensor, paged
        rows = []
        for num in sorted({*vllm, *full}):
            store = make("paged", room, max(vllm), TOKENS)
            there = fill(store, num, TOKENS)
            held, in_use = (empty + pages * PAGE_GIB for pages in (store.num_pages, store.num_mapped_pages))
            vtensor = empty + min(room // ROW_GIB * ROW_GIB, SLOPE * num)
            rows.append([num, held, in_use, there, vtensor, vllm.get(num), flex.get(num)])
        table = Table(HEADER, rows)
        notes = [
            f"inputs from the paper's points: {budget} GiB as the budget (vLLM's line), {empty:.2f} GiB without a "
            "sequence (FlexInfer's)",
            f"a row is 2 MiB for K and for V in each layer, {ROW_GIB * 1024:.0f} MiB: {SLOPE / ROW_GIB:.0f} of them "
            f"make {SLOPE} GiB per sequence, where pages take {page_gib(TOKENS):g}",
            f"vTensor is full with {full[0]} sequences, paged with {full[1]}",
        ]
        return Result(table, verdicts(table, flex, budget), notes)

    def draw(self, result: Result, stem: Path) -> None:
        """Lines for ours, crosses for the paper's points."""
        x = np.array(result.table.column("sequences"), float)
        of = lambda name: np.array(result.table.column(name), float)  # noqa: E731
        with figure(stem, 2.5) as axis:
            axis.plot(x, of("paged held GiB"), color="#D55E00", linewidth=1, label="paged: held (as in vLLM)")
            axis.plot(x, of("paged in use GiB"), color="#D55E00", linewidth=1, linestyle=":", label="paged: in use")
            axis.plot(x, of("vTensor GiB"), color="#0072B2", linewidth=1, label="vTensor, by formula")
            axis.plot(x, of("paper vLLM"), "+", color="black", markersize=5, label="paper, vLLM")
            axis.plot(x, of("paper FlexInfer"), "x", color="black", markersize=5, label="paper, FlexInfer")
            axis.set_ylim(0, 80)
            axis.set_xticks((1, 16, 32, 64, 128))
            axis.set_xlabel(f"sequences of {TOKENS // 1024}K tokens")
            axis.set_ylabel("GPU memory (GiB)")
            axis.legend(frameon=False, loc="lower right")


def verdicts(table: Table, flexinfer: Mapping[int, float], budget: float) -> list[Verdict]:
    """The slope, the flat line, the cap, and every point."""
    below = {num: gib for num, gib in flexinfer.items() if gib < budget}
    plotted = float(np.polyfit(list(below), list(below.values()), 1)[0])
    ours = dict(zip(table.column("sequences"), table.column("vTensor GiB"), strict=True))
    held = table.column("paged held GiB")
    ratios = {f"n = {num}": ours[num] / gib for num, gib in flexinfer.items()}
    within = Verdict.within
    return [
        within(
            "vTensor: GiB per sequence over the slope of the paper's points", ARITHMETIC, CLOSE, SLOPE / plotted, "x"
        ),
        within("paged: held with the most sequences over the least", ARITHMETIC, Band(1, 1), held[-1] / held[0], "x"),
        within("vTensor: the cap over 77 GiB", ARITHMETIC, CLOSE, max(ours.values()) / CAP, "x"),
        Verdict.every("vTensor: GiB over the paper's", FITTED, CLOSE, ratios, "x", LOW_WHY),
    ]

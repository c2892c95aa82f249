"""Figure 2: what the device's memory holds under each allocator, over the batch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.figures.base import ARITHMETIC, Band, Figure, Result, Table, Verdict
from experiments.figures.vtensor.accounting import PAGE_GIB, fill, make
from experiments.figures.vtensor.setting import PAPER, published
from experiments.plots import figure
from experiments.seeded import Cell

TOTAL, STATIC = 80.0, 13.45  # GiB: the device; weights and activations, as the paper's bars have them
BATCHES, TOKENS, MAX_CONTEXT = (8, 16, 32, 64), 4096, 32768
PANELS = {"native": "native", "paged": "vllm", "vTensor": "flexinfer"}  # of the paper, by our allocator
SEGMENTS = ("weights, activations", "KV", "fragmentation", "reservation", "free")
SERIES = ("weights_activations", "kv_cache", "kv_fragmentation", "reservation", "free")  # the paper's names for them
LIMIT = Band(0.98, 1.02)
JUDGED = {"native": ("KV", "fragmentation", "reservation"), "paged": ("KV", "reservation")}
HEADER = ("allocator", "batch", "state", *(f"{s} GiB" for s in SEGMENTS), *(f"paper {s}" for s in SEGMENTS))
COLORS: dict[str, dict[str, Any]] = {  # Okabe and Ito's palette; hatches keep segments apart in print
    "weights, activations": {"color": "#999999"},
    "KV": {"color": "#0072B2"},
    "fragmentation": {"color": "#D55E00", "hatch": "////"},
    "reservation": {"color": "#E69F00", "hatch": "...."},
    "free": {"color": "white"},
}
NO_STORE = "no store yet: its bars are the paper's"
LEFTOVER = (
    "at batch 32 the paper's segments add up to 80.05 GB and what is left of the bar, 2.4 GB, is read to 0.1 GB; ours "
    "is 80 - 13.45 - 64 GiB"
)
NOTES = [
    f"inputs: {TOTAL:g} GiB, {STATIC} GiB of weights and activations, {TOKENS} tokens in each sequence, a context of "
    f"{MAX_CONTEXT}; the paper does not name the model, its segments are Yi-6B's",
    f"vTensor: {NO_STORE}",
    "the paper's slivers of 0.12 GB of fragmentation in vLLM at batch 8 and 64, but not between, are not compared",
]


def segments(allocator: str, batch: int) -> dict[str, float] | None:
    """GiB of each segment with so many sequences in the store, None: they do not fit."""
    store = make(allocator, TOTAL - STATIC, max(BATCHES), MAX_CONTEXT)
    if fill(store, batch, TOKENS) < batch:
        return None
    used = store.num_mapped_pages * PAGE_GIB
    taken = (store.num_pages - store.num_free_pages) * PAGE_GIB
    return dict(zip(SEGMENTS, (STATIC, used, taken - used, TOTAL - STATIC - taken, 0.0), strict=True))


def paper_segments(allocator: str, batch: int) -> dict[str, float | None]:
    """The paper's, where it draws them."""
    panel = published("fig2", PANELS[allocator])
    return {ours: dict(panel.get(theirs, ())).get(batch) for ours, theirs in zip(SEGMENTS, SERIES, strict=True)}


class Fig2(Figure):
    """The stores' own books against the paper's bars."""

    title = "GPU memory by allocator: KV, fragmentation, reservation, free"
    source = f"{PAPER}, figure 2"
    about = (
        f"Yi-6B on one A100: the stores `native` and `paged` filled with sequences of {TOKENS} tokens. Nothing is run."
    )

    def evaluate(self, cells: Mapping[Hashable, Cell], executor: str) -> Result:
        """See `Figure`."""
        rows, ratios = [], {(a, s): {} for a, judged in JUDGED.items() for s in judged}
        for allocator in PANELS:
            for batch in BATCHES:
                ours = segments(allocator, batch) if allocator in JUDGED else None
                paper = paper_segments(allocator, batch)
                state = "no store" if allocator not in JUDGED else "fits" if ours else "out of memory"
                rows.append([allocator, batch, state, *(ours or dict.fromkeys(SEGMENTS)).values(), *paper.values()])
                for segment in JUDGED.get(allocator, ()):
                    if ours and (known := paper[segment]):
                        ratios[allocator, segment][f"batch {batch}"] = ours[segment] / known
        return Result(Table(HEADER, rows), verdicts(ratios), NOTES)

    def draw(self, result: Result, stem: Path) -> None:
        """Bars by allocator, the tops of the paper's segments as crosses."""
        at = np.arange(len(BATCHES))
        with figure(stem, 2.9, ncols=len(PANELS), sharey=True) as axes:
            for axis, allocator in zip(axes, PANELS, strict=True):
                of = lambda name, a=allocator: np.array(result.table.column(name, allocator=a), float)  # noqa: E731
                theirs = np.array([of(f"paper {s}") for s in SEGMENTS])  # [segments, batches]
                ours = np.array([of(f"{s} GiB") for s in SEGMENTS])
                height = ours if allocator in JUDGED else np.nan_to_num(theirs)
                for segment, part, below in zip(SEGMENTS, height, height.cumsum(0) - height, strict=True):
                    look = COLORS[segment] | ({} if allocator in JUDGED else {"alpha": 0.45})
                    axis.bar(at, part, 0.75, bottom=below, edgecolor="black", linewidth=0.4, label=segment, **look)
                if allocator in JUDGED:
                    tops = np.where(np.isnan(theirs), np.nan, np.nancumsum(theirs, 0))
                    for top in tops:
                        axis.plot(at, top, "x", color="black", markersize=4)
                for i in at[np.isnan(of("paper KV"))]:
                    axis.text(i, 3, "out of memory", rotation=90, ha="center", va="bottom", size=7)
                axis.set_xlim(-0.6, len(at) - 0.4)
                axis.set_xticks(at, [str(b) for b in BATCHES])
                axis.set_title(allocator if allocator in JUDGED else f"{allocator}\n(paper's only)")
            axes[0].set_ylabel("GPU memory (GiB)")
            axes[1].set_xlabel("batch (sequences of 4K tokens); crosses: paper")
            sheet, (marks, names) = axes[0].figure, axes[0].get_legend_handles_labels()
            sheet.legend(marks, names, loc="outside upper center", ncols=3, frameon=False)


def verdicts(ratios: Mapping[tuple[str, str], Mapping[str, float]]) -> list[Verdict]:
    """Ours over the paper's, and that native does not hold the largest batch."""
    said = [
        Verdict.every(
            f"{allocator}: {segment} over the paper's", ARITHMETIC, LIMIT, found, "x",
            LEFTOVER if (allocator, segment) == ("native", "reservation") else "",
        )
        for (allocator, segment), found in ratios.items()
    ]  # fmt: skip
    holds = fill(make("native", TOTAL - STATIC, max(BATCHES), MAX_CONTEXT), max(BATCHES), TOKENS)
    name = f"native: sequences that fit, so {BATCHES[-2]} do and {BATCHES[-1]} do not"
    said.append(Verdict.within(name, ARITHMETIC, Band(BATCHES[-2], BATCHES[-1] - 1), holds))
    return [*said, Verdict("vTensor: KV, reservation, free", ARITHMETIC, LIMIT.words("x"), NO_STORE, None)]

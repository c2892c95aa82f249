"""Figure 7: decode attention over the batch, the length and the KV heads; the batch sweep predicts the others."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path

from experiments.figures.base import FITTED, PREDICTED, Figure, Result
from experiments.figures.vtensor import kernel_times
from experiments.figures.vtensor.kernel_times import LEFT_OUT, Timed
from experiments.figures.vtensor.setting import FA_NATIVE, FA_PAGED, FLEXINFER, PAPER, VLLM, decode_us, figures
from experiments.fit_paper_kernels import decode_points
from experiments.seeded import Cell

PANELS = {
    "batch": ("sequences of 16K tokens, 4 KV heads", ("1", "8", "16", "32")),
    "length": ("tokens of 16 sequences, 4 KV heads", ("1K", "4K", "16K", "64K")),
    "kv_heads": ("KV heads, 16 sequences of 16K tokens", ("1", "4", "8", "32")),
}
VARIED = {"batch": 0, "length": 1, "kv_heads": 2}  # place of the x of each sweep in (batch, tokens, KV heads)
FITTED_AT = {(batch, 16384, 4) for batch in (1, 8, 16, 32)}  # the batch sweep, wherever its shapes come again
BANDS = {VLLM: 0.15, FLEXINFER: 0.15, FA_NATIVE: 0.15, FA_PAGED: 0.25}
WHY = {
    FA_NATIVE: "one share of the bandwidth stands for all shapes, fitted to batches at 4 KV heads where it is 0.70 to "
    "0.83; with 32 KV heads, 8 times the bytes, the paper's kernel reaches 0.88",
}
NOTES = [
    "only the constants come from the batch sweep: the forms of the models (a serial chain, general cores) were chosen "
    "with all of the figure in sight",
    "shapes of the batch sweep that the other sweeps repeat count as fitted; paged FlashAttention at batch 1 takes 0.6 "
    "of its time at every other batch and was left out",
    "the band of contiguous FlashAttention is FlexInfer's",
]


class Fig7(Figure):
    """Constants fitted to one sweep against two others."""

    title = "Decode attention kernels over batch, length and KV heads"
    source = f"{PAPER}, figure 7"
    about = "Kernel models on one A100, fitted to the batch sweep; length and KV heads are predictions. Nothing is run."

    def evaluate(self, cells: Mapping[Hashable, Cell], executor: str) -> Result:
        """See `Figure`."""
        points = timed()
        return Result(
            kernel_times.table(points),
            kernel_times.verdicts(points, BANDS, WHY),
            [*NOTES, speedups(points)],
            points,
        )

    def draw(self, result: Result, stem: Path) -> None:
        """A panel per sweep."""
        kernel_times.draw(result.extra, stem, PANELS, "decode attention of a layer, A100", "us")


def timed() -> list[Timed]:
    """Every point of the three sweeps."""
    points = []
    for kernels in BANDS:
        for sweep, varied in VARIED.items():
            for *shape, seconds in decode_points(figures(), kernels, sweep):
                batch, tokens, kv_heads = shape
                kind = FITTED if tuple(shape) in FITTED_AT else PREDICTED
                if kernels == FA_PAGED and batch == 1:
                    kind = LEFT_OUT
                ours = decode_us(kernels, batch, tokens, kv_heads)
                points.append(Timed(sweep, shape[varied], kernels, kind, ours, 1e6 * seconds))
    return points


def speedups(points: list[Timed]) -> str:
    """How many times faster FlexInfer is than vLLM where that is predicted, ours beside the plotted."""
    by_place = {(p.kernels, p.sweep, p.x): p for p in points if p.kind == PREDICTED}
    said = []
    for (kernels, *place), slow in by_place.items():
        if kernels == VLLM:
            fast = by_place[FLEXINFER, *place]
            said.append(f"{place[0]} {place[1]} {slow.ours / fast.ours:.2f} ({slow.paper / fast.paper:.2f})")
    return f"vLLM over FlexInfer, ours (paper's): {', '.join(said)}"

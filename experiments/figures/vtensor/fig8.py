"""Figure 8: prefill attention behind a cached prefix, over the batch and over the prefix's share of the prompt."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path

from experiments.figures.base import FITTED, PREDICTED, Band, Figure, Result, Verdict
from experiments.figures.vtensor import kernel_times
from experiments.figures.vtensor.kernel_times import Timed
from experiments.figures.vtensor.setting import FA_NATIVE, FA_PAGED, FLEXINFER, PAPER, VLLM, figures, prefill_us
from experiments.fit_paper_kernels import LENGTH, prefill_points
from experiments.seeded import Cell

PANELS = {
    "batch": ("prompts, half of each cached", ("1", "4", "8", "16")),
    "prefix_ratio": ("cached share of 8 prompts", ("0.25", "0.5", "0.75")),
}
LIMIT = 0.1
TRITON_FITTED = {(8, 0.25), (8, 0.5)}  # batch, cached share: two rates from two points
NOTES = [
    "FlashAttention's and FlexInfer's one rate is fitted to the batch sweep, Triton's two to the shares 0.25 and 0.5; "
    "a shape that comes in both sweeps counts as fitted in both",
    "Triton's kernel is what vLLM 0.4.2 prefills a prompt with a cached prefix by",
]


class Fig8(Figure):
    """One rate per kernel, and Triton's two."""

    title = "Prefix-prefill attention kernels over batch and cached share"
    source = f"{PAPER}, figure 8"
    about = f"Kernel models on one A100, prompts of {LENGTH:,} tokens with a cached prefix. Nothing is run."

    def evaluate(self, cells: Mapping[Hashable, Cell], executor: str) -> Result:
        """See `Figure`."""
        points = timed()
        verdicts = kernel_times.verdicts(points, dict.fromkeys((VLLM, FLEXINFER, FA_NATIVE, FA_PAGED), LIMIT), {})
        gains = {
            f"cached share {slow.x:g}": (slow.ours / fast.ours) / (slow.paper / fast.paper)
            for slow in points
            for fast in points
            if (slow.kernels, fast.kernels) == (VLLM, FLEXINFER)
            and (slow.sweep, slow.x, slow.kind) == (fast.sweep, fast.x, fast.kind)
            and slow.kind == PREDICTED  # of both
        }
        name, band = "Triton over FlexInfer, over the paper's", Band(1 - LIMIT, 1 + LIMIT)
        verdicts.append(Verdict.every(name, PREDICTED, band, gains, "x"))
        return Result(kernel_times.table(points), verdicts, NOTES, points)

    def draw(self, result: Result, stem: Path) -> None:
        """A panel per sweep."""
        kernel_times.draw(result.extra, stem, PANELS, "prefix prefill of a layer, A100, 16K tokens", "ms")


def timed() -> list[Timed]:
    """Every point of the two sweeps."""
    points = []
    for kernels in (VLLM, FLEXINFER, FA_NATIVE, FA_PAGED):
        for sweep in PANELS:
            for batch, cached, new, seconds in prefill_points(figures(), kernels, sweep):
                share = cached / LENGTH
                fitted = (batch, share) in TRITON_FITTED if kernels == VLLM else share == 0.5
                kind, x = FITTED if fitted else PREDICTED, batch if sweep == "batch" else share
                points.append(Timed(sweep, x, kernels, kind, prefill_us(kernels, batch, cached, new), 1e6 * seconds))
    return points

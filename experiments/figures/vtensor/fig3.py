"""Figure 3: the roofline of decode attention, from multi-head to multi-query, vLLM's flat one and FlexInfer's."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.costmodel.device import load_device
from experiments.figures.base import FITTED, PREDICTED, Band, Figure, Result, Table, Verdict
from experiments.figures.vtensor.kernel_times import MARKS, mark
from experiments.figures.vtensor.setting import DEVICE, FLEXINFER, PAPER, VLLM, attention, decode_us, published
from experiments.plots import figure
from experiments.seeded import Cell

HEADS, DIM = 32, 128
KV_HEADS = (32, 16, 8, 4, 2, 1)  # intensity 1, 2, ... 32 FLOP/byte: HEADS / KV_HEADS
LENGTHS = (1024, 2048, 4096)  # tokens of a sequence: the paper does not say
PICKED_AT = 4  # KV heads of figure 7's batch sweep, which the constants come from: only the length is open there
BATCHES = (32, 8, 4, 2, 1)
LIMIT = Band(0.8, 1.2)
MQA = 7.6  # times FlexInfer over vLLM at one KV head, batch 32
HEADER = (
    "kernel", "batch", "KV heads", "FLOP/byte", "kind", "ours TFLOP/s",
    *(f"at {tokens} tokens" for tokens in LENGTHS), "paper TFLOP/s", "ours / paper",
)  # fmt: skip
STYLES: dict[tuple[str, int], dict[str, Any]] = {
    (FLEXINFER, 32): {"color": "#0072B2", "marker": "o"},
    (VLLM, 32): {"color": "#D55E00", "marker": "s"},
    (VLLM, 8): {"color": "#E69F00", "marker": "v"},
    (VLLM, 4): {"color": "#009E73", "marker": "^"},
    (VLLM, 2): {"color": "#56B4E9", "marker": "D"},
    (VLLM, 1): {"color": "#CC79A7", "marker": "p"},
}
NAMES = {FLEXINFER: "FlexInfer", VLLM: "vLLM"}
LAUNCH_WHY = (
    "at {tokens:,} tokens the paper's kernel takes {paper:.0f} us in all with one sequence and one KV head; the launch "
    "fitted to figure 7, whose sequences are 8 times as long, is {launch:.0f} us alone, so part of it must grow with "
    "the row; or the sequences were longer than what FlexInfer's point picks"
)


@dataclass(frozen=True)
class Place:
    """A point of the figure, TFLOP/s."""

    kernels: str
    batch: int
    kv_heads: int
    ours: tuple[float, ...]  # by `LENGTHS`
    paper: float

    @property
    def intensity(self) -> int:
        """FLOPs per byte of KV."""
        return HEADS // self.kv_heads

    @property
    def kind(self) -> str:
        """What the paper's point is to us."""
        return FITTED if (self.kernels, self.kv_heads) == (FLEXINFER, PICKED_AT) else PREDICTED


def tflops(kernels: str, batch: int, tokens: int, kv_heads: int) -> float:
    """What decode attention reaches: two products per query head and token."""
    return 4 * batch * HEADS * DIM * tokens / decode_us(kernels, batch, tokens, kv_heads) / 1e6


def places() -> list[Place]:
    """Every point of the figure."""
    series = published("fig3", "roofline")
    return [
        Place(kernels, batch, kv, tuple(tflops(kernels, batch, tokens, kv) for tokens in LENGTHS), paper)
        for kernels, batch in STYLES
        for kv, (_, paper) in zip(KV_HEADS, series[f"{NAMES[kernels].lower()}_bs{batch}"], strict=True)
    ]


def picked(found: list[Place]) -> int:
    """Which of `LENGTHS` is nearest to the paper at `PICKED_AT`."""
    (point,) = (p for p in found if p.kind == FITTED)
    return int(np.argmin([abs(np.log(ours / point.paper)) for ours in point.ours]))


class Fig3(Figure):
    """One open number, the length, from one point; the others are predicted."""

    title = "Roofline of decode attention over arithmetic intensity"
    source = f"{PAPER}, figure 3"
    about = (
        "Kernel models on one A100, fitted to figure 7's batch sweep. The paper does not say how long the sequences "
        f"are: FlexInfer's point at {PICKED_AT} KV heads picks one of {', '.join(map(str, LENGTHS))} tokens."
    )

    def evaluate(self, cells: Mapping[Hashable, Cell], executor: str) -> Result:
        """See `Figure`."""
        found = places()
        length = picked(found)
        rows = []
        for p in found:
            said = [NAMES[p.kernels], p.batch, p.kv_heads, p.intensity, p.kind]
            rows.append([*said, p.ours[length], *p.ours, p.paper, p.ours[length] / p.paper])
        notes = [f"sequences of {LENGTHS[length]:,} tokens"]
        for i, tokens in enumerate(LENGTHS):
            outside = sum(not LIMIT.holds(p.ours[i] / p.paper) for p in found)
            notes.append(
                f"at {tokens:,} tokens the MQA ratio is {mqa_ratio(found, i):.3g}, {outside} points are outside"
            )
        return Result(Table(HEADER, rows), verdicts(found, length), notes, (found, length))

    def draw(self, result: Result, stem: Path) -> None:
        """Lines for ours, with what other lengths would give as a band at batch 32; marks for the paper's points."""
        found, length = result.extra
        hardware = load_device(*DEVICE).hardware
        with figure(stem, 3.3) as axis:
            x = np.array([HEADS // kv for kv in KV_HEADS])
            roof = np.minimum(x * hardware.memory_gbs / 1e3, hardware.bf16_tflops)
            axis.plot(x, roof, color="black", linewidth=0.8, linestyle="--", label="A100's bandwidth")
            for (kernels, batch), style in STYLES.items():
                own = [p for p in found if (p.kernels, p.batch) == (kernels, batch)]
                ours = np.array([p.ours for p in own])  # [points, lengths]
                axis.plot(x, ours[:, length], color=style["color"], linewidth=1)
                if batch == BATCHES[0]:
                    axis.fill_between(x, ours.min(1), ours.max(1), color=style["color"], alpha=0.2, linewidth=0)
                for p in own:
                    axis.plot(p.intensity, p.paper, **mark(style, p.kind))
                axis.plot([], [], **mark(style, PREDICTED), label=f"{NAMES[kernels]}, batch {batch}")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(x, [str(i) for i in x])
            axis.set_yticks((0.5, 1, 2, 5, 10, 20, 50), ("0.5", "1", "2", "5", "10", "20", "50"))
            axis.minorticks_off()
            axis.set_xlabel("FLOP/byte: 32 query heads / KV heads")
            axis.set_ylabel("decode attention (TFLOP/s)")
            lengths = f"{LENGTHS[0] // 1024}K to {LENGTHS[-1] // 1024}K"
            axis.set_title(f"{LENGTHS[length] // 1024}K tokens (band: {lengths})\n{MARKS}")
            axis.legend(frameon=False, loc="upper left")


def mqa_ratio(found: list[Place], length: int) -> float:
    """FlexInfer over vLLM with one KV head, batch 32."""
    flex, vllm = (
        next(p.ours[length] for p in found if (p.kernels, p.batch, p.kv_heads) == (kernels, BATCHES[0], 1))
        for kernels in (FLEXINFER, VLLM)
    )
    return flex / vllm


def verdicts(found: list[Place], length: int) -> list[Verdict]:
    """Every point, and the ratio that the paper is about."""
    launch = 1e6 * attention(VLLM, 1)[0].t0
    last = next(p for p in found if (p.kernels, p.batch, p.kv_heads) == (VLLM, 1, 1))
    paper = 4 * HEADS * DIM * LENGTHS[length] / last.paper / 1e6  # us
    why = LAUNCH_WHY.format(tokens=LENGTHS[length], paper=paper, launch=launch)
    said = []
    for kernels, batch in STYLES:
        own = [p for p in found if (p.kernels, p.batch) == (kernels, batch)]
        for kind in (FITTED, PREDICTED):
            ratios = {f"{p.kv_heads} KV heads": p.ours[length] / p.paper for p in own if p.kind == kind}
            name = f"{NAMES[kernels]}, batch {batch}: TFLOP/s over the paper's" + " (picks the length)" * (
                kind == FITTED
            )
            if ratios:
                said.append(
                    Verdict.every(name, kind, LIMIT, ratios, "x", why if kernels == VLLM and batch <= 2 else "")
                )
    name = "FlexInfer over vLLM at MQA, batch 32"
    return [*said, Verdict.within(name, PREDICTED, Band(0.8 * MQA, 1.2 * MQA), mqa_ratio(found, length), "x")]

"""The figure of `paper_layerkv`: TTFT over context length beside the paper's own points, and how many times lower."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.figures.layerkv.fig1 import published
from experiments.figures.layerkv.setting import LAYERKV as OURS
from experiments.figures.layerkv.setting import NO_RULE as RULE_OFF
from experiments.figures.layerkv.setting import PAGED_PARK, STYLES, VLLM
from experiments.layerkv_gates import BASELINE, LAYERKV, NO_RULE, PAPER_CONTEXT, Place
from experiments.plots import figure
from experiments.seeded import lower_by, mean

LINES = {BASELINE: STYLES[VLLM], "paged_park": STYLES[PAGED_PARK], NO_RULE: STYLES[RULE_OFF], LAYERKV: STYLES[OURS]}
MODELS = ("#0072B2", "#009E73", "#CC79A7")


def over_contexts(places: Sequence[Place], model: str) -> list[Place]:
    """The places of a model's sweep over contexts, all at one rate, shortest first."""
    own = [p for p in places if p.model == model]
    rate = next((p.rate for p in own if p.context != PAPER_CONTEXT), own[0].rate)
    return sorted((p for p in own if p.rate == rate), key=lambda p: p.context)


def draw(places: Sequence[Place], model: str, stem: Path) -> None:
    """Draws `stem`.png and .pdf: above, TTFT of `model`; below, how many times lower LayerKV's is, for every model.

    Raises:
      ConfigError: matplotlib is not installed.
      OutputError: a file cannot be written.
    """
    with figure(stem, 4.0, nrows=2, sharex=True, height_ratios=(3, 2)) as (top, bottom):
        here = over_contexts(places, model)
        for policy, style in LINES.items():
            ttft = [mean(p.cells[policy], "mean_ttft_ms") / 1e3 for p in here]
            top.plot([p.context for p in here], ttft, label=policy, markersize=3.5, linewidth=1, **style)
        paper = published()["ttft_ms"]
        top.plot(
            [*paper],
            [ms / 1e3 for ms in paper.values()],
            "x",
            color="black",
            markersize=5,
            label="paper, vLLM (fig. 1)",
        )
        top.set_yscale("log")
        top.set_ylabel("mean TTFT (s)")
        top.set_title(f"{model}, one L20, {here[0].rate:g} request/s")
        top.legend(frameon=False, loc="upper left")
        for name, color in zip(dict.fromkeys(p.model for p in places), MODELS, strict=False):
            own = over_contexts(places, name)
            for policy, line in ((LAYERKV, "-o"), (NO_RULE, ":")):
                ratios = [lower_by(p.cells[policy], p.cells[BASELINE])[0] for p in own]
                label = f"{name}, {own[0].rate:g}/s" if policy == LAYERKV else None
                bottom.plot([p.context for p in own], ratios, line, color=color, markersize=3, linewidth=1, label=label)
        bottom.axhline(1, color="gray", linewidth=0.6)
        bottom.set_yscale("log")
        bottom.set_ylim(top=400)  # room for the legend
        bottom.set_ylabel("times lower TTFT\n(dotted: no SLO rule)")
        bottom.set_xscale("log", base=2)
        ticks = [p.context for p in here]
        bottom.set_xticks(ticks, [f"{c // 1024}K" if c >= 1024 else str(c) for c in ticks])
        bottom.set_xlabel("context length (tokens)")
        bottom.legend(frameon=False, loc="upper left")

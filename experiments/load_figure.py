"""The figure of `bench_layerkv`: TTFT and throughput of each policy over the offered load."""

from __future__ import annotations

from pathlib import Path

from experiments.load_sweep import Sweep
from experiments.plots import figure

# Okabe and Ito's palette, with markers that differ in print.
LINES = (
    {"color": "#D55E00", "marker": "s"},
    {"color": "#CC79A7", "marker": "D"},
    {"color": "#E69F00", "marker": "v"},
    {"color": "#0072B2", "marker": "o"},
    {"color": "#009E73", "marker": "^"},
)


def draw(sweep: Sweep, stem: Path) -> None:
    """Draws `stem`.png and .pdf: mean TTFT above, output tokens/s below, with 95% intervals over repeats.

    Raises:
      ConfigError: matplotlib is not installed.
      OutputError: a file cannot be written.
    """
    with figure(stem, 4.0, nrows=2, sharex=True, height_ratios=(3, 2)) as (top, bottom):
        for policy, style in zip(sweep.policies, LINES, strict=False):
            cells = [sweep.at(load, policy) for load in sweep.loads]
            for axes, name, unit in ((top, "mean_ttft_ms", 1e-3), (bottom, "output_throughput", 1.0)):
                spreads = [cell.spread(name) for cell in cells]
                means = [unit * s.mean for s in spreads]
                errors = [[unit * (s.mean - s.low) for s in spreads], [unit * (s.high - s.mean) for s in spreads]]
                axes.errorbar(sweep.loads, means, errors, label=policy, markersize=3.5, linewidth=1, capsize=2, **style)
        top.set_yscale("log")
        top.set_ylabel("mean TTFT (s)")
        top.legend(frameon=False, loc="upper left")
        bottom.set_ylim(bottom=0)
        bottom.set_ylabel("output tokens/s")
        bottom.set_xlabel("arrival rate / capacity of vllm_v0")
        for axes in (top, bottom):
            axes.axvline(1, color="gray", linewidth=0.6, linestyle=":")
        bottom.set_xticks(sweep.loads, [f"{load:g}" for load in sweep.loads])

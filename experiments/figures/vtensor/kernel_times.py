"""Times of kernels, ours beside the paper's: what figures 7 and 8 share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.figures.base import FITTED, PREDICTED, Band, Table, Verdict
from experiments.figures.vtensor.setting import LABELS, STYLES
from experiments.plots import figure

LEFT_OUT = "left out"  # of the fit and of the verdicts
MARKS = "lines: ours; marks: paper (filled: predicted)"
TICKS = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
HEADER = ("sweep", "x", "kernel", "kind", "ours us", "paper us", "ours / paper")


@dataclass(frozen=True)
class Timed:
    """A kernel at one point of a sweep, microseconds."""

    sweep: str
    x: float
    kernels: str  # of `LABELS`
    kind: str  # what the paper's point is to our constants: fitted, predicted or left out
    ours: float
    paper: float

    @property
    def ratio(self) -> float:
        """Ours over the paper's."""
        return self.ours / self.paper


def table(points: Sequence[Timed]) -> Table:
    """A row per point."""
    return Table(HEADER, [[p.sweep, p.x, LABELS[p.kernels], p.kind, p.ours, p.paper, p.ratio] for p in points])


def verdicts(points: Sequence[Timed], bands: Mapping[str, float], whys: Mapping[str, str]) -> list[Verdict]:
    """For every kernel, the points that it was fitted to and those that it predicts.

    Args:
      bands: how far ours may be from the paper's, relative, by kernel.
      whys: the best explanation of a miss, by kernel.
    """
    found = []
    for kernels, limit in bands.items():
        for kind in (FITTED, PREDICTED):
            ratios = {f"{p.sweep} {p.x:g}": p.ratio for p in points if (p.kernels, p.kind) == (kernels, kind)}
            name, band = f"{LABELS[kernels]}: {kind} times over the paper's", Band(1 - limit, 1 + limit)
            found.append(Verdict.every(name, kind, band, ratios, "x", whys.get(kernels, "")))
    return found


def draw(
    points: Sequence[Timed], stem: Path, panels: Mapping[str, tuple[str, Sequence[str]]], title: str, unit: str
) -> None:
    """Draws `stem`.png and .pdf: a panel per sweep, its places as far apart as the paper has them.

    Args:
      panels: by sweep, the name of its axis and the names of its places.
      unit: "us" or "ms".
    """
    scale = {"us": 1.0, "ms": 1e-3}[unit]
    with figure(stem, 1.45 * len(panels) + 0.6, nrows=len(panels), squeeze=False) as axes:
        for (sweep, (label, names)), axis in zip(panels.items(), axes.flat, strict=True):
            for kernels, style in STYLES.items():
                own = sorted((p for p in points if (p.sweep, p.kernels) == (sweep, kernels)), key=lambda p: p.x)
                axis.plot(range(len(own)), [scale * p.ours for p in own], color=style["color"], linewidth=1)
                for at, p in enumerate(own):
                    axis.plot(at, scale * p.paper, **mark(style, p.kind))
                axis.plot([], [], **mark(style, PREDICTED), label=LABELS[kernels])
            axis.set_yscale("log")
            low, high = axis.get_ylim()
            ticks = [tick for tick in TICKS if low <= tick <= high]
            axis.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
            axis.minorticks_off()
            axis.set_xticks(range(len(names)), names)
            axis.set_xlabel(label, labelpad=1)
            axis.set_ylabel(f"time ({unit})")
        sheet = axes[0, 0].figure
        sheet.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
        axes[0, 0].set_title(f"{title}\n{MARKS}")


def mark(style: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """How a point of the paper looks: ours are lines."""
    if kind == PREDICTED:
        return {"markersize": 4.5, **style, "linestyle": "none", "markeredgecolor": "white", "markeredgewidth": 0.4}
    return {"markersize": 4.5, **style, "linestyle": "none", "markerfacecolor": "none"}

"""Times of kernels, ours beside the paper's: what figures 7 and 8 share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.figures.base import FITTED, PREDICTED, Band, Table, Verdict
from experiments.figures.vtensor.setting import LABELS, STYLES
from experiments.plots import figure

LEFT_OUT = "left out"  # of the fit and of the verdicts
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
                at = np.arange(len(own))
                axis.plot(at, [scale * p.ours for p in own], color=style["color"], linewidth=1)
                axis.plot(at, [scale * p.paper for p in own], **hollow(style), label=LABELS[kernels])
            axis.set_yscale("log")
            axis.set_xticks(np.arange(len(names)), names)
            axis.set_xlabel(label, labelpad=1)
            axis.set_ylabel(f"time ({unit})")
        sheet = axes[0, 0].figure
        sheet.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
        axes[0, 0].set_title(title)


def hollow(style: Mapping[str, str]) -> dict[str, object]:
    """How a point of the paper looks: ours are lines."""
    return {**style, "linestyle": "none", "markerfacecolor": "none", "markersize": 5}

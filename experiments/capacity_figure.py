"""The figures of `capacity`: capacities over scales of the objectives, and LayerKV over the best baseline as a map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.capacity_tables import TARGETS, Row, picked, ratio
from experiments.objectives import ALL, PAPER
from experiments.plots import PAGE_INCHES, figure
from experiments.tuning import CHUNKED, LAYERKV, LAYERKV_SJF, PAGED, PARK, SJF, SWAP, V0, V1

CURVES, MAP = "capacity", "map"
# Okabe and Ito's palette, with markers that differ in print.
LINES: dict[str, dict[str, Any]] = {
    V0: {"color": "#D55E00", "marker": "s"},
    SWAP: {"color": "#D55E00", "marker": "D", "linestyle": "--"},
    V1: {"color": "#CC79A7", "marker": "<"},
    CHUNKED: {"color": "#009E73", "marker": "^"},
    SJF: {"color": "#000000", "marker": "x"},
    PARK: {"color": "#E69F00", "marker": "v"},
    LAYERKV_SJF: {"color": "#56B4E9", "marker": ".", "linestyle": "--"},
    LAYERKV: {"color": "#0072B2", "marker": "o"},
}
PANELS = ((PAPER, PAGED, "best paged baseline"), (PAPER, (PARK,), PARK), (ALL, PAGED, "best paged baseline"))


def draw(rows: Sequence[Row], out: Path) -> list[str]:
    """Draws what there are rows for. Returns the paths.

    Raises:
      ConfigError: matplotlib is not installed.
      OutputError: a file cannot be written.
    """
    drawn = []
    if curves := picked(rows, part="curves"):
        _draw_curves(curves, out / CURVES)
        drawn.append(f"{out / CURVES}.png")
    if cells := picked(rows, part="map"):
        _draw_map(cells, out / MAP)
        drawn.append(f"{out / MAP}.png")
    return drawn


def _draw_curves(rows: Sequence[Row], stem: Path) -> None:
    """A column per family; rows of panels by objectives and level."""
    families = list(dict.fromkeys(row.family for row in rows))
    kinds = [(target, level) for target in TARGETS for level in sorted({row.level for row in rows})]
    shape = {"nrows": len(kinds), "ncols": len(families), "sharex": True, "squeeze": False}
    with figure(stem, 1.75 * len(kinds) + 0.5, PAGE_INCHES, **shape) as axes:
        for (target, level), line in zip(kinds, axes, strict=True):
            for family, panel in zip(families, line, strict=True):
                _panel(panel, picked(rows, family=family, target=target, level=level))
            line[0].set_ylabel(f"{target}, {level:.0%}\nrequests/s")
        for family, top, bottom in zip(families, axes[0], axes[-1], strict=True):
            top.set_title(family)
            bottom.set_xlabel("objectives, times 3 s / 200 ms / 1 s / 3 s")
        handles, labels = axes[0][0].get_legend_handles_labels()
        axes[0][0].figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)


def _panel(panel: Any, rows: Sequence[Row]) -> None:
    for policy, style in LINES.items():
        own = sorted(picked(rows, policy=policy), key=lambda row: row.scale)
        x, y = [row.scale for row in own], [row.found.rate or np.nan for row in own]  # nothing where there is none
        panel.plot(x, y, label=policy, markersize=3.5, linewidth=1, **style)
    panel.set_xscale("log", base=2)
    ticks = sorted({row.scale for row in rows})
    panel.set_xticks(ticks, [f"x{scale:g}" for scale in ticks])
    panel.set_ylim(bottom=0)


def _draw_map(rows: Sequence[Row], stem: Path) -> None:
    """A panel per question; a line per device, degree and share of the pool, a column per host tier."""
    import matplotlib.colors

    hosts = sorted({row.site.place.host_gb for row in rows})
    lines = list(dict.fromkeys((r.site.place.device, r.site.place.tensor, r.site.place.fraction) for r in rows))
    norm = matplotlib.colors.TwoSlopeNorm(1.0, 0.5, 2.0)
    with figure(stem, 0.17 * len(lines) + 1.3, PAGE_INCHES, ncols=len(PANELS), sharey=True) as axes:
        for panel, (target, others, name) in zip(axes, PANELS, strict=True):
            values = _matrix(picked(rows, objectives=target), lines, hosts, others)
            image = panel.imshow(np.clip(values, 0.5, 2), cmap="RdBu", norm=norm, aspect="auto")
            for (y, x), value in np.ndenumerate(values):
                text = "-" if np.isnan(value) else ("inf" if np.isinf(value) else f"{value:.2f}")
                dark = np.isfinite(value) and not 0.65 < value < 1.6
                panel.text(x, y, text, ha="center", va="center", size=5.5, color="white" if dark else "black")
            panel.set_title(f"{target}\nlayerkv / {name}")
            panel.set_xticks(range(len(hosts) + 1), ["0", *map(str, hosts)])
            panel.set_xlabel("host tier (GB)")
            panel.spines[:].set_visible(False)
            panel.tick_params(length=0)
        axes[0].set_yticks(range(len(lines)), [f"{device} x{n}, pool {f:g}" for device, n, f in lines])
        bar = axes[0].figure.colorbar(image, ax=list(axes), shrink=0.6, pad=0.01, ticks=[0.5, 1, 1.5, 2])
        bar.ax.set_yticklabels(["0.5", "1", "1.5", "2"])


def _matrix(rows: Sequence[Row], lines: Sequence[Any], hosts: Sequence[int], others: Sequence[str]) -> np.ndarray:
    """Ratios, [lines, 1 + hosts]; the first column is the host tier that is not there, where the ratio is 1."""
    cells: dict[Any, list[Row]] = {}
    for row in rows:
        place = row.site.place
        cells.setdefault((place.device, place.tensor, place.fraction, place.host_gb), []).append(row)
    found = [[1.0, *(ratio(cells[*line, host], LAYERKV, others) for host in hosts)] for line in lines]
    return np.array(found, float)  # None: NaN

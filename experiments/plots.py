"""Figures, readable in one column of a two-column paper. Needs matplotlib (the `plots` extra), imported lazily."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.files import write_whole, writing

INSTALL = "figures need matplotlib: pip install 'folio[plots]'"
COLUMN_INCHES, PAGE_INCHES = 3.35, 7.0
# Okabe and Ito's palette: distinguishable with any colour vision. Hatches keep bars apart in print.
QUEUE, PREFILL = {"color": "#D55E00", "hatch": "////"}, {"color": "#56B4E9", "hatch": ""}
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.4,
    "pdf.fonttype": 42,  # text stays text
}


@dataclass(frozen=True)
class TtftBar:
    """One bar: a mean TTFT in its two parts."""

    label: str  # under the bar
    queue_s: float
    prefill_s: float

    @property
    def ttft_s(self) -> float:
        """The bar's height."""
        return self.queue_s + self.prefill_s


@contextmanager
def figure(stem: Path, height: float, width: float = COLUMN_INCHES, **subplots: Any) -> Iterator[Any]:
    """Axes to draw on, inches; saved as stem.png and stem.pdf afterwards.

    Raises:
      ConfigError: matplotlib is not installed; says how to install it.
      OutputError: a file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(INSTALL) from None
    matplotlib.use("Agg")
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it reports every glyph it embeds
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        drawn_on, axes = pyplot.subplots(figsize=(width, height), layout="constrained", **subplots)
        yield axes
        with writing(stem.parent):
            stem.parent.mkdir(parents=True, exist_ok=True)
        # Without dates in the files the same data gives the same bytes.
        for suffix, undated in (("png", "Software"), ("pdf", "CreationDate")):
            drawn_on.savefig(drawn := io.BytesIO(), format=suffix, dpi=300, metadata={undated: None})
            write_whole(stem.with_suffix(f".{suffix}"), drawn.getvalue())
        pyplot.close(drawn_on)


def ttft_figure(bars: Sequence[TtftBar], stem: Path, xlabel: str, title: str) -> None:
    """TTFT split into queueing and prefill: seconds above, the queue's share of it below.

    Args:
      bars: left to right.
      stem: path without suffix; `.png` and `.pdf` are written.

    Raises:
      ConfigError: matplotlib is not installed.
    """
    x = range(len(bars))
    prefill, queue = [b.prefill_s for b in bars], [b.queue_s for b in bars]
    share = [100 * b.queue_s / b.ttft_s for b in bars]
    with figure(stem, 3.2, nrows=2, sharex=True, height_ratios=(2, 1)) as (top, bottom):
        top.bar(x, prefill, 0.7, label="prefill", edgecolor="black", linewidth=0.4, **PREFILL)
        top.bar(x, queue, 0.7, bottom=prefill, label="queueing", edgecolor="black", linewidth=0.4, **QUEUE)
        for i, bar in enumerate(bars):
            top.annotate(f"{bar.ttft_s:.2g}", (i, bar.ttft_s), (0, 1), textcoords="offset points", ha="center", size=7)
        top.set_ylabel("mean TTFT (s)")
        top.set_title(title)
        top.margins(y=0.12)
        top.legend(frameon=False, loc="upper left", reverse=True)
        bottom.bar(x, share, 0.7, edgecolor="black", linewidth=0.4, **QUEUE)
        for i, percent in enumerate(share):
            bottom.annotate(f"{percent:.0f}", (i, percent), (0, 1), textcoords="offset points", ha="center", size=7)
        bottom.set_ylabel("queueing (%)")
        bottom.set_ylim(0, 115)
        bottom.set_yticks((0, 50, 100))
        bottom.set_xticks(x, [b.label for b in bars])
        bottom.set_xlabel(xlabel)

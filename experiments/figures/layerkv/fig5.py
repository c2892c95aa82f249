"""Figure 5: why parked layers are interleaved with those that stay: decode steps that stream them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import EngineConfig
from engine.scheduler.layerkv.retention import parked_layers
from experiments.figures.base import ARITHMETIC, PREDICTED, Band, Figure, Result, Table, Verdict
from experiments.figures.layerkv.events import Decode, Place
from experiments.figures.layerkv.setting import kilo
from experiments.plots import figure
from experiments.seeded import NOTICED, Cell

PLACE = Place("llama2-7b", "l20", stack="vllm-0.5")
ROWS, CONTEXT = 26, 2048  # about what the pool of an L20 holds, at the context where queueing begins
RETAINED = PLACE.num_layers // 2  # x: every other layer, as in the paper's example
PATTERNS = ("interleave", "prefix", "suffix")
DEPTH = EngineConfig.prefetch_depth  # the next parked layer comes while this one is computed, as in the paper
TOKENS = range(0, 16384 + 1, 512)  # streamed in each parked layer
BEYOND = 1.5  # hide bounds from which on the link alone decides
HEADER = ("streamed tokens", "none ms", *(f"{p} ms" for p in PATTERNS), *(f"engine, {p} ms" for p in PATTERNS))
STYLES: dict[str, dict[str, Any]] = {
    "interleave": {"color": "#0072B2", "marker": "o"},
    "prefix": {"color": "#D55E00", "marker": "s"},
    "suffix": {"color": "#E69F00", "marker": "^"},
}


class Fig5(Figure):
    """Step time over what is streamed."""

    title = "Decode with parked layers: interleaved, or in one block at either end"
    source = "LayerKV (arXiv 2410.00428), figure 5 (a diagram; the sweep is ours)"
    about = (
        f"Llama2-7B on one L20 decodes {ROWS} rows of {CONTEXT} tokens, some of which keep {RETAINED} of "
        f"{PLACE.num_layers} layers and stream the others from the host; prefix: the first stay, suffix: the last. "
        "Steps follow each other and the next parked layer is fetched ahead; and as the simulated engine runs a step."
    )

    def evaluate(self, cells: Mapping[Hashable, Cell], executor: str) -> Result:
        """See `Figure`."""
        batch = Decode(PLACE, ROWS, CONTEXT)
        parked = [parked_layers(PLACE.num_layers, RETAINED, pattern).tolist() for pattern in PATTERNS]
        rows = []
        for tokens in TOKENS:
            steady = [1e3 * batch.steady(tokens, mask, DEPTH) for mask in parked]
            ours = [1e3 * batch.alone(tokens, mask, DEPTH) for mask in parked]
            rows.append([tokens, 1e3 * batch.time.device, *steady, *ours])
        table, bound = Table(HEADER, rows), hide_bound(batch)
        notes = [
            f"hide bound: {bound:,.0f} tokens in each parked layer, what the link brings in the time of two layers, "
            f"{2e3 * batch.time.layer:.2f} ms; the research note has 6.3K, from 4 ms and 26 GB/s",
            "lines: across the border of two steps, at no cost to the device; engine: nothing is fetched before its step, "
            "and what has come is scattered",
        ]
        return Result(table, verdicts(table, bound), notes, bound)

    def draw(self, result: Result, stem: Path) -> None:
        """Milliseconds of a step; dotted: as the engine runs it."""
        of = lambda name: np.array(result.table.column(name), float)  # noqa: E731
        tokens = of("streamed tokens")
        with figure(stem, 2.7) as ax:
            ax.plot(tokens, of("none ms"), color="black", linewidth=1, linestyle="--", label="nothing parked")
            for i, (pattern, style) in enumerate(STYLES.items()):
                look = style | {"linewidth": 1, "markersize": 3, "markevery": (2 * i, 6)}
                ax.plot(tokens, of(f"{pattern} ms"), label=pattern, **look)
                ax.plot(tokens, of(f"engine, {pattern} ms"), color=style["color"], linewidth=0.8, linestyle=":")
            ax.axvline(result.extra, color="gray", linewidth=0.6)
            ax.set_ylim(bottom=40)
            ax.annotate("hide bound", (result.extra, 40), (3, 3), textcoords="offset points", size=7)
            ax.set_xticks(tokens[::8], [kilo(int(t)) for t in tokens[::8]])
            ax.set_xlabel("tokens streamed in each parked layer")
            ax.set_ylabel("decode step (ms)")
            ax.set_title(f"Llama2-7B, one L20, {ROWS} rows of {CONTEXT} tokens\ndotted: as our engine runs a step")
            ax.legend(frameon=False, loc="upper left", handlelength=1.6, borderaxespad=0)


def hide_bound(batch: Decode) -> float:
    """Tokens in each parked layer whose copy takes as long as two layers: with every other layer parked, the time from
    one to the next. Arithmetic; the research note on the paper's pipeline."""
    return 2 * batch.time.layer * batch.place.rate / batch.place.layer_bytes(1)


def verdicts(table: Table, bound: float) -> list[Verdict]:
    """Of the table's numbers. Equal: not noticeably different."""
    tokens = np.array(table.column("streamed tokens"), float)
    of = lambda name: np.array(table.column(name), float)  # noqa: E731
    none, link, hidden, beyond = of("none ms"), PLACE.rate, tokens <= bound, tokens >= BEYOND * bound
    streamed = tokens * PLACE.layer_bytes(1) * (PLACE.num_layers - RETAINED)  # bytes of a step
    slope = np.polyfit(streamed[beyond], of("interleave ms")[beyond] / 1e3, 1)[0] * link

    def over(head: str, which: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
        ours = of(f"{head}interleave ms")
        others = np.minimum(of(f"{head}prefix ms"), of(f"{head}suffix ms"))
        return _named(tokens, ours / others), _named(tokens[which], (ours / none)[which])

    (best, equal), (engine_best, engine_equal) = over("", hidden), over("engine, ", hidden)
    least, same = Band(high=1 + 1e-6), Band(1 - NOTICED, 1 + NOTICED)
    return [
        Verdict.every("interleaved over the better of the others", PREDICTED, least, best, "x"),
        Verdict.every("interleaved over nothing parked, up to the hide bound", PREDICTED, same, equal, "x"),
        Verdict.within("beyond, the step's growth per byte times the link", ARITHMETIC, same, float(slope)),
        Verdict.every(
            "interleaved over the better of the others, as our engine runs a step", PREDICTED, least, engine_best, "x",
            why="a step begins with its first fetch, which no layer hides, and interleaving parks the first layer",
        ),
        Verdict.every(
            "interleaved over nothing parked, up to the hide bound, as our engine runs a step", PREDICTED, same,
            engine_equal, "x",
            why="the same, and the device scatters what has come",
        ),
    ]  # fmt: skip


def _named(tokens: np.ndarray, values: np.ndarray) -> dict[str, float]:
    return {f"{int(at):,} tokens": float(value) for at, value in zip(tokens, values, strict=True)}

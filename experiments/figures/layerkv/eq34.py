"""Equations 3 and 4: how many layers must stay so that the others leave under the prefill, and when that is any."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from experiments.figures.base import PREDICTED, Band, Figure, Result, Table, Verdict
from experiments.figures.layerkv.events import Place, fewest_retained
from experiments.figures.layerkv.setting import kilo
from experiments.plots import figure
from experiments.seeded import Cell

PLACES = {
    "7B, L20": Place("llama2-7b", "l20", stack="vllm-0.5"),
    "7B, A100": Place("llama2-7b", "a100"),
    "7B, H100": Place("llama2-7b", "h100"),
    "7B, H200": Place("llama2-7b", "h200"),
    "34B, 2 L20": Place("yi-34b-200k", "l20", 2, "vllm-0.5"),
    "34B, 2 A100": Place("yi-34b-200k", "a100", 2),
    "34B, H200": Place("yi-34b-200k", "h200"),
    "70B, 4 L20": Place("llama3.1-70b", "l20", 4, "vllm-0.5"),
    "70B, 4 A100": Place("llama3.1-70b", "a100", 4),
    "70B, 2 H200": Place("llama3.1-70b", "h200", 2),
}
SHARES, PROMPTS = (1.0, 0.5, 0.2, 0.1, 0.05), (512, 2048, 8192)
HEADER = ("place", "layers", "link", "prompt", "x", "x by events", "x by events, none behind")
LAYER = Band(-1, 1)


class Eq34(Figure):
    """x over model, device, link and prompt."""

    title = "Layers that must stay (x of Eqs 3-4) over model, device, link and prompt"
    source = "LayerKV (arXiv 2410.00428), equations 3 and 4 (reconstructed)"
    about = (
        "The least x for which the copies of the other layers take no longer than the prefill, against a search "
        "through every x with the layers, copies, gathers and all-reduces of a prefill run as events."
    )

    def evaluate(self, cells: Mapping[Hashable, Cell], executor: str) -> Result:
        """See `Figure`."""
        rows = []
        for name, whole in PLACES.items():
            for share in SHARES:
                place = replace(whole, share=share)
                for prompt in PROMPTS:
                    found = [place.retained(prompt), *(fewest_retained(place, prompt, blocks) for blocks in (1, 0))]
                    rows.append([name, place.num_layers, share, prompt, *found])
        table = Table(HEADER, rows)
        notes = [
            "x by events: the last copy may land one block, a layer's KV of the prompt, behind the prefill; none "
            "behind: it may not, so the last layer, whose copy begins when all is computed, stays",
            "in Yi-34B and Llama3.1-70B 7 and 8 heads share a kv head: little KV for what they compute",
        ]
        return Result(table, verdicts(table), notes)

    def draw(self, result: Result, stem: Path) -> None:
        """A row per place, a column per link and prompt; the number is x, the colour its share of the layers."""
        table = result.table
        shape = len(PLACES), len(SHARES) * len(PROMPTS)
        x, layers = (np.array(table.column(name), float).reshape(shape) for name in ("x", "layers"))
        with figure(stem, 2.9) as ax:
            drawn = ax.imshow(x / layers, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            for (row, column), value in np.ndenumerate(x):
                color = "white" if value > layers[row, column] / 2 else "black"
                ax.text(column, row, f"{value:.0f}", ha="center", va="center", size=6, color=color)
            ax.set_yticks(range(shape[0]), list(PLACES), size=6.5)
            ax.set_xticks(range(shape[1]), [kilo(p) for p in PROMPTS] * len(SHARES), rotation=90, size=6)
            for i, share in enumerate(SHARES):
                ax.text(len(PROMPTS) * (i + 0.5) - 0.5, -0.8, f"x{share:g}", ha="center", size=7)
                ax.axvline(len(PROMPTS) * i - 0.5, color="gray", linewidth=0.6)
            ax.tick_params(length=0)
            ax.spines[:].set_visible(False)
            ax.set_xlabel("prompt (tokens), by share of the link to the host")
            ax.set_title("layers that stay: x of Eqs 3-4", pad=14)
            ax.figure.colorbar(drawn, ax=ax, label="share of the layers", pad=0.02, aspect=30)


def verdicts(table: Table) -> list[Verdict]:
    """Of the table's numbers."""
    rows = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    place = [f"{r['place']}, x{r['link']:g}, {kilo(r['prompt'])}" for r in rows]
    off = lambda name: {at: r["x"] - r[name] for at, r in zip(place, rows, strict=True)}  # noqa: E731
    full = {at: r["x"] for at, r in zip(place, rows, strict=True) if r["link"] == 1}
    bound = sum(r["x"] > 0 for r in rows)
    return [
        Verdict.every(
            "x less that by events, a block behind", PREDICTED, LAYER, off("x by events"), " layers",
            why="6 ms of a short prefill are the host's (stack vllm-0.5), before there is anything to copy: the "
            "equations count them, a copy cannot use them",
        ),
        Verdict.every(
            "x less that by events, none behind", PREDICTED, LAYER, off("x by events, none behind"), " layers",
            why="the equations count copies, not when they can begin: interleaving parks the last layer but one until "
            "half of them stay, and where a copy takes longer than a layer it ends behind the prefill, by a part of a "
            "block",
        ),
        Verdict.every("x at the full link", PREDICTED, Band(0, 0), full, " layers"),
        Verdict.within("places where the equations ask for anything", PREDICTED, Band(1), bound, f" of {len(rows)}"),
    ]  # fmt: skip

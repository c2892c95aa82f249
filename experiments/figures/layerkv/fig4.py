"""Figure 4: how copies to the host hide under the prefill that they come from."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.figures.base import PREDICTED, Band, Figure, Result, Table, Verdict
from experiments.figures.layerkv.events import Place, Prefill, run_prefill
from experiments.figures.layerkv.setting import kilo
from experiments.plots import figure
from experiments.seeded import Cell

L20_7B = Place("llama2-7b", "l20", stack="vllm-0.5")
PROMPTS, SHARES = (512, 2048, 8192), (1.0, 0.2, 0.05)
FORMULA, NONE, ALL = "formula", "none", "all"  # which layers stay on the device
SLOW = SHARES[-1]
LIMIT = 1.05  # of a prefill's time without copies (research note)
HEADER = (
    "prompt", "link", "rule", "x", "prefill ms", "over none parked", "copies end ms", "block ms", "behind, blocks",
)  # fmt: skip
STAYS, LEAVES = "#B3DDF2", "#0072B2"  # layers
COPIED = {FORMULA: "#009E73", NONE: "#D55E00"}
Runs = dict[tuple[int, float, str], Prefill]


def place_at(share: float) -> Place:
    """Llama2-7B on an L20 with a share of its link."""
    return Place(L20_7B.model, L20_7B.device, L20_7B.tensor, L20_7B.stack, share)


def retained(prompt: int, share: float, rule: str) -> int:
    """x, the layers that stay."""
    place = place_at(share)
    return {FORMULA: place.retained(prompt), NONE: 0, ALL: place.num_layers}[rule]


class Fig4(Figure):
    """Compute and copies as two streams."""

    title = "Prefill overlap: compute and copies to the host"
    source = "LayerKV (arXiv 2410.00428), figure 4 (a diagram; drawn here to scale)"
    about = (
        "Llama2-7B on one L20: a prompt prefilled alone while the KV of its parked layers leaves over the whole link, "
        "a fifth and a twentieth of it; x of Eqs 3-4 layers stay (reconstructed), or none, or all."
    )

    def evaluate(self, cells: Mapping[Hashable, Cell], executor: str) -> Result:
        """See `Figure`."""
        runs: Runs = {
            (prompt, share, rule): run_prefill(place_at(share), prompt, retained(prompt, share, rule))
            for prompt in PROMPTS
            for share in SHARES
            for rule in (FORMULA, NONE, ALL)
        }
        rows = [_row(*key, run, runs[key[0], key[1], ALL]) for key, run in runs.items()]
        table = Table(HEADER, rows)
        notes = ["a block is one layer's KV of the prompt, which moves in one copy; behind: after the prefill's end"]
        return Result(table, verdicts(table), notes, runs)

    def draw(self, result: Result, stem: Path) -> None:
        """A panel per prompt, a lane per stream, time in prefills."""
        with figure(stem, 3.8, nrows=len(PROMPTS), sharex=True) as axes:
            for ax, prompt in zip(axes, PROMPTS, strict=True):
                _panel(ax, prompt, result.extra)
            axes[-1].set_xlabel("time / time of the prefill")
            axes[0].set_title(
                "Llama2-7B, one L20. compute: light layers stay (link x0.05)\n"
                "copies: green with x of Eqs 3-4, red with x = 0",
                loc="right",
            )


def verdicts(table: Table) -> list[Verdict]:
    """Of the table's numbers."""
    behind = lambda rule: {  # noqa: E731
        f"{kilo(p)}, link x{s:g}": table.column("behind, blocks", prompt=p, link=s, rule=rule)[0]
        for p in PROMPTS
        for s in SHARES
    }
    slow = {where: blocks for where, blocks in behind(NONE).items() if where.endswith(f"x{SLOW:g}")}
    longer = {
        f"{kilo(p)}, link x{s:g}": table.column("over none parked", prompt=p, link=s, rule=FORMULA)[0]
        for p in PROMPTS
        for s in SHARES
    }
    return [
        Verdict.every(
            "copies behind the prefill with x of Eqs 3-4", PREDICTED, Band(high=1), behind(FORMULA), " blocks"
        ),
        Verdict.every(f"and with x = 0 at link x{SLOW:g}", PREDICTED, Band(1 + 1e-9), slow, " blocks"),
        Verdict.every("prefill with copies over one without", PREDICTED, Band(high=LIMIT), longer, "x"),
    ]


def _row(prompt: int, share: float, rule: str, run: Prefill, alone: Prefill) -> Sequence[Any]:
    block = place_at(share).layer_bytes(prompt) / place_at(share).rate
    behind = max(0.0, run.copied - run.end) / block
    times = [1e3 * run.end, run.end / alone.end, 1e3 * run.copied, 1e3 * block, behind]
    return [prompt, share, rule, retained(prompt, share, rule), *times]


def _panel(ax: Any, prompt: int, runs: Runs) -> None:
    """Lanes from the top: compute, copies of every link with x of the formula, then with x = 0 on the slow one."""
    unit = runs[prompt, SLOW, ALL].end
    lanes = [("compute", SLOW, FORMULA)]
    for share in SHARES:
        lanes.append((f"link x{share:g}, x = {retained(prompt, share, FORMULA)}", share, FORMULA))
    lanes.append((f"link x{SLOW:g}, x = 0", SLOW, NONE))
    for y, (name, share, rule) in enumerate(lanes):
        run, rate = runs[prompt, share, rule], place_at(share).rate
        if name == "compute":
            leaves = {job.tag for job in run.copies}
            bars = [(start, end - start) for start, end in zip(run.starts, run.ends, strict=True)]
            colors = [LEAVES if layer in leaves else STAYS for layer in range(len(bars))]
        else:
            bars = [(job.end - job.num_bytes / rate, job.num_bytes / rate) for job in run.copies]
            colors = [COPIED[rule]] * len(bars)
        scaled = [(start / unit, width / unit) for start, width in bars]
        edges = "white" if scaled[0][1] > 0.02 else colors  # what is narrow would be nothing but edge
        ax.broken_barh(scaled, (y - 0.4, 0.8), facecolors=colors, edgecolors=edges, linewidth=0.3)
    ax.axvline(1, color="black", linewidth=0.6, linestyle="--")
    ax.set_yticks(range(len(lanes)), [name for name, *_ in lanes])
    ax.set_ylim(len(lanes) - 0.4, -0.6)
    ax.set_xlim(0, 2.4)
    ax.text(2.38, 0, f"{kilo(prompt)} tokens, {1e3 * unit:,.0f} ms", ha="right", va="center", size=7)

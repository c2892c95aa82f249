"""Beside figure 7: all-reduces that share the link with copies to the host, which yield to them in units, or not."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

from engine.costmodel.device import load_device
from engine.costmodel.step_model import StepModel
from engine.presets import preset
from experiments.common_flags import laid_over
from experiments.figures.base import PREDICTED, Band, Estimate, Figure, Result, Table, Verdict
from experiments.figures.layerkv.setting import LAYERKV, LLAMA3_70B, YI_34B
from experiments.link_slowdown import BACKGROUNDS, decodes, slowdown
from experiments.paper_models import MACHINE
from experiments.plots import figure
from experiments.points import BASE, Point
from experiments.seeded import Cell, over

CONTEXT, ROWS, STEPS = 2048, 32, 25
RATE = 0.65  # requests/s of the whole runs, as in figure 6
# Bytes on each device's link that a copy moves before it yields.
UNITS = {
    "0.5 MB": "link_unit=0.5MB",
    "2 MB": "link_unit=2MB",
    "4 MiB": "",  # the default
    "8 MB": "link_unit=8MB",
    "64 MB": "link_unit=64MB",
    "never": "link_aware=false",
}
SMALL, DEFAULT, WORSE = ("0.5 MB", "2 MB"), "4 MiB", ("64 MB", "never")
IN_RUNS = (DEFAULT, *WORSE)
NO_WAIT = "link_unit=1"  # what whole runs are compared with
LOADS, JUDGED = (0.1, 0.25, 0.5), 0.25  # shares of the link that copies ask for
MOST_SLOWER = 3.0  # percent
HEADER = ("what", "copies", "link share", "unit", "slower %", "low", "high")
STEP, RUN = "decode step", "TPOT of a run"
WORDS = dict(zip(BACKGROUNDS, ("at once", "layer by layer"), strict=True))
COLORS = dict(zip(WORDS.values(), ("#D55E00", "#0072B2"), strict=True))
Steps = Mapping[tuple[str, float, str], float]  # by (copies, share of the link, unit), percent


class Fig7Link(Figure):
    """Copies that make way."""

    title = "how much copies to the host slow decodes, by the unit in which they yield to all-reduces"
    source = "LayerKV (arXiv 2410.00428), section on contention; beside figure 7"
    about = (
        f"Decode steps of {LLAMA3_70B.name}, {ROWS} rows of {CONTEXT:,} tokens, while copies leave over the link of "
        f"the all-reduces; and whole runs under LayerKV of {YI_34B.name}, {CONTEXT:,} tokens, {RATE:g}/s."
    )

    def points(self, executor: str) -> dict[Hashable, Point]:
        """Whole runs, by unit; and one that waits for nothing."""
        runs: dict[Hashable, Point] = {unit: whole_run(UNITS[unit]) for unit in IN_RUNS}
        return runs | {"none": whole_run(NO_WAIT)}

    def evaluate(self, cells: Mapping[Hashable, Cell], executor: str) -> Result:
        """See `Figure`."""
        steps = slower_steps()
        runs = {unit: slower_run(cells[unit], cells["none"]) for unit in IN_RUNS}
        rows = [[STEP, *key, percent, percent, percent] for key, percent in steps.items()]
        rows += [[RUN, None, None, unit, e.mean, e.low, e.high] for unit, e in runs.items()]
        note = f"a run is compared with one whose copies yield after every byte ({NO_WAIT})"
        return Result(Table(HEADER, rows), self._verdicts(steps, runs), [note])

    def _verdicts(self, steps: Steps, runs: Mapping[str, Estimate]) -> list[Verdict]:
        def at(units: Sequence[str]) -> dict[str, float]:
            return {f"{unit}, {copies}": steps[copies, JUDGED, unit] for unit in units for copies in WORDS.values()}

        few, more = Band(high=MOST_SLOWER), Band(MOST_SLOWER)
        share = f"copies on {JUDGED:.0%} of the link"
        burst = (
            f"{DEFAULT} of a burst hold an all-reduce up as long as {DEFAULT} take on the link; 2 MB keep to the band"
        )
        return [
            Verdict.every(f"decode steps, units up to {SMALL[-1]}, {share}", PREDICTED, few, at(SMALL), "% slower"),
            Verdict.every(
                f"decode steps, {DEFAULT}, the default, {share}", PREDICTED, few, at([DEFAULT]), "% slower", burst
            ),
            Verdict.every(
                f"decode steps, {' or '.join(WORSE)}, a burst on {JUDGED:.0%} of the link", PREDICTED, more,
                {unit: steps[WORDS["swap"], JUDGED, unit] for unit in WORSE}, "% slower",
            ),
            Verdict.every(
                f"TPOT of runs, {DEFAULT}", PREDICTED, few,
                {unit: found for unit, found in runs.items() if unit not in WORSE}, "% slower",
            ),
            Verdict.every(
                f"TPOT of runs, {' or '.join(WORSE)}", PREDICTED, more,
                {unit: runs[unit] for unit in WORSE}, "% slower",
                "copies are a small part of a run, and who is admitted when changes TPOT by as much",
            ),
        ]  # fmt: skip

    def draw(self, result: Result, stem: Path) -> None:
        """Steps as lines, whole runs as points."""
        table, units = result.table, list(UNITS)
        with figure(stem, 3.6) as axes:
            for copies, color in COLORS.items():
                for load, line in zip(LOADS, (":", "-", "--"), strict=True):
                    slower = table.column("slower %", **{"copies": copies, "link share": load})
                    label = f"{copies}, {load:.0%} of the link"
                    axes.plot(units, slower, line, color=color, linewidth=1, marker=".", markersize=4, label=label)
            of = lambda name: table.column(name, what=RUN)  # noqa: E731
            axes.vlines(of("unit"), of("low"), of("high"), color="black", linewidth=0.8)
            axes.plot(of("unit"), of("slower %"), "D", color="black", markersize=3.5, label="whole runs, Yi-34B: TPOT")
            axes.axhline(MOST_SLOWER, color="gray", linewidth=0.6, zorder=0)
            axes.set_yscale("symlog", linthresh=1)
            axes.set_ylabel("slower than without copies (%)")
            axes.set_xlabel("what a copy moves before it yields")
            axes.set_title("decode steps of Llama3.1-70B on 4 L20s\nbeside copies to the host")
            axes.figure.legend(frameon=False, fontsize=6, loc="outside lower center", ncols=2)


def whole_run(extra: str) -> Point:
    """LayerKV with copies in such units, or that do not yield."""
    return YI_34B.fixed(LAYERKV, CONTEXT, RATE, extra=extra)


def slower_steps() -> dict[tuple[str, float, str], float]:
    """How much longer decode steps are than without copies, in percent."""
    device = dict(item.split("=") for item in MACHINE.split(","))
    cost = StepModel(preset(LLAMA3_70B.model), load_device(device["device"], device["stack"]), tensor=LLAMA3_70B.tensor)
    works, found = decodes(ROWS, CONTEXT, STEPS), {}
    for background, copies in WORDS.items():
        for load in LOADS:
            for unit, extra in UNITS.items():
                settings = f"{MACHINE},tensor={LLAMA3_70B.tensor}" + (f",{extra}" if extra else "")
                config = laid_over(BASE, settings, "figure 7")
                slower = slowdown(cost, config, works, background, load).slowdown
                found[copies, load, unit] = round(100 * slower, 6) + 0.0  # no -0
    return found


def slower_run(cell: Cell, free: Cell) -> Estimate:
    """How much longer the mean TPOT of a run is, in percent."""
    ratio = over(cell, free, "mean_tpot_ms")
    return Estimate(100 * (ratio.mean - 1), 100 * (ratio.low - 1), 100 * (ratio.high - 1))

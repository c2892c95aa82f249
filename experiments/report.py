"""A report of the figures that have been made, in Markdown: every verdict, what kind of evidence it is, what made it.

    python -m experiments.report --dir=results/figures --out=report.md

Reads what `reproduce` wrote into every folder under --dir: verdict.json, config.json, the picture. Of a verdict that
was missed it says why, as far as the figure knows. Pictures and data are linked relative to --out. Ends with one JSON
line.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags

from engine.errors import ConfigError
from engine.files import write_whole
from experiments import common_flags
from experiments.figures import FIGURES
from experiments.figures.base import KINDS, REPRODUCTION, WORDS

DIR = flags.DEFINE_string("dir", "results/figures", "Folder that `reproduce` wrote figures into, as its --out.")
OUT = flags.DEFINE_string("out", None, "File to write. Default: report.md under --dir.", allow_override=True)

VERDICT, CONFIG, PICTURE, DATA = "verdict.json", "config.json", "figure.png", "data.csv"
MEANING = {
    "arithmetic": "follows from shapes and sizes",
    "fitted": "constants were fitted to the very points it is compared with",
    "predicted": "simulated, with constants that were fitted elsewhere",
    "measured": "on the real engine",
}
Verdicts = list[dict[str, Any]]  # as in verdict.json


@dataclass(frozen=True)
class Made:
    """A figure's files."""

    folder: Path
    head: dict[str, Any]  # verdict.json
    config: dict[str, Any]  # config.json

    @property
    def name(self) -> str:
        """As `reproduce` calls it."""
        return self.head["figure"]

    @property
    def verdicts(self) -> Verdicts:
        """Of the figure."""
        return self.head["verdicts"]

    @property
    def command(self) -> str:
        """What made it, on any machine."""
        return shlex.join(["python", *self.config["command"][1:]])

    @property
    def commit(self) -> str:
        """Of the code that made it."""
        known = self.config["commit"]
        return f"{known['hash'][:12]}{', changed' if known['dirty'] else ''}" if known else "unknown"


def load(directory: Path) -> list[Made]:
    """The figures under a folder, in the order of `FIGURES`; those from outside the tree after them.

    Raises:
      ConfigError: there is none, or a file of one is damaged.
    """
    found = [Made(file.parent, _read(file), _read(file.with_name(CONFIG))) for file in directory.rglob(VERDICT)]
    if not found:
        raise ConfigError(f"--dir={directory} holds no figure: python -m experiments.reproduce --figure=all makes them")
    order = {name: i for i, name in enumerate(FIGURES)}
    return sorted(found, key=lambda made: (order.get(made.name, len(order)), made.name))


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as e:
        raise ConfigError(f"{file} cannot be read ({e}): make the figure again") from None


def tally(verdicts: Iterable[dict[str, Any]]) -> str:
    """How many of those that could be judged passed, as `3 of 4`; empty: there is none."""
    judged = [v["passed"] for v in verdicts if v["passed"] is not None]
    return f"{sum(judged)} of {len(judged)}" if judged else ""


def text(made: Sequence[Made], base: Path) -> str:
    """The report. `base`: the folder that links start from."""
    return "\n\n".join(["# Figures", _summary(made), *(_section(figure, base) for figure in made)]) + "\n"


def _summary(made: Sequence[Made]) -> str:
    """What counts, by kind, and by figure."""
    every = [v for figure in made for v in figure.verdicts]
    counted = tally(v for v in every if v["kind"] in REPRODUCTION) or "none"
    by_kind = [
        [kind, MEANING[kind], "yes" if kind in REPRODUCTION else "no", *(str(_count(every, kind, p)) for p in WORDS)]
        for kind in KINDS
    ]
    by_figure = [[figure.name, figure.head["title"], *_tallies(figure.verdicts)] for figure in made]
    return "\n\n".join([
        f"Verdicts reproduced: **{counted}**. A verdict compares a claim of a paper with what was found here, and only "
        "predicted and measured ones count as reproduction.",
        table(["kind", "what it is", "counts", "passed", "missed", "not judged"], by_kind),
        "By figure, how many of those that could be judged passed:",
        table(["figure", "shows", *KINDS], by_figure),
    ])  # fmt: skip


def _count(verdicts: Verdicts, kind: str, passed: bool | None) -> int:
    return sum(v["kind"] == kind and v["passed"] is passed for v in verdicts)


def _tallies(verdicts: Verdicts) -> list[str]:
    return [tally(v for v in verdicts if v["kind"] == kind) for kind in KINDS]


def _section(made: Made, base: Path) -> str:
    """One figure: what was run, the picture, verdicts, what was missed and why, the command."""
    head, verdicts, link = made.head, made.verdicts, _linker(made.folder, base)
    parts = [f"## {made.name}: {head['title']}", f"{head['source']}. {head['about']}"]
    if (made.folder / PICTURE).exists():
        parts.append(f"![{head['title']}]({link(PICTURE)})")
    rows = [[v["name"], v["kind"], v["limit"], v["reached"], WORDS[v["passed"]]] for v in verdicts]
    parts.append(table(["verdict", "kind", "band", "found", ""], rows))
    lines = [
        f"* Missed: {v['name']}: {v['why'] or 'no explanation was found'}." for v in verdicts if v["passed"] is False
    ]
    if lines := [*lines, *(f"* {note}" for note in head["notes"])]:
        parts.append("\n".join(lines))
    on = "a virtual clock" if head["executor"] == "sim" else "the real engine"
    parts.append(
        f"Made on {on}, {head['seeds']} seeds, {made.config['seconds']:g} s, commit {made.commit}: [data]({link(DATA)})"
    )
    parts.append(f"```\n{made.command}\n```")
    return "\n\n".join(parts)


def _linker(folder: Path, base: Path) -> Callable[[str], str]:
    """Where a figure's file is, seen from the report."""
    return lambda name: Path(os.path.relpath(folder / name, base)).as_posix().replace(" ", "%20")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    """The program."""
    directory = Path(DIR.value)
    out = Path(OUT.value or directory / "report.md")
    made = load(directory)
    write_whole(out, text(made, out.parent))
    every = [v for figure in made for v in figure.verdicts]
    kinds = {kind: tally(v for v in every if v["kind"] == kind) for kind in KINDS}
    print(f"{len(made)} figures, {len(every)} verdicts, in {out}")
    print(json.dumps({"bench": "report", "out": str(out), "figures": len(made), "passed": kinds}))
    return 0


if __name__ == "__main__":
    common_flags.run_main(main, engine=False)

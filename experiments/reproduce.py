"""Figures of the papers, ours over theirs, each with verdicts that say what kind of evidence they are.

    python -m experiments.reproduce --list
    python -m experiments.reproduce --figure=layerkv/fig1 --out=results/figures
    python -m experiments.reproduce --figure=all --seeds=3 --resume

Runs the points of a figure on all cores, every one once per seed with the same arrivals and lengths under all policies.
Points that have ended are kept (--kept) and never run again by the same code, so that --resume goes on after an
interruption, or with another figure. Writes {config.json, data.csv, figure.png, figure.pdf, verdict.json} under
--out/FIGURE; data.csv and verdict.json are the same bytes whenever the same code runs. Prints the table and the
verdicts; ends with one JSON line per figure. `--figure=package.module:Name` is one from outside the tree.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from absl import flags

from engine.errors import ConfigError
from engine.files import write_whole
from experiments import common_flags, environment, figures, real_cells, seeded
from experiments.figures.base import REPRODUCTION, Figure, Result, verdict_table
from experiments.run_record import claim
from experiments.seeded import over_seeds, run_all
from experiments.tables import format_table, rounded

flags.declare_key_flag("out")
flags.declare_key_flag("overwrite")
flags.declare_key_flag("executor")
flags.adopt_module_key_flags(seeded)
NAMES = flags.DEFINE_multi_string("figure", [], "Which, as --list names them, or `all`; repeatable.")
LIST = flags.DEFINE_bool("list", False, "Lists the figures and ends.")
RESUME = flags.DEFINE_bool("resume", False, "Goes on in an --out that holds earlier figures.")

SEEDS = {"sim": 10, "jax": 5}  # unless --seeds says so; on a real device they are interleaved repeats
CONFIG, DATA, PICTURE, VERDICT = FILES = ("config.json", "data.csv", "figure", "verdict.json")


def executor() -> str:
    """--executor; the virtual clock unless it says otherwise."""
    return common_flags.EXECUTOR.value if common_flags.EXECUTOR.present else "sim"


def num_seeds() -> int:
    """--seeds, or as many as the executor deserves."""
    return seeded.SEEDS.value if seeded.SEEDS.present else SEEDS[executor()]


def chosen() -> dict[str, Figure]:
    """The figures of --figure, by name.

    Raises:
      ConfigError: none, an unknown one, one that has nothing to run on this executor, or two of one name.
    """
    if not NAMES.value:
        raise ConfigError("--figure: which? --list names them, `all` means every one")
    on = executor()
    names = dict.fromkeys(n for name in NAMES.value for n in (figures.FIGURES if name == "all" else (name,)))
    found = {name: figures.find(name) for name in names}
    lacking = [name for name, figure in found.items() if on not in figure.executors]
    if asked := [name for name in lacking if name in NAMES.value]:
        raise ConfigError(f"--figure={asked[0]} runs on {', '.join(found[asked[0]].executors)}, not on {on}")
    folders = [folder_of(name) for name in found]
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise ConfigError(f"--figure: two of them would both go to {twice[0]} under --out: make one after the other")
    return {name: figure for name, figure in found.items() if name not in lacking}


def listing() -> str:
    """A line per figure."""
    rows = [[name, ", ".join(f.executors), f.source, f.title] for name in figures.FIGURES if (f := figures.find(name))]
    return format_table(["figure", "runs on", "source", "shows"], rows)


def folder_of(name: str) -> str:
    """Under --out."""
    return name.replace(":", "/").replace(".py", "") if name in figures.FIGURES else name.rpartition(":")[2]


def evaluate(figure: Figure, on: str) -> tuple[Result, dict[str, Any]]:
    """Runs what a figure needs. Returns its outcome and its points, by what they are called."""
    points = figure.points(on)
    runs = {key: over_seeds(point, num_seeds()) for key, point in points.items()}
    cells = (run_all if on == "sim" else real_cells.run_all)(runs)
    return figure.evaluate(cells, on), {str(key): point.said() for key, point in points.items()}


def run(name: str, figure: Figure, out: Path) -> dict[str, Any]:
    """Runs a figure and writes its files. Returns its headline."""
    start = time.perf_counter()
    result, points = evaluate(figure, executor())
    head = {"figure": name, "title": figure.title, "source": figure.source, "about": figure.about}
    head |= {"executor": executor(), "seeds": num_seeds(), "notes": result.notes}
    verdicts = [dataclasses.asdict(v) | {"counts": v.counts} for v in result.verdicts]
    write_whole(out / DATA, result.table.csv())
    write_whole(out / VERDICT, json.dumps(head | {"verdicts": verdicts}, indent=1) + "\n")
    picture: str | None = f"{out / PICTURE}.png"
    try:
        figure.draw(result, out / PICTURE)
    except ConfigError as e:
        print(f"no picture: {e}")
        picture = None
    seconds = round(time.perf_counter() - start, 1)
    about = head | {"points": points, "seconds": seconds} | environment.describe()
    write_whole(out / CONFIG, json.dumps(about, indent=1) + "\n")
    print(f"\n{name}: {figure.title} ({figure.source})\n{figure.about}")
    print(format_table(result.table.header, result.table.rows))
    print("\n".join([*result.notes, verdict_table(result.verdicts)]), flush=True)
    judged = [v for v in result.verdicts if v.kind in REPRODUCTION and v.passed is not None]
    line = {"figure": name, "executor": executor(), "seconds": rounded(seconds), "picture": picture}
    return line | {"reproduced": sum(bool(v.passed) for v in judged), "of": len(judged)}


def main() -> int:
    """The program."""
    if LIST.value:
        print(listing())
        return 0
    todo = chosen()
    if not todo:
        raise ConfigError(f"--figure=all: no figure runs on {executor()} yet (--list)")
    out = common_flags.out_directory("figures")
    for name in todo:  # before anything is run
        claim(out / folder_of(name), RESUME.value or common_flags.OVERWRITE.value, (VERDICT,))
    lines = [run(name, figure, out / folder_of(name)) for name, figure in todo.items()]
    print("\n".join(json.dumps(line) for line in lines))
    return 0


if __name__ == "__main__":
    common_flags.run_main(main, engine=False)

"""Ablations of LayerKV on the virtual clock, as `studies.py` lists them.

    python -m experiments.ablate --study=leave_one_out --study=link --out=results/ablations

Prints a table per load, one line per case. `lower by`: how many times lower than that of the first case the mean TTFT
is, paired over seeds, with a 95% bootstrap interval; tok/s are relative to the first case, too. Writes STUDY.json and
STUDY.txt, the same bytes whenever the same code runs, and STUDY.environment.json under --out; ends with one JSON line
per study, which says how long its runs took (with `--processes=1` and a new folder for --kept: on one core).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from absl import flags

from engine.files import write_whole
from experiments import common_flags, environment, seeded
from experiments.gates import Gate, gate_table
from experiments.run_record import claim
from experiments.seeded import figures, over_seeds, rounded_values, run_all
from experiments.studies import MACHINE, MODEL, SLO, STUDIES, Cells, Study
from experiments.tables import format_table, rounded

flags.declare_key_flag("out")
flags.declare_key_flag("overwrite")
flags.adopt_module_key_flags(seeded)
NAMES = flags.DEFINE_multi_enum("study", sorted(STUDIES), sorted(STUDIES), "Which; repeatable. Default: all.")


def text_of(study: Study, cells: Cells, judged: list[Gate]) -> str:
    """A table per load, what replaces what, and the gates."""
    parts = [f"{study.name}: {study.about}"]
    for load in study.loads:
        first = cells[load.name, study.cases[0].name]
        rows = [[case.name, *figures(cells[load.name, case.name], first)] for case in study.cases]
        parts.append(f"{load.name}\n{format_table(['case', *seeded.HEADER], rows)}")
    if notes := [f"{case.name}: {case.instead}" for case in study.cases if case.instead]:
        parts.append("\n".join(notes))
    return "\n\n".join([*parts, gate_table(judged)] if judged else parts)


def record_of(study: Study, cells: Cells, judged: list[Gate]) -> dict[str, Any]:
    """What follows from the code and the flags alone."""
    points = study.points()
    return {
        "study": study.name,
        "about": study.about,
        "model": MODEL,
        "machine": MACHINE,
        "slo": SLO,
        "seeds": seeded.SEEDS.value,
        "gates": [vars(gate) for gate in judged],
        "rows": [
            {"load": load, "case": case, "engine": points[load, case].engine, "workload": points[load, case].workload}
            | {"summary": rounded_values(cell)}
            for (load, case), cell in cells.items()
        ],
    }


def run(study: Study, out: Path) -> dict[str, Any]:
    """Runs a study and writes its files. Returns its headline."""
    start = time.perf_counter()
    runs = {key: over_seeds(point) for key, point in study.points().items()}
    cells = run_all(runs)
    seconds = round(time.perf_counter() - start, 1)
    judged = study.judge(study, cells) if study.judge else []
    text = text_of(study, cells, judged)
    print(f"{text}\n", flush=True)
    write_whole(out / f"{study.name}.txt", text + "\n")
    data = json.dumps(record_of(study, cells, judged), separators=(",", ":"))
    write_whole(out / f"{study.name}.json", data + "\n")
    about = environment.describe() | {"seconds": seconds}
    write_whole(out / f"{study.name}.environment.json", json.dumps(about, indent=1) + "\n")
    line = {"bench": "ablate", "study": study.name, "runs": sum(map(len, runs.values())), "seconds": rounded(seconds)}
    return line | {"gates": {gate.name: gate.passed for gate in judged}}


def main() -> int:
    """The program."""
    studies = [STUDIES[name] for name in dict.fromkeys(NAMES.value)]
    files = [f"{study.name}.json" for study in studies]
    out = claim(common_flags.out_directory("ablations"), common_flags.OVERWRITE.value, files)
    lines = [run(study, out) for study in studies]
    print("\n".join(json.dumps(line) for line in lines))
    return 0


if __name__ == "__main__":
    common_flags.run_main(main, engine=False)

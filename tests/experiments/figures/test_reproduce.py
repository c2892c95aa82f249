"""The program that makes figures: from outside the tree, interrupted and resumed, refused in one line."""

import csv
import json

import pytest

from experiments import figures
from tests.experiments import programs

EXAMPLE = "tests/experiments/figures/example_figure.py"
# Six points of which the last one's process ends in its first step, as long as there is no file `go`.
FRAGILE = """
import os
from pathlib import Path
from engine.scheduler.vllm_v0 import VllmV0
from experiments.points import Point
from tests.experiments.figures.example_figure import Queue

LOAD = "synthetic:num=6,rate={},prompt=uniform:10:90,output=fixed:9"

class Dies(VllmV0):
    def plan(self, now):
        if not Path("go").exists():
            os._exit(9)
        return super().plan(now)

class Fragile(Queue):
    def points(self, executor):
        *keys, last = super().points(executor)
        engine = "num_pages=400,page_size=8,policy="
        policies = dict.fromkeys(keys, "vllm_v0") | {last: "fragile.py:Dies"}
        return {
            key: Point("tiny-1m", engine + policy, LOAD.format(300 + i), slo="ttft:9,tpot:9")
            for i, (key, policy) in enumerate(policies.items())
        }
"""


def test_a_figure_from_outside_the_tree(tmp_path):
    """Its files are those of ours."""
    pytest.importorskip("matplotlib")
    flags = ("--seeds=1", "--processes=1", f"--out={tmp_path}/out", f"--kept={tmp_path}/kept")
    code, stdout, stderr = programs.run("reproduce", f"--figure={EXAMPLE}:Queue", *flags)
    assert code == 0, stderr
    line = json.loads(stdout.splitlines()[-1])
    assert line["figure"] == f"{EXAMPLE}:Queue" and (line["reproduced"], line["of"]) == (3, 3)
    files = ("config.json", "data.csv", "figure.pdf", "figure.png", "verdict.json")
    assert sorted(file.name for file in (tmp_path / "out/Queue").iterdir()) == [*files]
    verdict = json.loads((tmp_path / "out/Queue/verdict.json").read_text())
    assert [v["passed"] for v in verdict["verdicts"]] == [True] * 3 and verdict["seeds"] == 1
    with (tmp_path / "out/Queue/data.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["rate"], row["policy"]) for row in rows][::2] == [(rate, "vLLM") for rate in ("0.5", "1.0", "1.5")]
    assert len(json.loads((tmp_path / "out/Queue/config.json").read_text())["points"]) == len(rows) == 6


def test_what_was_interrupted_goes_on(tmp_path):
    """And comes to the same bytes as what was not; points that had ended are not run again."""
    (tmp_path / "fragile.py").write_text(FRAGILE)
    asked = ("--figure=fragile.py:Fragile", "--seeds=2", "--processes=1")

    def reproduce(out, *flags):
        return programs.run("reproduce", *asked, f"--out={out}", f"--kept={out}-kept", *flags, cwd=tmp_path)

    code, _, _ = reproduce("first")
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "first-kept").iterdir()}
    assert code == 9 and len(kept) == 10 and not list((tmp_path / "first").rglob("verdict.json"))
    (tmp_path / "go").touch()
    code, _, stderr = reproduce("first", "--resume")
    assert code == 0, stderr
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())
    code, _, stderr = reproduce("second")
    assert code == 0, stderr
    for name in ("data.csv", "verdict.json"):
        assert (tmp_path / "first/Fragile" / name).read_bytes() == (tmp_path / "second/Fragile" / name).read_bytes()
    code, _, stderr = reproduce("second")
    assert code == 2 and "second/Fragile holds an earlier run (verdict.json)" in stderr.splitlines()[-1]


def test_the_map_shows_the_example():
    code = (programs.ROOT / EXAMPLE).read_text()
    shown = "".join(f"  {line}".rstrip() + "\n" for line in code.splitlines())
    assert shown in (programs.ROOT / "WORKSPACE.md").read_text()


def test_the_list_names_all():
    code, stdout, _ = programs.run("reproduce", "--list")
    assert code == 0 and [line.split()[0] for line in stdout.splitlines()[2:]] == [*figures.FIGURES]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--figure=layerkv/fig0",), "figure 'layerkv/fig0' is unknown; known: layerkv/fig1"),
        (("--figure=layerkv/fig1", "--executor=jax"), "--figure=layerkv/fig1 runs on sim, not on jax"),
        (("--figure=all", f"--figure={EXAMPLE}:Queue", "--executor=jax"), "Queue runs on sim, not on jax"),
        ((f"--figure={EXAMPLE}:Queue", f"--figure=./{EXAMPLE}:Queue"), "would both go to Queue"),
        ((), "--figure: which? --list names them"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, message):
    code, _, stderr = programs.run("reproduce", *arguments, f"--out={tmp_path}")
    assert code == 2 and message in stderr and stderr.count("\n") == 1 and not list(tmp_path.iterdir())

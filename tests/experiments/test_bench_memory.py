"""Protects the memory bench: it runs, with and without the copies, and ends in one JSON line."""

import json

from tests.experiments import programs

SMALL = ("--rounds=2", "--layers=3", "--bulk_pages=20", "--growths=5", "--copied_pages=8")


def test_every_measurement_is_there_and_positive():
    code, stdout, stderr = programs.run("bench_memory", *SMALL, "--chunk=4")
    assert code == 0, stderr
    line = json.loads(stdout.splitlines()[-1])
    assert line["bench"] == "memory" and line["layers"] == 3 and line["chunk"] == 4
    measured = [v for k, v in line.items() if k.endswith(("_s", "_us", "_ratio"))]
    assert len(measured) == 17 and min(measured) > 0


def test_flags_are_obeyed_or_refused():
    code, stdout, stderr = programs.run("bench_memory", *SMALL, "--rounds=none")
    assert code == 2 and stdout == "" and "rounds" in stderr and stderr.count("\n") == 1
    code, stdout, stderr = programs.run("bench_memory", *SMALL, "--copied_pages=0")
    assert code == 0 and "grow_us" in stdout and "gather" not in stdout, stderr

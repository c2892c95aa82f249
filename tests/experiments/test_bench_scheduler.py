"""The program measures what it says, and needs no device."""

import json

from tests.experiments import programs


def test_one_json_line_and_a_row_for_every_policy():
    size = ["--num_running=3", "--num_layers=2", "--context=64", "--steps=10"]
    code, out, err = programs.run("bench_scheduler", *size, "--policies=vllm_v0,vllm_v1")
    assert (code, err) == (0, "")
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [(r["policy"], r["num_running"]) for r in rows] == [("vllm_v0", 3), ("vllm_v1", 3)]
    assert all(0 < r["median_ms"] <= r["p99_ms"] for r in rows)


def test_bad_numbers_are_one_line():
    code, out, err = programs.run("bench_scheduler", "--num_running=many")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "--num_running=many" in err

"""The program that sweeps: its data are what the points say, whoever ran them and when."""

import csv
import json

import pytest

from experiments.figures.base import Estimate
from experiments.points import Point, run_point
from tests.experiments import programs

ENGINE, LOAD = (
    "num_pages=400,page_size=8,max_num_seqs=4",
    "synthetic:num=6,rate=300,prompt=uniform:10:90,output=fixed:9",
)
BASE = ("--model=tiny-1m", f"--engine={ENGINE}", f"--workload={LOAD}", "--seeds=2", "--processes=1", "--kept=kept")
PARAMS = ("--param=policy=vllm_v0,chunked", "--param=workload.rate=100,300")


def sweep(cwd, *flags):
    code, stdout, stderr = programs.run("sweep", *BASE, *flags, cwd=cwd)
    assert code == 0, stderr
    return stdout


def test_data_are_means_over_seeds_of_every_point(tmp_path):
    """Points that are kept are not run again, whatever is asked of them; a grid that grows runs what is new."""
    metrics = ("--metric=mean_ttft_ms", "--metric=completed", "--metric=slo_attainment", "--metric=mean_ttft_ms")
    stdout = sweep(tmp_path, *PARAMS, *metrics, "--out=a", "--goodput=")
    line = json.loads(stdout.splitlines()[-1])
    assert (line["bench"], line["points"], line["runs"], line["data"]) == ("sweep", 4, 8, "a/data.csv")
    with (tmp_path / "a/data.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["policy"], row["workload.rate"]) for row in rows] == [
        (policy, rate) for policy in ("vllm_v0", "chunked") for rate in ("100", "300")
    ]
    point = Point("tiny-1m", f"{ENGINE},policy=chunked", LOAD)
    found = Estimate.of([run_point(Point(point.model, point.engine, LOAD, seed))["mean_ttft_ms"] for seed in (0, 1)])
    names = ("mean_ttft_ms", "mean_ttft_ms low", "mean_ttft_ms high")
    assert [float(rows[3][name]) for name in names] == pytest.approx([found.mean, found.low, found.high], rel=1e-4)
    assert {row["completed"] for row in rows} == {"6.0"} and {row["slo_attainment"] for row in rows} == {""}
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert len(config["points"]) == 4 and config["seeds"] == 2 and "seconds" in config

    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").iterdir()}
    assert len(kept) == 8
    sweep(tmp_path, *PARAMS, *metrics, "--out=b", "--goodput=")
    assert (tmp_path / "a/data.csv").read_bytes() == (tmp_path / "b/data.csv").read_bytes()
    sweep(tmp_path, PARAMS[0], f"{PARAMS[1]},500", "--metric=steps", "--out=b", "--goodput=", "--resume")
    assert len(list((tmp_path / "kept").iterdir())) == 12
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--param=pages=1",), "--param=pages=1: 'pages' is unknown; known: model, workload.OPTION, async_depth"),
        (("--param=workload.pace=1",), "unknown option pace; known: "),
        (("--param=policy=vllm_v0", "--metric=speed"), "should be one of"),
        (("--param=policy=vllm_v0", "--workload="), "--workload is missing"),
        (("--param=policy=vllm_v0", "--executor=jax"), "--executor means nothing to this program"),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, message):
    code, _, stderr = programs.run("sweep", *BASE, *flags, "--out=out", cwd=tmp_path)
    assert code == 2 and message in stderr and stderr.count("\n") == 1
    assert not (tmp_path / "out/data.csv").exists()

"""Simulated runs as values: an interrupted sweep goes on, a failure says why, the same point gives the same bytes."""

import json
import os
import time

import pytest

from engine.errors import ConfigError
from engine.summary import Slo
from experiments import kept_points, points, workloads
from experiments.points import Point, run_point, run_points
from experiments.workloads.frozen import freeze
from tests.experiments import programs

ENGINE = "num_pages=400,page_size=8,max_num_seqs=4"
LOAD = "synthetic:num=6,rate=300,prompt=uniform:10:90,output=fixed:9"


def point(engine="policy=vllm_v0", workload=LOAD, seed=0, slo="", model="tiny-1m") -> Point:
    return Point(model, f"{ENGINE},{engine}", workload, seed, slo)


POINTS = [point(f"policy={policy}", seed=seed) for policy in ("vllm_v0", "chunked") for seed in (0, 1)]


@pytest.fixture
def counted(monkeypatch):
    """Which points are really run."""
    ran = []
    run = points.run_point
    monkeypatch.setattr(points, "run_point", lambda p: ran.append(p) or run(p))
    return ran


def test_a_point_says_what_is_run():
    p = point("policy=chunked,host_bytes=2MiB", seed=3, slo="ttft:5,tpot:2.5")
    assert (p.config.scheduler.policy, p.config.cache.host_bytes, p.config.executor) == ("chunked", 2 << 20, "sim")
    assert p.config.seed == 3 and p.objectives == Slo(5.0, 2.5)
    assert p.requests() == workloads.build(f"{LOAD},seed=3")
    assert point(workload="azure-like").spec == "azure-like:seed=0"
    assert point(workload="w.jsonl", seed=None).spec == "w.jsonl"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"engine": "policy=lru"}, "policy 'lru' is unknown"),
        ({"engine": "pages=3"}, "'pages=3' is not name=value of a flag"),
        ({"slo": "latency:3"}, "goodput 'latency:3'"),
    ],
)
def test_a_point_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        point(**change)


def test_a_summary_follows_from_its_point():
    """The last token of each of 6 requests of 9 tokens is known after 8 gaps; attainment by hand from the latencies."""
    first = run_point(point(slo="ttft:1000000,tpot:1000000"))
    assert first["completed"] == 6 and first["total_output_tokens"] == 6 * 9 and first["slo_attainment"] == 1.0
    assert first == run_point(point(slo="ttft:1000000,tpot:1000000"))
    fastest = run_point(point(slo=f"ttft:{first['median_ttft_ms'] * 1.0000001:.9f}"))
    assert fastest["slo_attainment"] == pytest.approx(0.5)
    assert run_point(point(seed=1))["duration"] != first["duration"]


def test_what_is_kept_is_not_run_again(tmp_path, counted):
    """Nor what other points of the sweep were; files are the same bytes, whoever wrote them."""
    first = dict(run_points(POINTS, 1, tmp_path / "a"))
    assert counted == POINTS and sorted(first) == [0, 1, 2, 3]
    assert dict(run_points(POINTS[::-1], 1, tmp_path / "a")) == {3 - i: summary for i, summary in first.items()}
    more = dict(run_points([*POINTS[:2], point(seed=2)], 1, tmp_path / "a"))
    assert counted == [*POINTS, point(seed=2)] and (more[0], more[1]) == (first[0], first[1])
    assert dict(run_points(POINTS, 1, tmp_path / "b")) == first and len(counted) == 9
    kept = {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()}
    assert len(kept) == 4 and all((tmp_path / "a" / name).read_bytes() == data for name, data in kept.items())


def test_an_interrupted_sweep_goes_on(tmp_path, counted):
    results = run_points(POINTS, 1, tmp_path)
    next(results), next(results)
    results.close()
    assert sorted(i for i, _ in run_points(POINTS, 1, tmp_path)) == [0, 1, 2, 3]
    assert counted == POINTS


def test_other_code_or_settings_are_another_point(monkeypatch):
    """How the settings are written does not matter."""
    key = kept_points.key_of(point())
    assert key == kept_points.key_of(Point("tiny-1m", f"policy=vllm_v0,{ENGINE}", LOAD))
    others = (point(seed=1), point("policy=chunked"), point(slo="ttft:1"), point(model="small-20m"))
    assert len({key, *map(kept_points.key_of, others)}) == 5
    monkeypatch.setattr(kept_points, "code_digest", lambda: "other")
    assert kept_points.key_of(point()) != key


def test_a_trace_that_changed_under_its_name_is_another_point(tmp_path):
    def key(seed):
        (tmp_path / "w.jsonl").write_text(freeze(workloads.build(f"{LOAD},seed={seed}"), LOAD, seed, 512)[0])
        kept_points._requests_digest.cache_clear()
        return kept_points.key_of(point(workload=str(tmp_path / "w.jsonl"), seed=None))

    assert key(1) != key(2) and key(1) == key(1)


def test_code_is_what_a_simulated_run_goes_through():
    covered = {str(path.relative_to(kept_points.ROOT)) for path in kept_points._code()}
    assert {"engine/scheduler/vllm_v0.py", "engine/costmodel/devices/l20.json", "experiments/replay.py"} <= covered
    assert {"experiments/workloads/synthetic.py"} <= covered and not any("test" in path for path in covered)


def test_a_damaged_file_is_named(tmp_path):
    assert len(dict(run_points(POINTS[:1], 1, tmp_path))) == 1
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:-40])
    with pytest.raises(ConfigError, match=rf"{file.name} is not a kept point .* delete it"):
        list(run_points(POINTS[:1], 1, tmp_path))


def test_a_failing_point_says_why_and_the_others_go_on(tmp_path):
    long = point(workload="burst:num=2,context=5000,output=3")
    got, asked = {}, [POINTS[0], long, POINTS[1]]
    with pytest.raises(ConfigError, match=r"1 of 3 points failed; the first: tiny-1m .*burst.* 5000 tokens") as e:
        got.update(run_points(asked, 1, tmp_path))
    assert "\n" not in str(e.value) and sorted(got) == [0, 2]
    assert len(list(tmp_path.iterdir())) == 2


def die(point):
    """A run that the system kills."""
    os._exit(9)


PARALLEL = """
import json
from pathlib import Path
from engine.errors import ConfigError
from experiments.points import run_points
from tests.experiments.test_points import POINTS, die
if __name__ == "__main__":
    print(json.dumps(sorted(run_points(POINTS, 2, Path("kept")))))
    try:
        list(run_points(POINTS, 2, run=die))
    except ConfigError as e:
        print(e)
"""


def test_processes_give_what_one_gives(tmp_path):
    """And one that is killed is one line."""
    (tmp_path / "parallel.py").write_text(PARALLEL)
    process = programs.subprocess.run(
        [programs.sys.executable, "parallel.py"], cwd=tmp_path, env={"PYTHONPATH": str(programs.ROOT)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    summaries, message = process.stdout.splitlines()
    assert json.loads(summaries) == json.loads(json.dumps(sorted(run_points(POINTS, 1))))
    assert len(list((tmp_path / "kept").iterdir())) == 4
    assert message == "a worker was killed, perhaps for memory: points that had ended are kept"


def test_a_killed_sweep_leaves_no_process_behind(tmp_path):
    """Workers hold its pipes: `communicate` would wait for them."""
    flags = ("--study=page_size", "--processes=2", "--kept=kept", "--out=out")
    process = programs.start("ablate", *flags, cwd=tmp_path)
    while process.poll() is None and not list(tmp_path.glob("kept/*.json")):
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=60)
    assert not (tmp_path / "out/page_size.json").exists() and list(tmp_path.glob("kept/*.json"))

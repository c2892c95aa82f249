"""Protects the demo: one rate, the same requests at growing contexts, a control with room, an honest end."""

import importlib.util
import json
import signal
import time

import pytest

from engine.models.hf_config import write_config
from tests.experiments import programs
from tests.experiments.timed_engine import MODEL


@pytest.fixture
def model(tmp_path):
    """A directory that says how many layers the timed engine has."""
    directory = tmp_path / "model"
    directory.mkdir()
    write_config(MODEL, directory)
    return directory


def rows(path):
    return {r["id"]: r for r in map(json.loads, path.read_text().splitlines())}


def test_points_share_requests_and_the_control_has_room(model, tmp_path):
    out = tmp_path / "out"
    code, stdout, stderr = programs.run("demo", f"--model={model}", f"--out={out}", "--seconds=1", timed=True)
    assert code == 0, stderr
    line = json.loads(stdout.splitlines()[-1])
    points = line["points"]
    assert len(points) == 6 and line["interrupted"] is False
    contexts = [p["mean_context"] for p in points]
    assert contexts[:5] == sorted(contexts[:5]) and contexts[5] == contexts[4]
    assert [p["pool_tokens"] for p in points] == [1280] * 5 + [10240]
    assert points[5]["total_preemptions"] == 0
    for p in points:
        assert p["mean_queue_ms"] + p["mean_prefill_ms"] == pytest.approx(p["mean_ttft_ms"], rel=1e-3)
    assert all(heading in stdout for heading in ("context", "queue share", "preempted", "calibration: prefill"))

    runs = [*sorted(out.glob("context-x*")), out / "control"]
    requests = [rows(run / "requests.jsonl") for run in runs]
    assert len({json.loads((run / "config.json").read_text())["num_pages"] for run in runs}) == 2
    for ids in zip(*(sorted(r) for r in requests), strict=True):
        same = [requests[k][i] for k, i in enumerate(ids)]
        assert len({(r["id"], r["arrival_s"], r["output_len"]) for r in same}) == 1
    sides = line["saturated"]
    assert [s["policy"] for s in sides] == ["vllm_v0", "layerkv"] and "requests/s when all come at once" in stdout
    ours, theirs = (rows(out / f"saturated-{s['policy']}/requests.jsonl") for s in sides)
    assert len(ours) == sides[0]["completed"] == sides[1]["completed"] == 32
    assert all(ours[i]["arrival_s"] == theirs[i]["arrival_s"] for i in ours), "both serve the same arrivals"
    assert all(0 <= s["slo_attainment"] <= 1 and s["output_throughput"] > 0 for s in sides)
    if importlib.util.find_spec("matplotlib"):
        assert line["figure"] == f"{out}/ttft.png"
        assert (out / "ttft.png").stat().st_size > 10_000 and (out / "ttft.pdf").exists()
    else:
        assert line["figure"] is None and "pip install 'folio[plots]'" in stdout


def test_interrupted_demo_shows_the_points_it_reached(model, tmp_path):
    out = tmp_path / "out"
    process = programs.start("demo", f"--model={model}", f"--out={out}", "--seconds=3", timed=True)
    second = out / "context-x0.0625/requests.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (second.exists() and second.read_text().count("\n") >= 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted by SIGINT in point 2 of 6" in stdout
    line = json.loads(stdout.splitlines()[-1])
    assert line["interrupted"] is True and len(line["points"]) == 2 and line["points"][1]["completed"] >= 3


BAD = {
    "--workload=azure:none.csv": "none.csv: cannot read the trace",
    "--workload=azure-like:num=5,num=6": "num is given twice",
    "--workload=synthetic:scale_prompt=2": "scale_prompt is given twice",
    "--link_gbs=1": "link_gbs and layerkv_tpot_slo follow from what is measured",
    "--num_pages=100": "the demo sizes the KV pool itself",
    "--model=no-such-preset": "no-such-preset",
}


@pytest.mark.parametrize("flag", BAD)
def test_bad_input_is_one_line(model, tmp_path, flag):
    code, _, stderr = programs.run("demo", f"--model={model}", f"--out={tmp_path}/out", flag, timed=True)
    assert code == 2 and BAD[flag] in stderr and stderr.count("\n") == 1

"""Protects a run's files: complete after a run, readable after an interruption or a kill, saying how far it got."""

import itertools
import json
import signal
import time

import pytest

from tests.experiments import programs

HASHES = ("model_hash", "weights_hash", "settings_hash")
WORKLOAD = "synthetic:rate=50,num=20,prompt=uniform:5:40,output=uniform:1:6"


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One complete run: its directory and standard output."""
    out = tmp_path_factory.mktemp("serve") / "run"
    code, stdout, stderr = programs.run(
        "serve", "--model=timed", f"--workload={WORKLOAD}", f"--out={out}", "--goodput=ttft:1000,tpot:500", timed=True
    )
    assert code == 0, stderr
    return out, stdout


def test_requests_and_summary_agree(finished):
    out, stdout = finished
    requests, summary = rows(out / "requests.jsonl"), json.loads((out / "summary.json").read_text())
    assert sorted(int(r["id"]) for r in requests) == list(range(20))
    assert all(r["status"] == "finished" and r["finish_reason"] == "length" for r in requests)
    assert all(r["num_output_tokens"] == r["output_len"] == len(r["itl_s"]) + 1 for r in requests)
    assert all(r["num_prompt_tokens"] == r["prompt_len"] for r in requests)
    for r in requests:
        assert r["ttft_s"] == pytest.approx(r["queue_s"] + r["prefill_s"], abs=3e-6)
        assert 0 <= r["injection_lag_s"] <= r["queue_s"] + 1e-6
    assert summary["completed"] == 20 and summary["failed"] == 0 and summary["interrupted"] is False
    assert summary["total_output_tokens"] == sum(r["output_len"] for r in requests)
    assert summary["mean_ttft_ms"] == pytest.approx(1e3 * sum(r["ttft_s"] for r in requests) / 20, abs=1e-2)
    assert summary["slo_attainment"] == 1.0
    window, due = summary["window"], [r["due_s"] for r in requests]
    assert (window["sent"], window["completed"], window["median_ttft_ms"]) == (20, 20, summary["median_ttft_ms"])
    assert (window["start_s"], window["end_s"]) == pytest.approx((min(due), max(due)), abs=1e-5)
    assert window["duration"] < summary["duration"]
    headline = json.loads(stdout.splitlines()[-1])
    assert headline["bench"] == "serve" and headline["completed"] == 20
    assert headline["mean_ttft_ms"] == pytest.approx(summary["mean_ttft_ms"], rel=1e-4)


def test_steps_account_for_every_token(finished):
    out, _ = finished
    requests, steps = rows(out / "requests.jsonl"), rows(out / "steps.jsonl")
    assert sum(s["prefill_tokens"] for s in steps) == sum(r["prompt_len"] for r in requests)
    assert sum(s["num_decode"] + s["num_prefill_seqs"] for s in steps) == sum(r["output_len"] for r in requests)
    assert sum(s["num_finished"] for s in steps) == 20
    assert all(a["end"] <= b["start"] for a, b in itertools.pairwise(steps)) and steps[0]["start"] >= 0


def test_config_and_flags_repeat_the_run(finished, tmp_path):
    out, _ = finished
    config = json.loads((out / "config.json").read_text())
    assert config["workload"] == WORKLOAD and config["engine"]["cache"]["page_size"] == 16
    assert config["packages"]["jax"] and config["python"].startswith("3.") and config["command"]
    assert set(config["commit"] or {"hash", "dirty"}) == {"hash", "dirty"}
    assert config["flags"]["page_size"] == 16 and config["memory"]["max_context"] == config["max_context"]
    again = tmp_path / "again"
    code, _, stderr = programs.run("serve", f"--flagfile={out / 'flags.txt'}", f"--out={again}", timed=True)
    assert code == 0, stderr
    lengths = [
        sorted((r["id"], r["arrival_s"], r["prompt_len"]) for r in rows(d / "requests.jsonl")) for d in (out, again)
    ]
    assert lengths[0] == lengths[1]
    repeated = json.loads((again / "config.json").read_text())
    assert [repeated[h] for h in HASHES] == [config[h] for h in HASHES]
    other = tmp_path / "other"
    programs.run("serve", f"--flagfile={out / 'flags.txt'}", f"--out={other}", "--max_num_seqs=9", timed=True)
    changed = json.loads((other / "config.json").read_text())
    assert [h for h in HASHES if changed[h] != config[h]] == ["settings_hash"]


def test_an_earlier_run_is_not_overwritten(finished):
    out, _ = finished
    before = (out / "summary.json").read_bytes()
    code, _, stderr = programs.run("serve", "--model=timed", f"--out={out}", timed=True)
    assert code == 2 and "holds an earlier run" in stderr and stderr.count("\n") == 1
    assert (out / "summary.json").read_bytes() == before


def test_refused_requests_are_recorded_with_the_reason(tmp_path):
    workload = "synthetic:rate=50,num=6,prompt=uniform:500:2000,output=fixed:2"
    code, stdout, stderr = programs.run(
        "serve", "--model=timed", f"--workload={workload}", f"--out={tmp_path}", timed=True
    )
    assert code == 0, stderr
    by_status = {s: [r for r in rows(tmp_path / "requests.jsonl") if r["status"] == s] for s in ("finished", "refused")}
    assert by_status["finished"] and by_status["refused"]
    assert all(f"{r['prompt_len']} tokens" in r["error"] for r in by_status["refused"])
    headline = json.loads(stdout.splitlines()[-1])
    assert headline["failed"] == len(by_status["refused"]) and headline["completed"] == len(by_status["finished"])


def interrupted(tmp_path, number):
    """A long run that gets a signal when five requests are done."""
    process = programs.start(
        "serve",
        "--model=timed",
        "--workload=synthetic:rate=40,num=4000,output=fixed:5",
        f"--out={tmp_path}",
        timed=True,
    )
    path = tmp_path / "requests.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (path.exists() and path.read_text().count("\n") >= 5):
        time.sleep(0.02)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_says_how_far_it_got(tmp_path, number, code):
    returncode, stdout = interrupted(tmp_path, number)
    assert returncode == code
    summary, requests = json.loads((tmp_path / "summary.json").read_text()), rows(tmp_path / "requests.jsonl")
    assert summary["interrupted"] is True and summary["stopped_by"] == number.name
    finished = [r for r in requests if r["status"] == "finished"]
    assert 5 <= summary["completed"] == len(finished) < 4000
    assert summary["in_flight"] == summary["unfinished"] == len(requests) - len(finished)
    assert summary["arrived"] == summary["completed"] + summary["in_flight"]
    assert summary["arrived"] + summary["not_arrived"] == summary["num_requests"] == 4000
    assert f"interrupted by {number.name}" in stdout
    assert json.loads(stdout.splitlines()[-1])["interrupted"] is True


def test_a_window_is_reported_beside_the_whole_run(tmp_path):
    code, stdout, stderr = programs.run(
        "serve", "--model=timed", f"--workload={WORKLOAD}", f"--out={tmp_path}", "--window=0.1:0.2", timed=True
    )
    assert code == 0, stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    inside = [r for r in rows(tmp_path / "requests.jsonl") if 0.1 <= r["due_s"] <= 0.2]
    assert 0 < summary["window"]["sent"] == len(inside) < summary["sent"] == 20
    assert summary["window"]["duration"] == pytest.approx(0.1)
    assert "due in 0.1-0.2 s" in stdout


def test_a_profile_is_traced(tmp_path):
    code, _, stderr = programs.run(
        "serve", "--model=timed", "--workload=synthetic:rate=50,num=2,output=fixed:2", f"--out={tmp_path}/run",
        f"--profile_dir={tmp_path}/profile", timed=True,
    )  # fmt: skip
    assert code == 0, stderr
    assert list((tmp_path / "profile").glob("**/*.xplane.pb"))


def test_killed_run_leaves_readable_rows(tmp_path):
    returncode, _ = interrupted(tmp_path, signal.SIGKILL)
    assert returncode == -signal.SIGKILL
    assert len(rows(tmp_path / "requests.jsonl")) >= 5 and rows(tmp_path / "steps.jsonl")
    assert json.loads((tmp_path / "config.json").read_text())["model"] == "timed"
    assert not (tmp_path / "summary.json").exists()

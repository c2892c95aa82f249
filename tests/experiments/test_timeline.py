"""Protects the timeline: spans nest, add up to the request's own metrics, and follow each other in time."""

import gzip
import itertools
import json

import pytest

from engine.memory.moves import Copy
from engine.metrics import RequestMetrics, StepRecord
from experiments import timeline
from experiments.run_record import RunRecord
from experiments.workloads import WorkloadRequest
from tests.engine.test_metrics import make_request
from tests.experiments import programs

STEP = dict.fromkeys(
    ("num_decode", "num_prefill_seqs", "prefill_tokens", "num_waiting", "num_running", "free_pages"), 2
)
T0 = 100.0  # of the run, on the engine's clock


def events(run):
    with gzip.open(run / timeline.NAME, "rt") as file:
        return json.load(file)["traceEvents"]


def spans(run, process):
    """Complete events of a process, by track."""
    found: dict[int, list] = {}
    for event in events(run):
        if event["ph"] == "X" and event["pid"] == process:
            found.setdefault(event["tid"], []).append(event)
    return found


def names(run, process):
    """Track -> name."""
    return {e["tid"]: e["args"]["name"] for e in events(run) if e["name"] == "thread_name" and e["pid"] == process}


def check_request(spans_of_track, row):
    """The outer span is the request; the inner ones share it out without gaps, as its metrics say."""
    whole, *parts = spans_of_track
    assert whole["dur"] == pytest.approx(row["e2e_s"] * 1e6, abs=2)
    assert [p["name"] for p in parts] == ["queue", "prefill", "decode"]
    assert parts[0]["ts"] == whole["ts"] and all(p["dur"] >= 0 for p in parts)
    assert all(a["ts"] + a["dur"] == b["ts"] for a, b in itertools.pairwise(parts))
    assert parts[-1]["ts"] + parts[-1]["dur"] == whole["ts"] + whole["dur"]
    metrics = (row["queue_s"], row["prefill_s"], sum(row["itl_s"]))
    assert [p["dur"] for p in parts] == pytest.approx([m * 1e6 for m in metrics], abs=len(row["itl_s"]) + 3)


def test_a_served_run(tmp_path):
    code, stdout, stderr = programs.run(
        "serve", "--model=timed", "--workload=synthetic:rate=40,num=12,prompt=uniform:5:2000,output=uniform:1:6",
        f"--out={tmp_path}", "--timeline", timed=True,
    )  # fmt: skip
    assert code == 0 and str(tmp_path / timeline.NAME) in stdout, stderr
    rows = {f"request {r['id']}": r for r in timeline.read_rows(tmp_path / "requests.jsonl")}
    labels, tracks = names(tmp_path, timeline.REQUESTS), spans(tmp_path, timeline.REQUESTS)
    assert sorted(labels.values()) == sorted(rows) and len(rows) == 12
    served = {track for track, label in labels.items() if rows[label]["status"] == "finished"}
    assert tracks.keys() == served and 0 < len(served) < 12  # prompts beyond the context are refused
    for track in served:
        check_request(tracks[track], rows[labels[track]])
    assert sum(e["ph"] == "i" and "tokens" in e["name"] for e in events(tmp_path)) == 12 - len(served)
    (steps,) = spans(tmp_path, timeline.ENGINE).values()
    assert len(steps) == len(timeline.read_rows(tmp_path / "steps.jsonl"))
    assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in itertools.pairwise(steps))
    assert all(e["ts"] >= 0 for e in events(tmp_path) if "ts" in e)
    made = (tmp_path / timeline.NAME).read_bytes()
    (tmp_path / timeline.NAME).unlink()
    assert programs.run("timeline", str(tmp_path))[0] == 0  # afterwards, from the files
    assert gzip.decompress((tmp_path / timeline.NAME).read_bytes()) == gzip.decompress(made)


@pytest.fixture
def interrupted(tmp_path):
    """A run by hand: one request done, one in its decode, one still queued; two steps, copies both ways."""
    record = RunRecord(tmp_path)
    record.begin(T0)
    record.finished(WorkloadRequest("a", 1.0, 7, 3), "length", metrics(arrival=T0 + 1.0, times=(4, 5, 7)))
    record.finished(WorkloadRequest("b", 1.0, 7, 9), "abort", metrics(arrival=T0 + 1.0, times=(4, 5)))
    record.unfinished(WorkloadRequest("c", 2.0, 7, 9), metrics(arrival=T0 + 2.0, times=(4, 5), finished=False))
    record.unfinished(WorkloadRequest("d", 6.0, 7, 9), metrics(arrival=T0 + 6.0, times=(), finished=False))
    copies = (
        Copy(True, 0, 0, True, 1000, T0 + 3.0, T0 + 3.5),
        Copy(False, 0, 1, True, 500, T0 + 3.25, T0 + 3.75, (), True),
    )
    fields = STEP | {"num_preempted": 0, "num_finished": 0}
    device = [{"device_start": T0 + a, "device_end": T0 + b} for a, b in ((3.0, 3.75), (4.25, 7.5))]
    record.step(StepRecord(1, T0 + 3.0, T0 + 4.0, **fields, bytes_out=1000, bytes_in=500, copies=copies, **device[0]))
    record.step(StepRecord(2, T0 + 4.0, T0 + 8.0, **fields, host_bytes=7, **device[1]))
    record.close()
    return tmp_path


def metrics(arrival, times, finished=True):
    times = [T0 + t for t in times]
    ended = times[-1] if finished else None
    scheduled = arrival + 1.0 if times else None
    return RequestMetrics.from_request(make_request(arrival, arrival, scheduled, times, ended))


def test_requests_that_did_not_finish_last_until_the_run_ends(interrupted):
    timeline.write(interrupted)
    labels = {label: track for track, label in names(interrupted, timeline.REQUESTS).items()}
    tracks = spans(interrupted, timeline.REQUESTS)
    shown = {label: [(e["name"], e["ts"] / 1e6, e["dur"] / 1e6) for e in tracks[labels[label]]] for label in labels}
    assert shown["request a"] == [("request a", 1, 6), ("queue", 1, 1), ("prefill", 2, 2), ("decode", 4, 3)]
    assert shown["request b"] == [("request b", 1, 4), ("queue", 1, 1), ("prefill", 2, 2), ("decode", 4, 1)]
    assert shown["request c"] == [("request c", 2, 6), ("queue", 2, 1), ("prefill", 3, 1), ("decode", 4, 4)]
    assert shown["request d"] == [("request d", 6, 2), ("queue", 6, 2)]
    assert [tracks[labels[f"request {i}"]][0]["args"]["status"] for i in "abcd"] == [
        "finished", "failed", "unfinished", "unfinished",
    ]  # fmt: skip


def test_copies_have_a_track_per_direction(interrupted):
    timeline.write(interrupted)
    labels, tracks = names(interrupted, timeline.COPIES), spans(interrupted, timeline.COPIES)
    shown = {
        labels[t]: [
            (e["name"], e["ts"] / 1e6, e["dur"] / 1e6, *(e["args"][k] for k in ("kind", "bytes", "gbs"))) for e in es
        ]
        for t, es in tracks.items()
    }
    assert shown == {
        "device to host": [("layer 0", 3.0, 0.5, "leaves its pages", 1000, 2e-6)],
        "host to device": [("layer 1", 3.25, 0.5, "streamed into transient pages", 500, 1e-6)],
    }
    counters = [e["args"]["host_bytes"] for e in events(interrupted) if e["ph"] == "C" and e["name"] == "host_bytes"]
    assert counters == [0, 7]


def test_what_the_device_did_of_the_steps_is_a_track_with_gaps(interrupted):
    """Steps as the host sees them follow each other without a gap; the device waited from 3.75 s to 4.25 s."""
    timeline.write(interrupted)
    labels, tracks = names(interrupted, timeline.ENGINE), spans(interrupted, timeline.ENGINE)
    shown = {labels[t]: [(e["ts"] / 1e6, e["dur"] / 1e6) for e in es] for t, es in tracks.items()}
    assert shown == {"steps": [(3.0, 1.0), (4.0, 4.0)], "device": [(3.0, 0.75), (4.25, 3.25)]}
    assert [(e["name"], e["args"]["step"]) for e in tracks[2]] == [
        ("prefill 2 + decode 2", 1),
        ("prefill 2 + decode 2", 2),
    ]


def test_a_row_cut_off_by_a_crash_is_left_out_and_a_bad_one_named(interrupted):
    path = interrupted / "steps.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 3, "sta')
    timeline.write(interrupted)
    assert len(spans(interrupted, timeline.ENGINE)[1]) == 2
    path.write_text("{]\n" + whole)
    code, _, stderr = programs.run("timeline", str(interrupted))
    assert code == 2 and f"{path}:1: not JSON" in stderr and stderr.count("\n") == 1


def test_no_run_is_one_line(tmp_path):
    code, _, stderr = programs.run("timeline", str(tmp_path))
    assert code == 2 and "steps.jsonl cannot be read" in stderr and stderr.count("\n") == 1
    assert programs.run("timeline")[0] == 2

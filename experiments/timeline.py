"""A run as a timeline for ui.perfetto.dev: one track per request, one for engine steps, one for what the device did of
them (its gaps are idle time), one per direction of copies.

    python -m experiments.timeline RUN ...     # RUN: a directory that `serve` wrote, finished or not

A copy out of a layer that was just computed lies under the device's span of the same step: that is the overlap.
Reads requests.jsonl, steps.jsonl and copies.jsonl (when there), writes RUN/timeline.json.gz: Chrome trace events in
microseconds after the start of the run. A request's span holds queue, prefill and decode, which add up to its E2E.
Preempted requests keep decoding in it: the stall shows as a gap between the steps, and its length in the arguments.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.files import write_whole
from experiments import common_flags
from experiments.run_record import STEP_TIMES

ENGINE, COPIES, REQUESTS = 1, 2, 3  # process ids: Perfetto groups tracks by them
LANES = {"out": (1, "device to host"), "in": (2, "host to device")}  # of copies: track and its name
KINDS = {  # by (out, transient)
    (True, False): "leaves its pages",
    (True, True): "leaves from transient pages",  # as it is written, or several blocks as one
    (False, True): "streamed into transient pages",
    (False, False): "comes home",
}
COUNTERS = ("num_running", "num_waiting", "free_pages", "host_bytes")
NAME = "timeline.json.gz"

Event = dict[str, Any]


def write(run: Path) -> Path:
    """Writes the timeline of a run's directory and returns its path.

    Raises:
      ConfigError: the directory holds no run, or a row that cannot be read (file and line named).
      OutputError: it cannot be written; what was there stays.
    """
    steps = read_rows(run / "steps.jsonl")
    requests = read_rows(run / "requests.jsonl")
    copies = read_rows(run / "copies.jsonl") if (run / "copies.jsonl").exists() else []
    end = max((row["end"] for row in steps), default=0.0)
    events = [*_step_events(steps), *_copy_events(copies)]
    for track, row in enumerate(sorted(requests, key=lambda r: r.get("due_s", r["arrival_s"])), 1):
        events += _request_events(row, track, end)
    trace = {"traceEvents": events, "displayTimeUnit": "ms"}
    write_whole(run / NAME, gzip.compress(json.dumps(trace, separators=(",", ":")).encode(), mtime=0))
    return run / NAME


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file. A last line without its end was cut off by a crash and is left out.

    Raises:
      ConfigError: it cannot be read, or a row is not JSON.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            if line.endswith("\n"):
                rows.append(json.loads(line))
        except ValueError as e:
            raise ConfigError(f"{path}:{number}: not JSON: {e}") from None
    return rows


def _step_events(steps: list[dict[str, Any]]) -> Iterator[Event]:
    device = any(row.get("device_end") is not None for row in steps)
    yield from _named(ENGINE, "engine", {1: "steps"} | ({2: "device"} if device else {}))
    for row in steps:
        parts = [f"prefill {row['num_prefill_seqs']}"] if row["num_prefill_seqs"] else []
        parts += [f"decode {row['num_decode']}"] if row["num_decode"] else []
        name = " + ".join(parts)
        what = {k: v for k, v in row.items() if k not in STEP_TIMES}
        yield _span(name, ENGINE, 1, _us(row["start"]), _us(row["end"]), what)
        if row.get("device_end") is not None:
            device_start, device_end = _us(row["device_start"]), _us(row["device_end"])
            yield _span(name, ENGINE, 2, device_start, device_end, {"step": row["step"]})
        for counter in COUNTERS:
            yield {"ph": "C", "name": counter, "pid": ENGINE, "ts": _us(row["end"]), "args": {counter: row[counter]}}


def _copy_events(copies: list[dict[str, Any]]) -> Iterator[Event]:
    if copies:
        yield from _named(COPIES, "copies", dict(LANES.values()))
    for row in copies:
        track, _ = LANES["out" if row["out"] else "in"]
        seconds = row["end"] - row["start"]
        what = {
            "kind": KINDS[row["out"], row.get("transient", False)],
            "bytes": row["num_bytes"],
            "gbs": row["num_bytes"] / seconds / 1e9 if seconds else None,
            "accounted_in_step": row["step"],
        }
        yield _span(f"layer {row['layer']}", COPIES, track, _us(row["start"]), _us(row["end"]), what)


def _request_events(row: dict[str, Any], track: int, end: float) -> Iterator[Event]:
    """The track of one request: its span and, inside, what it went through until `end`, the end of the run."""
    label = f"request {row['id']}"
    yield from _named(REQUESTS, "requests", {track: label})
    t0 = _us(row.get("due_s", row["arrival_s"]))
    if row["status"] == "refused":
        yield {"ph": "i", "s": "t", "name": f"refused: {row['error']}", "pid": REQUESTS, "tid": track, "ts": t0}
        return
    ended = t0 + _us(row["e2e_s"]) if row["e2e_s"] is not None else max(t0, _us(end))
    known = [s for s in (row["queue_s"], row["prefill_s"]) if s is not None]
    marks = [t0 + _us(sum(known[:i])) for i in range(len(known) + 1)]  # where queue, prefill and decode begin
    ended = max(ended, marks[-1])  # both are rounded
    names = ("num_prompt_tokens", "num_output_tokens", "num_preemptions", "ttft_s", "tpot_s", "max_gap_s", "e2e_s")
    what = {"status": row["status"]} | {name: row[name] for name in names}
    yield _span(label, REQUESTS, track, t0, ended, what)
    for name, a, b in zip(("queue", "prefill", "decode"), marks, [*marks[1:], ended], strict=False):
        yield _span(name, REQUESTS, track, a, b, {})


def _span(name: str, process: int, track: int, start: int, end: int, what: dict[str, Any]) -> Event:
    return {"ph": "X", "name": name, "pid": process, "tid": track, "ts": start, "dur": end - start, "args": what}


def _named(process: int, name: str, tracks: dict[int, str]) -> Iterator[Event]:
    """Names of a process and of its tracks, kept in this order."""
    yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
    for track, label in tracks.items():
        yield {"ph": "M", "name": "thread_name", "pid": process, "tid": track, "args": {"name": label}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": track, "args": {"sort_index": track}}


def _us(seconds: float) -> int:
    return round(seconds * 1e6)


def main(runs: list[str]) -> int:
    """The program."""
    if not runs:
        raise ConfigError("name a run: the directory that serve wrote (--out)")
    for run in runs:
        print(write(Path(run)))
    return 0


if __name__ == "__main__":
    common_flags.run_main(main, takes="RUN ...", engine=False)

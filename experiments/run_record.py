"""The files of one run. Rows are written as they happen, so whatever ends the run, what is there can be read.

config.json     every resolved setting, versions, device, commit, command line, hashes
flags.txt       the flags; `--flagfile=flags.txt` repeats the run
requests.jsonl  one row per request that finished, failed or was refused, in that order; then those left unfinished
steps.jsonl     one row per engine step
copies.jsonl    one row per copy between device and host, when there were any
summary.json    vLLM bench names; written at the end, also when the run was interrupted
timeline.json.gz    with --timeline, for ui.perfetto.dev

Times in rows are seconds after the start of the run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, FolioError
from engine.files import RowFile, write_whole, writing
from engine.memory.moves import Copy
from engine.metrics import RequestMetrics, StepRecord
from experiments.common_flags import own_flags
from experiments.workloads import WorkloadRequest

FILES = (
    "config.json", "flags.txt", "requests.jsonl", "steps.jsonl", "copies.jsonl", "summary.json", "timeline.json.gz",
)  # fmt: skip
STEP_TIMES = ("start", "end", "device_start", "device_end")  # in steps.jsonl, after the start of the run
COMPLETED = ("stop", "length")  # finish reasons of a request that ran to its end
NOT_REPEATED = ("out", "overwrite", "profile_dir")  # a repeated run says where its own results go


def claim(directory: Path, overwrite: bool, files: Sequence[str] = FILES) -> Path:
    """Makes the directory of a run that writes `files`, before anything slow happens. Writes nothing in it yet.

    Raises:
      ConfigError: it holds an earlier run and `overwrite` is False, or it cannot be made.
    """
    earlier = [name for name in files if (directory / name).exists()]
    if earlier and not overwrite:
        raise ConfigError(f"--out={directory} holds an earlier run ({earlier[0]}); name another, or --overwrite")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"--out={directory} cannot be made: {e.strerror}") from None
    return directory


class RunRecord:
    """Writes one run's files into a claimed directory, over those of an earlier run.

    Raises:
      OutputError: a file cannot be written. Rows written before stay, whole.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._t0 = 0.0  # of the run, on the engine's clock
        self._copies: RowFile | None = None
        with writing(directory):
            for name in FILES:
                (directory / name).unlink(missing_ok=True)
        self._requests = RowFile(directory / "requests.jsonl")
        self._steps = RowFile(directory / "steps.jsonl")

    def config(self, settings: dict[str, Any]) -> None:
        """Writes config.json and flags.txt, before anything is served."""
        self._json("config.json", settings)
        write_whole(self.directory / "flags.txt", flagfile_text())

    def begin(self, t0: float) -> None:
        """The run starts now: `t0` on the engine's clock."""
        self._t0 = t0

    def finished(self, request: WorkloadRequest, reason: str | None, metrics: RequestMetrics) -> None:
        """Adds the row of a request that ended: to its end, or aborted."""
        status = "finished" if reason in COMPLETED else "failed"
        _add(self._requests, _described(request, status) | {"finish_reason": reason} | self._measured(metrics))

    def unfinished(self, request: WorkloadRequest, metrics: RequestMetrics) -> None:
        """Adds the row of a request that still waits or runs at the end."""
        _add(self._requests, _described(request, "unfinished") | self._measured(metrics))

    def refused(self, request: WorkloadRequest, error: FolioError) -> None:
        """Adds the row of a request that was refused at arrival."""
        _add(self._requests, _described(request, "refused") | {"error": str(error)})

    def _measured(self, metrics: RequestMetrics) -> dict[str, Any]:
        row = dataclasses.asdict(metrics)
        row["due_s"] = row.pop("arrival") - self._t0  # arrival_s, except for a turn that waits for the one before
        return row

    def step(self, record: StepRecord) -> None:
        """Adds the row of one step, and those of its copies."""
        row = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name != "copies"}
        _add(self._steps, row | {name: row[name] - self._t0 for name in STEP_TIMES if row[name] is not None})
        for copy in record.copies:
            self._copy(copy, record.step)

    def _copy(self, copy: Copy, step: int) -> None:
        if self._copies is None:
            self._copies = RowFile(self.directory / "copies.jsonl")
        times = {"start": copy.start - self._t0, "end": copy.end - self._t0}
        _add(self._copies, {"step": step} | dataclasses.asdict(copy) | times)

    def summary(self, values: dict[str, Any]) -> None:
        """Writes summary.json."""
        self._json("summary.json", values)

    def close(self) -> None:
        """Closes the row files."""
        for file in (self._requests, self._steps, self._copies):
            if file is not None:
                file.close()

    def _json(self, name: str, values: dict[str, Any]) -> None:
        write_whole(self.directory / name, json.dumps(values, indent=2, allow_nan=False) + "\n")


def flagfile_text() -> str:
    """The program's flags as an absl flagfile; unset ones, and where results go, are left out."""
    kept = [f for f in own_flags() if f.value is not None and f.name not in NOT_REPEATED]
    return "".join(f"{f.serialize()}\n" for f in kept)


def _described(request: WorkloadRequest, status: str) -> dict[str, Any]:
    return {
        "id": request.id,
        "status": status,
        "arrival_s": request.arrival_s,
        "prompt_len": request.prompt_len,
        "output_len": request.output_len,
    } | ({} if request.session is None else {"session": request.session, "turn": request.turn})


def _add(file: RowFile, row: dict[str, Any]) -> None:
    file.add(json.dumps({k: _rounded(v) for k, v in row.items()}, allow_nan=False))


def _rounded(value: Any) -> Any:
    """Times to the microsecond."""
    if isinstance(value, tuple):
        return [_rounded(v) for v in value]
    return round(value, 6) if isinstance(value, float) else value

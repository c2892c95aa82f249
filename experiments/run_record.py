"""The files of one run. Rows are written as they happen, so whatever ends the run, what is there can be read.

config.json     every resolved setting, versions, device, commit, command line
flags.txt       the flags; `--flagfile=flags.txt` repeats the run
requests.jsonl  one row per request that finished or was refused, in that order
steps.jsonl     one row per engine step
summary.json    vLLM bench names; written at the end, also when the run was interrupted
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

from engine.errors import ConfigError, FolioError
from engine.files import RowFile, write_whole, writing
from engine.metrics import RequestMetrics, StepRecord
from experiments.workloads import WorkloadRequest

FILES = ("config.json", "flags.txt", "requests.jsonl", "steps.jsonl", "summary.json")


def claim(directory: Path, overwrite: bool) -> Path:
    """Makes the directory of a run, before anything slow happens. Writes nothing in it yet.

    Raises:
      ConfigError: it holds an earlier run and `overwrite` is False, or it cannot be made.
    """
    earlier = [name for name in FILES if (directory / name).exists()]
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
        with writing(directory):
            for name in FILES:
                (directory / name).unlink(missing_ok=True)
        self._requests = RowFile(directory / "requests.jsonl")
        self._steps = RowFile(directory / "steps.jsonl")

    def config(self, settings: dict[str, Any]) -> None:
        """Writes config.json and flags.txt, before anything is served."""
        self._json("config.json", settings)
        write_whole(self.directory / "flags.txt", flagfile_text())

    def finished(self, request: WorkloadRequest, reason: str | None, metrics: RequestMetrics) -> None:
        """Adds the row of a request that ran to its end."""
        row = _described(request, "finished") | {"finish_reason": reason} | dataclasses.asdict(metrics)
        del row["arrival"]  # on the engine's clock; arrival_s counts from the start of the run
        _add(self._requests, row)

    def refused(self, request: WorkloadRequest, error: FolioError) -> None:
        """Adds the row of a request that was refused at arrival."""
        _add(self._requests, _described(request, "refused") | {"error": str(error)})

    def step(self, record: StepRecord, t0: float) -> None:
        """Adds the row of one step, its times counted from `t0`."""
        _add(self._steps, dataclasses.asdict(record) | {"start": record.start - t0, "end": record.end - t0})

    def summary(self, values: dict[str, Any]) -> None:
        """Writes summary.json."""
        self._json("summary.json", values)

    def close(self) -> None:
        """Closes the row files."""
        self._requests.close()
        self._steps.close()

    def _json(self, name: str, values: dict[str, Any]) -> None:
        write_whole(self.directory / name, json.dumps(values, indent=2, allow_nan=False) + "\n")


def flagfile_text() -> str:
    """The program's own flags as an absl flagfile; unset ones, and where results go, are left out."""
    own = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
    kept = [f for f in own if f.value is not None and f.name not in ("out", "overwrite")]
    return "".join(f"{line}\n" for line in sorted(f.serialize() for f in kept))


def _described(request: WorkloadRequest, status: str) -> dict[str, Any]:
    return {
        "id": request.id,
        "status": status,
        "arrival_s": request.arrival_s,
        "prompt_len": request.prompt_len,
        "output_len": request.output_len,
    }


def _add(file: RowFile, row: dict[str, Any]) -> None:
    file.add(json.dumps({k: _rounded(v) for k, v in row.items()}, allow_nan=False))


def _rounded(value: Any) -> Any:
    """Times to the microsecond."""
    if isinstance(value, tuple):
        return [_rounded(v) for v in value]
    return round(value, 6) if isinstance(value, float) else value

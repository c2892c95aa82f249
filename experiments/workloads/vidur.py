"""`vidur:FILE`: arrivals and lengths as the Vidur simulator records them (Agrawal et al., MLSys 2024).

A CSV file with a header, a JSON list of objects (.json) or one object per line (.jsonl). Columns: `num_prefill_tokens`
and `num_decode_tokens` (or `input_tokens` and `output_tokens`), and the arrival in seconds as `arrived_at` (or
`arrived_at_s`); other columns are ignored. Files of lengths alone have no arrivals: the options rate, arrivals and cv
of `synthetic` draw them.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from engine.errors import WorkloadError
from experiments.workloads import Options, Window, WorkloadRequest, register
from experiments.workloads.rows import json_lines, json_value, read_text, seconds, tokens
from experiments.workloads.synthetic import arrival_times, token_seeds

ARRIVALS = ("arrived_at", "arrived_at_s")
PROMPTS = ("num_prefill_tokens", "input_tokens")
OUTPUTS = ("num_decode_tokens", "output_tokens")


@register("vidur")
def vidur(file: str | None, options: Options, window: Window) -> list[WorkloadRequest]:
    """Reads the file up to the last wanted row; recorded arrivals count from the first row.

    Raises:
      WorkloadError: no such file, or a malformed row (file:line, column, what was expected).
    """
    if file is None:
        raise options.error("vidur needs a file: vidur:FILE.csv")
    end = None if window.num is None else window.start + window.num
    rows = _rows(Path(file))[:end]
    if not rows:
        raise WorkloadError(f"{file}: no rows")
    where, first = rows[0]
    prompt, output = _name(first, PROMPTS, where), _name(first, OUTPUTS, where)
    lengths = [(tokens(row, prompt, where), tokens(row, output, where)) for where, row in rows]
    arrival = next((name for name in ARRIVALS if name in first), None)
    arrivals = arrival_times(options, len(rows), window.seed) if arrival is None else _recorded(rows, arrival)
    seeds = token_seeds(len(rows), window.seed)
    return [
        WorkloadRequest(str(i), t, *length, seed)
        for i, (t, length, seed) in enumerate(zip(arrivals, lengths, seeds, strict=True))
    ]


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(place, row) of all rows."""
    if path.suffix == ".jsonl":
        return list(json_lines(path))
    text = read_text(path)
    if path.suffix == ".json":
        values = json_value(text, str(path))
        if not isinstance(values, list) or not all(isinstance(v, dict) for v in values):
            raise WorkloadError(f"{path}: expected a JSON list of objects")
        return [(f"{path}: row {i}", row) for i, row in enumerate(values)]
    reader = csv.DictReader(io.StringIO(text), restkey="more fields", restval="")
    return [(f"{path}:{reader.line_num}", row) for row in reader]


def _name(row: dict[str, Any], names: tuple[str, ...], where: str) -> str:
    found = next((name for name in names if name in row), None)
    if found is None:
        raise WorkloadError(f"{where}: expected a column {' or '.join(names)}, got {', '.join(map(str, row))[:80]!r}")
    return found


def _recorded(rows: list[tuple[str, dict[str, Any]]], name: str) -> list[float]:
    times: list[float] = []
    for where, row in rows:
        times.append(seconds(row, name, where, not_before=times[-1] if times else 0.0))
    return [t - times[0] for t in times]

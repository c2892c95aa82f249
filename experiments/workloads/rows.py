"""Reading rows of trace files, with errors that say file:line and field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import WorkloadError


def read_text(path: Path) -> str:
    """The file as text.

    Raises:
      WorkloadError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise WorkloadError(f"{path}: cannot read the workload: {e}") from None


def json_value(text: str, where: str) -> Any:
    """The JSON value of `text`.

    Raises:
      WorkloadError: it is not JSON; names the place.
    """
    try:
        return json.loads(text)
    except ValueError as e:
        raise WorkloadError(f"{where}: expected JSON: {e}") from None


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, object) of every line of a JSON-lines file; empty lines are skipped.

    Raises:
      WorkloadError: the file cannot be read, or a line is not a JSON object.
    """
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            where = f"{path}:{number}"
            row = json_value(line, where)
            if not isinstance(row, dict):
                raise WorkloadError(f"{where}: expected an object, got {line[:80]!r}")
            yield where, row


def field(row: dict[str, Any], name: str, where: str) -> Any:
    """`row[name]`.

    Raises:
      WorkloadError: it is not there.
    """
    if name not in row:
        raise WorkloadError(f"{where}: field {name} is missing; got {', '.join(row) or 'nothing'}")
    return row[name]


def seconds(row: dict[str, Any], name: str, where: str, unit: float = 1.0, not_before: float = 0.0) -> float:
    """A time >= 0 in units of `unit` seconds, as seconds; times of a trace do not go backwards.

    Raises:
      WorkloadError: missing, not a time, or before `not_before` (seconds).
    """
    value = _number(field(row, name, where))
    if value is None or value < 0:
        raise WorkloadError(f"{where}: field {name}: expected a time >= 0, got {row[name]!r}")
    if value * unit < not_before:
        raise WorkloadError(f"{where}: field {name}: expected a time not before the previous row's, got {row[name]!r}")
    return value * unit


def tokens(row: dict[str, Any], name: str, where: str) -> int:
    """A number of tokens >= 1; `12.0` counts as 12.

    Raises:
      WorkloadError: missing, or anything else.
    """
    value = _number(field(row, name, where))
    if value is None or value < 1 or value != int(value):
        raise WorkloadError(f"{where}: field {name}: expected an integer >= 1, got {row[name]!r}")
    return int(value)


def _number(value: Any) -> float | None:
    """A finite number, given as one or as text; None for anything else."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else float("nan")
    except ValueError:
        number = float("nan")
    return number if abs(number) < float("inf") else None

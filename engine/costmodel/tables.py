"""Measured op times that win over a formula: a CSV with the columns `op,tokens,seconds` or `op,tokens,kv,seconds`.

Times are of one call on one device, of the model and the tensor degree they are used for; `tokens` is the number of
rows of the op. `decode_attention` has decode rows as `tokens` and the mean number of tokens they attend to as `kv`,
`prefill_attention` new tokens as `tokens` and the cached ones before them as `kv`; `kv` is empty for other ops.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from engine import extension
from engine.errors import ConfigError

DENSE = (
    "embed", "input_norm", "qkv", "qk_norm", "rope", "o", "post_norm", "gate_up", "act", "down",
    "final_norm", "lm_head", "sample",
)  # fmt: skip
ATTENTION = ("decode_attention", "prefill_attention")
Points = tuple[np.ndarray, np.ndarray]  # float64 [n] x, strictly increasing; float64 [n] seconds


class OpTables:
    """Times by op, linear in between; beyond the last point along the last segment, before the first one constant."""

    def __init__(self, rows: dict[str, dict[int, list[tuple[int, float]]]] | None = None):
        """`rows`: op -> tokens -> (kv, seconds), any order."""
        self._lines: dict[str, Points] = {}
        self._grids: dict[str, tuple[np.ndarray, list[Points]]] = {}
        for op, by_tokens in (rows or {}).items():
            tokens = sorted(by_tokens)
            curves = [sorted(by_tokens[t]) for t in tokens]
            if op in DENSE:
                self._lines[op] = np.array(tokens, float), np.array([curve[0][1] for curve in curves])
            else:
                points = [(np.array([kv for kv, _ in c], float), np.array([s for _, s in c])) for c in curves]
                self._grids[op] = np.array(tokens, float), points

    @property
    def names(self) -> list[str]:
        """Ops that have been measured."""
        return [*self._lines, *self._grids]

    def __contains__(self, op: str) -> bool:
        return op in self._lines or op in self._grids

    def seconds(self, op: str, tokens: float) -> float:
        """Seconds of a dense op."""
        return float(interpolate(tokens, *self._lines[op]))

    def grid_seconds(self, op: str, tokens: float, kv: np.ndarray) -> np.ndarray:
        """Seconds of an attention op: float64 like `kv`."""
        xs, curves = self._grids[op]
        if len(xs) == 1:
            return interpolate(kv, *curves[0])
        i = min(max(int(np.searchsorted(xs, tokens)) - 1, 0), len(xs) - 2)
        low, high = interpolate(kv, *curves[i]), interpolate(kv, *curves[i + 1])
        share = max((tokens - xs[i]) / (xs[i + 1] - xs[i]), 0.0)
        return np.maximum(low + share * (high - low), 0.0)

    @staticmethod
    def read(path: Path) -> OpTables:
        """The tables in a CSV.

        Raises:
          ConfigError: no such file, or a line that cannot be used; names the file and the line.
        """
        rows: dict[str, dict[int, list[tuple[int, float]]]] = {}
        try:
            with path.open(encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                names = set(reader.fieldnames or ())
                if not {"op", "tokens", "seconds"} <= names <= {"op", "tokens", "kv", "seconds"}:
                    raise ConfigError(f"table {path} must have the columns op,tokens,seconds or op,tokens,kv,seconds")
                for row in reader:
                    _add(rows, row, f"table {path}, line {reader.line_num}")
        except OSError as e:
            raise ConfigError(f"table {path} cannot be read: {e.strerror}") from None
        extension.record(str(path), path)
        return OpTables(rows)


def _add(rows: dict[str, dict[int, list[tuple[int, float]]]], row: dict[str, str], where: str) -> None:
    """Adds one line of a CSV."""
    op = row["op"]
    if op not in DENSE + ATTENTION:
        raise ConfigError(f"{where}: unknown op {op!r}; known: {', '.join(DENSE + ATTENTION)}")
    try:
        tokens, seconds = int(row["tokens"]), float(row["seconds"])
        kv = int(row["kv"]) if op in ATTENTION else 0
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{where}: tokens and kv must be integers and seconds a number, got {row}") from None
    if tokens < 1 or kv < 0 or not 0 <= seconds < float("inf"):
        raise ConfigError(f"{where}: needs tokens >= 1, kv >= 0 and seconds >= 0, got {row}")
    curve = rows.setdefault(op, {}).setdefault(tokens, [])
    if any(kv == known for known, _ in curve):
        raise ConfigError(f"{where}: a second time for {op} of tokens={tokens}, kv={kv}")
    curve.append((kv, seconds))


def interpolate(x: np.ndarray | float, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Linear in between, constant before the first point, along the last segment (never down) after the last one."""
    inside = np.interp(x, xs, ys)
    if len(xs) == 1:
        return inside
    slope = max((ys[-1] - ys[-2]) / (xs[-1] - xs[-2]), 0.0)
    return inside + slope * np.maximum(np.asarray(x) - xs[-1], 0.0)

"""Measured times of whole steps, by bucket: what `experiments.calibrate` writes into a device file under `steps`.

A sub-batch of our executor costs what its bucket (decode rows, query tiles) costs, padding and all, and more with the
tokens it attends to. So there is a curve for each bucket, seconds over *attended tokens*:

* decode rows only: the sum over rows, in batches whose rows are equally long. Of unequal ones the longest sets the
  pace: `uneven` has batches with one long row among short ones, by its *excess* over the mean of the bucket's rows
  (padding rows attend to nothing);
* query tiles only, or with decode rows: the sum over tiles of the tokens that a tile's last query attends to. With
  decode rows these are as short as at the first point of the curve for as many rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.costmodel.tables import interpolate
from engine.errors import ConfigError

Key = tuple[int, int]  # decode rows, query tiles


@dataclass(frozen=True)
class Curve:
    """Seconds of one bucket's sub-batches."""

    attended: np.ndarray  # float64 [n] tokens, strictly increasing
    seconds: np.ndarray  # float64 [n]
    excess: np.ndarray  # float64 [k] tokens of the longest row over the mean, strictly increasing, the first 0
    added: np.ndarray  # float64 [k] seconds that it adds, >= 0, the first 0


@dataclass(frozen=True)
class StepTables:
    """Step times of one model under one set of settings."""

    settings: dict[str, Any]  # `measured_steps.step_settings`: what the times hold for
    host: float  # seconds per step at async_depth 0 besides the curves: planning, dispatch, accounting
    remains: float  # seconds per step at async_depth 1, where the host's work overlaps
    curves: dict[Key, Curve]

    @staticmethod
    def parse(raw: Any, where: str) -> StepTables:
        """The tables in a JSON object: `settings`, `host_us` by async_depth, `buckets`.

        Raises:
          ConfigError: something missing or out of range; says where.
        """
        raw = _object(raw, where, "settings", "host_us", "buckets")
        settings = _object(raw["settings"], f"{where}.settings")
        host = _object(raw["host_us"], f"{where}.host_us", "0", "1")
        if not isinstance(raw["buckets"], list):
            raise ConfigError(f"{where}.buckets must be a list, got {raw['buckets']!r}")
        curves: dict[Key, Curve] = {}
        for i, bucket in enumerate(raw["buckets"]):
            key, curve = _bucket(bucket, f"{where}.buckets[{i}]")
            if key in curves:
                raise ConfigError(f"{where}.buckets[{i}]: rows={key[0]} tiles={key[1]} a second time")
            curves[key] = curve
        alone, remains = (_number(host[depth], f"{where}.host_us.{depth}") * 1e-6 for depth in ("0", "1"))
        return StepTables(settings, alone, remains, curves)


def _bucket(raw: Any, where: str) -> tuple[Key, Curve]:
    """One bucket's entry."""
    raw = _object(raw, where, "rows", "tiles", "points")
    rows, tiles = (int(_number(raw[name], f"{where}.{name}")) for name in ("rows", "tiles"))
    attended, seconds = _increasing(raw["points"], f"{where}.points", "attended", "seconds").T
    excess, added = np.zeros(1), np.zeros(1)
    if raw.get("uneven"):
        uneven = _increasing(raw["uneven"], f"{where}.uneven", "excess", "attended", "seconds")
        if uneven[0, 0] == 0:
            raise ConfigError(f"{where}.uneven[0].excess must be > 0")
        even = interpolate(uneven[:, 1], attended, seconds)
        excess = np.append(excess, uneven[:, 0])
        added = np.append(added, np.maximum(uneven[:, 2] - even, 0.0))
    return (rows, tiles), Curve(attended, seconds, excess, added)


def _increasing(raw: Any, where: str, *names: str) -> np.ndarray:
    """These fields of a list of points, float64 [n, fields], the first of which increases."""
    if not isinstance(raw, list) or not raw:
        raise ConfigError(f"{where} must be a list of at least one, got {raw!r}")
    points = []
    for i, point in enumerate(raw):
        point = _object(point, f"{where}[{i}]", *names)
        points.append([_number(point[name], f"{where}[{i}].{name}") for name in names])
    found = np.array(points, np.float64)
    if not (np.diff(found[:, 0]) > 0).all():
        raise ConfigError(f"{where} must have increasing {names[0]}, got {found[:, 0].tolist()}")
    return found


def _object(raw: Any, where: str, *names: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} must be an object, got {raw!r}")
    if missing := [name for name in names if name not in raw]:
        raise ConfigError(f"{where} has no {', '.join(missing)}")
    return raw


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ConfigError(f"{where} must be a number >= 0, got {value!r}")
    return value

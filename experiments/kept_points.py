"""A folder of finished points, so that an interrupted sweep goes on where it was.

A file's name is the SHA-256 of everything that its summary follows from: the model's shape, the engine's settings, the
requests (when they come and how long they are: a virtual clock reads no prompt), the objectives, the files of names
from outside the tree, and our own code. What was run by other code is not found, and so is run again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import extension
from engine.config import to_dict
from engine.costmodel.device import load_device
from engine.errors import ConfigError
from engine.files import write_whole, writing
from engine.models.source import resolve
from experiments import workloads
from experiments.provenance import digest
from experiments.workloads.frozen import COLUMNS

if TYPE_CHECKING:
    from experiments.points import Point

ROOT = Path(__file__).parents[1]
CODE = (
    "engine/**/*.py", "engine/**/*.json", "experiments/workloads/*.py", "experiments/points.py",
    "experiments/outcomes.py", "experiments/replay.py", "experiments/objectives.*", "experiments/judged.py",
)  # fmt: skip


class KeptPoints:
    """Summaries by point, a file each.

    Raises:
      OutputError: the folder cannot be made.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)

    def load(self, points: Sequence[Point]) -> dict[int, dict[str, Any]]:
        """Summaries of the points that are kept, by index.

        Raises:
          FolioError: a point that cannot be run, or a file that is damaged.
        """
        files = {i: self._file(point) for i, point in enumerate(points)}
        return {i: _read(file) for i, file in files.items() if file.exists()}

    def add(self, point: Point, summary: dict[str, Any]) -> None:
        """Keeps the summary of a point.

        Raises:
          OutputError: it cannot be written.
        """
        value = {"point": dataclasses.asdict(point), "summary": summary}
        write_whole(self._file(point), json.dumps(value, indent=1, allow_nan=False) + "\n")

    def _file(self, point: Point) -> Path:
        return self.directory / f"{key_of(point)}.json"


def key_of(point: Point) -> str:
    """SHA-256 of everything that the summary of a point follows from.

    Raises:
      FolioError: a model, a device, a policy or a workload that is not there.
    """
    config = point.config
    model, _, _ = resolve(point.model, config)
    device = load_device(config.sim.device, config.sim.stack)
    outside = (point.model, config.scheduler.policy, config.sim.device, config.sim.stack)
    return digest({
        "model": to_dict(model),
        "engine": to_dict(config),
        "requests": _requests_digest(point.spec),
        "slo": point.slo,
        "sources": {name: sha for name, sha in extension.sources().items() if name in outside},
        "tables": device.tables and hashlib.sha256(device.tables.read_bytes()).hexdigest(),
        "code": code_digest(),
    })  # fmt: skip


@lru_cache(256)
def _requests_digest(spec: str) -> str:
    return digest([[getattr(r, name) for name in (*COLUMNS, "sampling")] for r in workloads.build(spec)])


@lru_cache(1)
def code_digest() -> str:
    """SHA-256 over the files that a simulated run goes through."""
    return digest({str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest() for path in _code()})


def _code() -> Iterator[Path]:
    for pattern in CODE:
        yield from ROOT.glob(pattern)


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_bytes())["summary"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{file} is not a kept point ({e}): delete it") from None

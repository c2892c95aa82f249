"""Values that say where they come from: `{"value", "kind", "source"}` entries of a JSON file into a dataclass."""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from engine.config import from_dict
from engine.errors import ConfigError

KINDS = ("spec", "measured", "fitted", "estimated")
T = TypeVar("T")


@dataclass(frozen=True)
class Provenance:
    """Where a value comes from."""

    kind: str  # of KINDS; estimated: by analogy, nobody measured it
    source: str

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ConfigError(f"kind {self.kind!r} is unknown; known: {', '.join(KINDS)}")
        if not isinstance(self.source, str) or not self.source:
            raise ConfigError(f"source must say where the value comes from, got {self.source!r}")


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      ConfigError: no such file, or something else in it.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"{what} file {path} cannot be read: {e.strerror}") from None
    except ValueError as e:
        raise ConfigError(f"{what} file {path} is not JSON: {e}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{what} file {path} must hold an object, got {type(raw).__name__}")
    return raw


def read_text(raw: dict[str, Any], name: str, path: Path) -> str:
    """A field that is a string.

    Raises:
      ConfigError: it is missing, empty or something else.
    """
    if not isinstance(value := raw.get(name), str) or not value:
        raise ConfigError(f"{path}: {name} must be a string, got {value!r}")
    return value


def read_sourced(cls: type[T], raw: dict[str, Any], name: str, path: Path) -> tuple[T, dict[str, Provenance]]:
    """The dataclass in `raw[name]`, and where each of its values comes from.

    Raises:
      ConfigError: a field that is missing, unknown, of the wrong type or out of range; names the file and the field.
    """
    fields = dataclasses.fields(typing.cast(Any, cls))
    entries = raw.get(name)
    if not isinstance(entries, dict):
        raise ConfigError(f"{path}: {name} must be an object of {', '.join(f.name for f in fields)}")
    needed = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [n for n in needed if n not in entries]:
        raise ConfigError(f"{path}: {name} has no {', '.join(missing)}")
    values, origins = {}, {}
    for key, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) != {"value", "kind", "source"}:
            raise ConfigError(f"{path}: {name}.{key} must be an object of value, kind and source, got {entry!r}")
        values[key] = entry["value"]
        try:
            origins[key] = Provenance(entry["kind"], entry["source"])
        except ConfigError as e:
            raise ConfigError(f"{path}: {name}.{key}: {e}") from None
    try:
        return from_dict(cls, values, name), {f.name: origins[f.name] for f in fields if f.name in origins}
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from None


def check_ranges(values: Any, positive: tuple[str, ...] = (), shares: tuple[str, ...] = ()) -> None:
    """Raises ConfigError unless all numbers of a dataclass are finite and >= 0, `positive` > 0, `shares` in (0, 1]."""
    for name, value in vars(values).items():
        if not isinstance(value, int | float):
            continue
        if name in shares and not 0 < value <= 1:
            raise ConfigError(f"{name} must be in (0, 1], got {value}")
        if name in positive and not 0 < value < float("inf"):
            raise ConfigError(f"{name} must be > 0, got {value}")
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{name} must be >= 0, got {value}")


UNITS = {"tflops": "TFLOP/s", "gib": "GiB", "gbs": "GB/s", "spec": "GB/s", "us": "us", "tokens": "tokens"}  # by ending


def provenance_table(values: dict[str, Any], provenance: dict[str, Provenance]) -> str:
    """Columns value, unit, kind (spec, measured, fitted, estimated) and source, a line for each value given."""
    rows = [("", "value", "unit", "kind", "source")] + [
        (name, _shown(values[name]), UNITS.get(name.rpartition("_")[2], ""), origin.kind, origin.source)
        for name, origin in provenance.items()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)] + [0]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{degree}:{number:g}" for degree, number in value.items())
    return value if isinstance(value, str) else f"{value:g}"

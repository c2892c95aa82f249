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

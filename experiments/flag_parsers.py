"""Values of flags that absl does not read by itself: bytes, and JSON. Imports no JAX."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from absl import flags

BYTE_UNITS = {"": 1, "B": 1} | {
    f"{p}{s}": b**i for i, p in enumerate("KMGT", 1) for s, b in (("B", 1000), ("iB", 1024))
}


def parse_bytes(text: str) -> int:
    """Bytes from `512MiB`, `2GiB`, `1.5GB` or a plain number.

    Raises:
      ValueError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2] not in BYTE_UNITS:
        raise ValueError(f"expected bytes such as 536870912, 512MiB or 2GiB, got {text!r}")
    return int(float(match[1]) * BYTE_UNITS[match[2]])


class BytesParser(flags.ArgumentParser):
    """An absl flag that takes a number of bytes."""

    def parse(self, argument: str | int) -> int:
        return argument if isinstance(argument, int) else parse_bytes(argument)

    def flag_type(self) -> str:
        return "bytes, such as 512MiB or 2GiB"


class OverlayParser(flags.ArgumentParser):
    """An absl flag that takes a JSON file, or the JSON object itself. Its value is the object, so that a flagfile made
    of it stands without the file."""

    def parse(self, argument: str | dict[str, Any]) -> dict[str, Any]:
        if isinstance(argument, dict):
            return argument
        try:
            inline = argument.lstrip().startswith("{")
            overlay = json.loads(argument if inline else Path(argument).read_text(encoding="utf-8"))
        except OSError as e:
            raise ValueError(f"{argument} cannot be read: {e.strerror}") from None
        except ValueError as e:
            raise ValueError(f"not JSON: {e}") from None
        if not isinstance(overlay, dict):
            raise ValueError("expected a JSON object of EngineConfig fields")
        for section in ("cache", "scheduler", "sim"):
            if not isinstance(overlay.get(section, {}), dict):
                raise ValueError(f"{section} must be a JSON object")
        return overlay

    def flag_type(self) -> str:
        return "JSON file, or a JSON object"


class JsonSerializer(flags.ArgumentSerializer):
    """One line of JSON."""

    def serialize(self, value: dict[str, Any]) -> str:
        return json.dumps(value)

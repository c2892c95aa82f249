"""Names from outside the tree: `package.module:Name` or `path/to/file.py:Name`. One resolver for every flag. No JAX.

What was loaded is remembered with the SHA-256 of its file, because no commit of ours says what it was.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from engine.errors import ConfigError

FORMS = "package.module:Name or path/to/file.py:Name"
_sources: dict[str, str] = {}


def is_external(spec: str) -> bool:
    """Whether a spec has one of the two forms, rather than being a registered name."""
    place, colon, name = spec.rpartition(":")
    return bool(colon) and name.isidentifier() and (place.endswith(".py") or place.replace(".", "_").isidentifier())


def load(spec: str, what: str) -> Any:
    """The object that `spec` names. `what`: the setting, for messages.

    Raises:
      ConfigError: no such file, module or name, or code that fails when it is loaded; says which and why.
    """
    place, _, name = spec.rpartition(":")
    try:
        module = _from_file(Path(place).resolve()) if place.endswith(".py") else importlib.import_module(place)
    except FileNotFoundError:
        raise ConfigError(f"{what} {spec!r}: there is no file {place}") from None
    except Exception as e:
        why = " ".join(f"{type(e).__name__}: {e}".split())
        raise ConfigError(f"{what} {spec!r}: {place} cannot be loaded: {why}") from e
    if not hasattr(module, name):
        known = ", ".join(n for n in vars(module) if not n.startswith("_"))
        raise ConfigError(f"{what} {spec!r}: {place} has no {name}; it has {known or 'nothing'}")
    if module.__spec__ is not None and module.__spec__.has_location:
        _sources[spec] = _digest_of_code(str(module.__file__))
    return getattr(module, name)


def record(name: str, file: Path) -> None:
    """Remembers a file of data from outside the tree, which a setting calls `name`, as `load` does one of code."""
    _sources[name] = _digest(file)


def sources() -> dict[str, str]:
    """Every name that this process took from outside, with the SHA-256 of its file: of that file, not of what it
    imports."""
    return dict(sorted(_sources.items()))


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@lru_cache(None)
def _digest_of_code(file: str) -> str:
    """Read once, as the code is: a file that is changed later is not what runs."""
    return _digest(Path(file))


@lru_cache(None)
def _from_file(path: Path) -> ModuleType:
    """The module in a file, loaded once: the same class whenever it is asked for."""
    if not path.is_file():
        raise FileNotFoundError(path)
    spec = importlib.util.spec_from_file_location(f"folio_extension_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module

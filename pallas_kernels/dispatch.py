"""Which implementation of a kernel runs.

A backend is one file, `pallas_kernels/<folder>/<backend>.py`, holding a function named as the kernel; the folder is
named so too, unless related kernels share one. To add a backend, write the file, add its name to the kernel's
`backends` in `api.py` and, when it should be used unasked, to `DEFAULTS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from engine.errors import ConfigError

HOST_ONLY = ("reference",)  # NumPy oracles: they run on concrete arrays, outside jit
DEFAULTS = {"cpu": "xla", "gpu": "xla", "tpu": "xla"}  # by platform; must work for every shape and dtype


@dataclass(frozen=True)
class Kernel:
    """A kernel by name and the backends that implement it."""

    name: str
    backends: tuple[str, ...]
    folder: str = ""  # of its files; "": the name

    def resolve(self, backend: str | None) -> Callable[..., Any]:
        """The implementation: of `backend`, or of the platform's default for None.

        Raises:
          ConfigError: an unknown backend; the known ones are listed. A named backend is never replaced by another.
        """
        chosen = DEFAULTS[jax.default_backend()] if backend is None else backend
        if chosen not in self.backends:
            raise ConfigError(f"{self.name} has no backend {chosen!r}; known: {', '.join(self.backends)}")
        return getattr(importlib.import_module(f"pallas_kernels.{self.folder or self.name}.{chosen}"), self.name)

    def check(self, backend: str | None) -> None:
        """Raises ConfigError unless the backend exists and runs inside jit: for whoever compiles later."""
        known = [b for b in self.backends if b not in HOST_ONLY]
        if backend is not None and backend not in known:
            raise ConfigError(f"{self.name} has no backend {backend!r} that compiles; known: {', '.join(known)}")

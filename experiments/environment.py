"""What a result depends on besides the configuration: versions, device, host, commit, command line, and files from
outside the tree. Imports no JAX unless the program already did."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from engine import extension

PACKAGES = ("folio", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy", "absl-py", "tokenizers")


def describe() -> dict[str, Any]:
    """Plain JSON types; what is not there is None."""
    return {
        "command": [sys.executable, *sys.orig_argv[1:]],
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": _device(),
        "host": {"system": platform.platform(), "machine": platform.machine(), "cpus": os.cpu_count()},
        "commit": commit(),
        "sources": extension.sources(),  # of policies, workloads, models and devices that the commit does not hold
    }


def commit(root: Path = Path(__file__).parents[1]) -> dict[str, Any] | None:
    """The commit of the source tree and whether tracked files differ from it; None without git or a repository."""
    head = _git(root, "rev-parse", "HEAD")
    if head is None:
        return None
    return {"hash": head, "dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no"))}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        # Reading only: `status` would refresh the index, and leave its lock behind when the disk is full.
        command = ["git", "--no-optional-locks", "-C", root, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> dict[str, Any] | None:
    jax = sys.modules.get("jax")
    if jax is None:
        return None
    from pallas_kernels.dispatch import DEFAULTS

    devices = jax.devices()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "default_kernels": DEFAULTS[devices[0].platform],
    }

"""Hashes that say whether two runs are comparable. Each covers one thing, so that a difference says what differs.

model_hash      the model's configuration
weights_hash    every weight: names, shapes, dtypes and bytes; random weights are named by what made them
settings_hash   how the engine and the program were set, and the files of every name from outside the tree: not the
                model, the workload, or where results go

The workload's hash is the workload's own (`workload_hash`). Imports no JAX until it hashes weights.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from engine import extension
from engine.config import to_dict
from engine.presets import is_model_spec
from experiments import common_flags

if TYPE_CHECKING:
    from engine import Engine

# Hashed elsewhere (model, workload; config is part of the engine's settings), or not a setting.
NOT_SETTINGS = ("model", "model_spec", "workload", "config", "out", "overwrite", "timeline", "profile_dir")
HASHING_THREADS = 4


def digest(value: Any) -> str:
    """SHA-256 of plain JSON types, whatever the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hashes(engine: Engine) -> dict[str, str | None]:
    """model_hash, weights_hash (None: an executor without weights), settings_hash."""
    model_hash = digest(to_dict(engine.model_config))
    params = getattr(engine.executor, "params", None)
    if params is None:
        weights = None
    elif is_model_spec(engine.source):
        weights = f"random:seed={engine.config.seed},model={model_hash}"
    else:
        weights = weights_hash(params)
    flags = {name: value for name, value in common_flags.own_values().items() if name not in NOT_SETTINGS}
    settings = digest({"engine": to_dict(engine.config), "flags": flags, "sources": extension.sources()})
    return {"model_hash": model_hash, "weights_hash": weights, "settings_hash": settings}


def weights_hash(params: Any) -> str:
    """SHA-256 over the tensors of a pytree, sorted by name: name, shape, dtype and the SHA-256 of the bytes. How the
    tensors are sharded does not matter. 1 to 1.7 GB/s per core."""
    import jax
    import numpy as np

    def tensor(item: tuple[Any, Any]) -> list[Any]:
        path, leaf = item
        # On CPU a view. Elsewhere of a copy: JAX keeps what it fetched as long as the array, here all the weights.
        source = leaf if jax.default_backend() == "cpu" else leaf.copy()
        data = np.ascontiguousarray(np.asarray(source)).reshape(-1).view(np.uint8)
        return [jax.tree_util.keystr(path), list(leaf.shape), str(leaf.dtype), hashlib.sha256(data.data).hexdigest()]

    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return digest(sorted(pool.map(tensor, jax.tree_util.tree_leaves_with_path(params))))

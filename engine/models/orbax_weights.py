"""Parameters as Orbax checkpoints, restored directly into the sharding of a mesh.

    DIRECTORY/model.json         the ModelConfig, size and SHA-256 of every file of the parameters; written last
    DIRECTORY/params/embed       one Orbax checkpoint per item: `embed`, `norm`, `head` and each `layers.<i>`
    DIRECTORY/tokenizer.json     when the model has one

Orbax writes and restores a tree at once, so one checkpoint per layer is what bounds host memory, both ways, to a layer.
Tensors are stored packed, as `TensorSpec.shape` has them: independent of the devices of whoever wrote them.
What Orbax writes has no checksums of the arrays: a flipped bit would be read as another weight. So the files of an item
are hashed before it is restored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engine.config import ModelConfig, from_dict, to_dict
from engine.errors import ConfigError, OutputError, WeightsError
from engine.files import write_whole
from engine.models import llama, tensors

MODEL, PARAMS = "model.json", "params"
HASHING_THREADS = 4
MARKS = (MODEL, PARAMS, "_CHECKPOINT_METADATA", "_METADATA")  # ours, and those of any Orbax checkpoint


def is_orbax(directory: Path) -> bool:
    """Whether a directory looks like an Orbax checkpoint, ours or another's."""
    return any((directory / mark).exists() for mark in MARKS)


def read_model(directory: Path) -> ModelConfig:
    """The model of a checkpoint; the sizes of its files are checked, their contents are not.

    Raises:
      WeightsError: not written by `save`, or files are missing or have another size; names the first.
    """
    path = directory / MODEL
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        model, files = raw["model"], dict(raw["files"])
        cfg = from_dict(ModelConfig, model, str(path))
    except FileNotFoundError as e:
        raise WeightsError(
            f"{directory}: an Orbax checkpoint without {MODEL}: unfinished, or another program's; "
            "experiments.convert_checkpoint writes whole ones"
        ) from e
    except OSError as e:
        raise WeightsError(f"{path}: cannot be read: {e.strerror}") from e
    except (ValueError, KeyError, TypeError) as e:
        why = str(e) if isinstance(e, ConfigError) else f"{path}: not the description of a checkpoint: {e!r}"
        raise WeightsError(why) from e
    for name, size in files.items():
        file = directory / name
        if not file.is_file():
            raise WeightsError(f"{file}: missing from the checkpoint")
        if file.stat().st_size != size:
            raise WeightsError(f"{file}: has {file.stat().st_size:,} bytes, was written with {size:,}")
    return cfg


def load_params(
    directory: Path, cfg: ModelConfig, mesh: Mesh | None = None, dtype: str | None = None
) -> dict[str, Any]:
    """The parameters of a checkpoint, on the devices; each process and device reads its own part.

    Args:
      cfg, mesh, dtype: as `weights.load_params`.

    Raises:
      WeightsError: a file is not what was written (names it), Orbax cannot read an item, or it is not what `cfg` says.
    """
    mesh = mesh or tensors.device_mesh()
    specs = llama.definitions(cfg.replace(dtype=dtype or cfg.dtype), mesh.size)
    params: dict[str, Any] = {"layers": []}
    digests = _digests(directory)
    for name, item in _items(specs).items():
        _check(directory, name, digests)
        arrays = _restore(directory / PARAMS / name, {n: _packed(s, mesh) for n, s in item.items()})
        placed = {n: _spread(spec, arrays[n], mesh) for n, spec in item.items()}
        if name in placed:
            params |= placed
        else:
            params["layers"].append(placed)
    return params


def leaves(directory: Path, cfg: ModelConfig) -> Iterator[np.ndarray]:
    """The packed arrays in the order of `jax.tree.leaves`, with one item on the host at a time.

    Raises:
      WeightsError: as `load_params`.
    """
    mesh, digests = tensors.device_mesh(), _digests(directory)
    for name, item in _items(llama.definitions(cfg)).items():
        _check(directory, name, digests)
        yield from map(np.asarray, jax.tree.leaves(_restore(directory / PARAMS / name, tensors.abstract(item, mesh))))


def save(packed: Iterator[np.ndarray], cfg: ModelConfig, directory: Path) -> None:
    """Writes a checkpoint into an empty directory.

    Args:
      packed: one array per `TensorSpec`, in the order of `jax.tree.leaves`; consumed item by item, so a generator
        bounds host memory.

    Raises:
      OutputError: the disk is full, for one; what was written is not taken for a checkpoint.
    """
    import orbax.checkpoint as ocp

    directory = directory.absolute()
    for name, item in _items(llama.definitions(cfg)).items():
        arrays = jax.tree.map(lambda _: next(packed), item)
        try:
            with _quiet(), ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(directory / PARAMS / name, arrays)
        except Exception as e:  # tensorstore's errors are ValueErrors
            raise OutputError(f"{directory / PARAMS / name} cannot be written: {_reason(e)}") from e
    files = {str(p.relative_to(directory)): p.stat().st_size for p in sorted(directory.rglob("*")) if p.is_file()}
    digests = {name: _sha256(directory / name) for name in files}
    description = {"model": to_dict(cfg), "files": files, "sha256": digests}
    write_whole(directory / MODEL, json.dumps(description, indent=1) + "\n")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digests(directory: Path) -> dict[str, str]:
    """The SHA-256 of every file as it was written, by name; `read_model` has found the rest of the description good."""
    path = directory / MODEL
    digests = json.loads(path.read_text(encoding="utf-8")).get("sha256")
    if not isinstance(digests, dict):
        raise WeightsError(f"{path}: no sha256 of the files: convert the checkpoint again")
    return digests


def _check(directory: Path, item: str, digests: dict[str, str]) -> None:
    """Hashes the files of an item, which Orbax then finds in the page cache: a sixth of the time of a load on CPU.

    Raises:
      WeightsError: one is not what was written; names it.
    """
    names = [name for name in digests if Path(name).is_relative_to(f"{PARAMS}/{item}")]
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        for name, found in zip(names, pool.map(lambda name: _sha256(directory / name), names), strict=True):
            if found != digests[name]:
                raise WeightsError(f"{directory / name}: damaged: not the bytes that were written")


def _items(specs: dict[str, Any]) -> dict[str, dict[str, tensors.TensorSpec]]:
    """What each Orbax checkpoint holds, in the order of `jax.tree.leaves`."""
    items: dict[str, Any] = {}
    for name in sorted(specs):
        if name == "layers":
            items |= {f"layers.{i}": layer for i, layer in enumerate(specs[name])}
        else:
            items[name] = {name: specs[name]}
    return items


def _packed(spec: tensors.TensorSpec, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """What to restore: the tensor where it will live, or whole on every device when heads are to be repeated."""
    where = NamedSharding(mesh, PartitionSpec()) if spec.spread else tensors.sharding(spec, mesh)
    return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype), sharding=where)


def _spread(spec: tensors.TensorSpec, packed: jax.Array, mesh: Mesh) -> jax.Array:
    return jax.jit(spec.spread, out_shardings=tensors.sharding(spec, mesh))(packed) if spec.spread else packed


def _restore(path: Path, abstract: Any) -> Any:
    import orbax.checkpoint as ocp

    try:
        with _quiet(), ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path.absolute(), abstract)
    except Exception as e:  # Orbax raises what it likes, plain `Exception` included
        raise WeightsError(f"{path}: cannot be restored: {_reason(e)}") from e


def _reason(error: Exception) -> str:
    """What the system said, which tensorstore wraps in a page about itself; or how the page begins."""
    text = str(error).strip()
    system = re.search(r"os_error_code='(\d+)'", text)
    return os.strerror(int(system[1])) if system else text.split("\n")[0][:200] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's log, which has the whole traceback of an error three times."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)

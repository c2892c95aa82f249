"""Parameters from a seed or a Hugging Face directory, and back into one. Only safetensors: nothing is unpickled."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from engine.config import DTYPES, ModelConfig
from engine.errors import WeightsError
from engine.files import write_whole
from engine.models import llama, safetensors, tensors
from engine.models.hf_config import hf_values, write_config

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # as transformers' save_pretrained
_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # our dtypes -> safetensors'


def init_params(cfg: ModelConfig, mesh: Mesh | None = None, seed: int = 0) -> dict[str, Any]:
    """Seeded random parameters in `cfg.dtype`, scaled so that activations and logits have a variance near 1.

    Args:
      mesh: has an axis `tensor`; None: the first device alone.
    """
    mesh = mesh or tensors.device_mesh()
    return tensors.init(llama.definitions(cfg, mesh.size), mesh, seed)


def load_params(
    directory: str | Path, cfg: ModelConfig, mesh: Mesh | None = None, dtype: str | None = None
) -> dict[str, Any]:
    """The weights of a Hugging Face directory, on the devices.

    Host memory beyond the result stays at one packed tensor and the checkpoint tensors that it is made of.

    Args:
      cfg: the model, usually `read_config(directory)`.
      mesh: has an axis `tensor`; None: the first device alone.
      dtype: of the parameters, whatever the checkpoint stores; None: `cfg.dtype`.

    Raises:
      WeightsError: no safetensors, a corrupt file, or tensors missing, left over or of the wrong shape; names them.
    """
    mesh, dtype = mesh or tensors.device_mesh(), dtype or cfg.dtype
    if dtype not in DTYPES:
        raise WeightsError(f"dtype {dtype!r} is not supported; known: {', '.join(DTYPES)}")
    cfg = cfg.replace(dtype=dtype)
    packed = packed_tensors(directory, cfg)
    specs = llama.definitions(cfg, mesh.size)
    return jax.tree.map(lambda spec: tensors.place(spec, next(packed), mesh).block_until_ready(), specs)


def packed_tensors(directory: str | Path, cfg: ModelConfig) -> Iterator[np.ndarray]:
    """The packed tensors of a Hugging Face directory in `cfg.dtype`, in the order of `jax.tree.leaves`. What is wrong
    with the checkpoint is found before the first of them.

    Raises:
      WeightsError: as `load_params`.
    """
    specs, stored = llama.definitions(cfg), checkpoint_tensors(Path(directory))
    _check_complete(Path(directory), cfg, specs, stored)
    return (tensors.pack(spec, [stored[p.name].read() for p in spec.parts]) for spec in jax.tree.leaves(specs))


def checkpoint_tensors(directory: Path) -> dict[str, safetensors.TensorInfo]:
    """Every tensor of a single or sharded checkpoint, by name; headers are read and checked, data is not.

    Raises:
      WeightsError: as `load_params`.
    """
    if (directory / WEIGHTS).exists():
        return safetensors.read_header(directory / WEIGHTS)
    index = directory / INDEX
    if not index.exists():
        if not directory.is_dir():
            raise WeightsError(f"{directory}: no such directory")
        pickled = ", ".join(sorted(p.name for p in directory.glob("*.bin")))
        hint = f"; {pickled}: pickled weights are never loaded, convert them to safetensors" if pickled else ""
        raise WeightsError(f"{directory}: neither {WEIGHTS} nor {INDEX}{hint}")
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{index}: not a safetensors index with a weight_map: {error!r}") from error
    outside = [f for f in weight_map.values() if not isinstance(f, str) or Path(f).name != f]
    if outside:
        raise WeightsError(f"{index}: {outside[0]!r} is not the name of a file beside it")
    headers = {file: safetensors.read_header(directory / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise WeightsError(f"{directory / file}: tensor {name} missing, though {INDEX} puts it there")
    return {name: headers[file][name] for name, file in weight_map.items()}


def _check_complete(directory: Path, cfg: ModelConfig, specs: Any, stored: dict[str, safetensors.TensorInfo]) -> None:
    wanted = {part.name: part.shape for spec in jax.tree.leaves(specs) for part in spec.parts}
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise WeightsError(f"{directory}: {_some(missing)} missing from the checkpoint of {cfg.architecture}")
    for name, shape in wanted.items():
        if stored[name].shape != shape:
            found = list(stored[name].shape)
            raise WeightsError(f"{stored[name].path}: tensor {name} has shape {found}, config.json says {list(shape)}")
    # Old Llama files hold rotary frequencies, and some tied ones a copy of the embedding; transformers skips both.
    extra = [n for n in stored if n not in wanted and not n.endswith("rotary_emb.inv_freq")]
    extra = [n for n in extra if not (cfg.tie_embeddings and n == "lm_head.weight")]
    if extra:
        raise WeightsError(f"{directory}: {_some(extra)} in the checkpoint, but {cfg.architecture} has no such tensor")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def export_hf(params: Any, cfg: ModelConfig, directory: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a Hugging Face directory that `load_params` and `transformers` read: safetensors, index, configs.

    Weights keep their dtype; one tensor at a time is on the host. Other weights in the directory are replaced; the
    configs are written last, so an interrupted export is not taken for a model.

    Args:
      params: the parameters of one device, or an iterator over their leaves.
      shard_bytes: the most a file holds, unless one tensor alone is larger; one file needs no index.

    Raises:
      ConfigError: config.json cannot express `cfg`.
    """
    hf_values(cfg)  # raises before anything is touched
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").unlink(missing_ok=True)
    stored = _STORED[cfg.dtype]
    specs = llama.definitions(cfg)
    layout = {part.name: (stored, part.shape) for spec in jax.tree.leaves(specs) for part in spec.parts}
    shards = _shards(layout, shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [WEIGHTS]
    for stale in (*directory.glob("model-*-of-*.safetensors"), directory / WEIGHTS, directory / INDEX):
        stale.unlink(missing_ok=True)
    arrays = _hf_arrays(params if isinstance(params, Iterator) else jax.tree.leaves(params), specs)
    for name, shard in zip(names, shards, strict=True):
        safetensors.write_file(directory / name, shard, itertools.islice(arrays, len(shard)))
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(map(_nbytes, layout.values()))}, "weight_map": weight_map}
        write_whole(directory / INDEX, json.dumps(index, indent=2) + "\n")
    write_config(cfg, directory)


def _nbytes(entry: tuple[str, tuple[int, ...]]) -> int:
    return math.prod(entry[1]) * safetensors.DTYPES[entry[0]].itemsize


def _shards(layout: dict[str, tuple[str, tuple[int, ...]]], limit: int) -> list[dict[str, tuple[str, tuple[int, ...]]]]:
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    room = limit
    for name, entry in layout.items():
        if shards[-1] and _nbytes(entry) > room:
            shards.append({})
            room = limit
        shards[-1][name] = entry
        room -= _nbytes(entry)
    return shards


def _hf_arrays(leaves: Iterable[Any], specs: Any) -> Iterator[np.ndarray]:
    for spec, array in zip(jax.tree.leaves(specs), leaves, strict=True):
        yield from tensors.unpack(spec, np.asarray(array))

"""Puts an engine together: model, weights, memory plan, store, executor."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from absl import logging

from engine.clock import WallClock
from engine.config import EngineConfig, ModelConfig
from engine.errors import ConfigError
from engine.executor.jax_executor import JaxExecutor
from engine.executor.memory_plan import make_memory_plan
from engine.memory.host import HostTier
from engine.memory.stores import make_store
from engine.models import hf_config, llama, tensors, weights
from engine.presets import PRESETS
from engine.tokenizer import Tokenizer, load_tokenizer
from pallas_kernels import KVSpec

if TYPE_CHECKING:
    from engine.engine import Engine


def build_engine(cls: type[Engine], path_or_preset: str, config: EngineConfig) -> Engine:
    """See `Engine.from_pretrained`."""
    model, source, tokenizer = _resolve(path_or_preset, config)
    _enable_compilation_cache(config)
    mesh = tensors.single_device_mesh()
    # Sizes first: a pool that cannot work is refused before any weight is read.
    spec = KVSpec(config.cache.page_size, model.num_kv_heads, model.head_dim, model.dtype)
    weight_bytes = tensors.num_bytes(llama.definitions(model))
    memory = make_memory_plan(model, config, weight_bytes, spec.page_bytes, mesh.devices.flat[0])
    if source is None:
        params = weights.init_params(model, mesh, config.seed)
    else:
        params = weights.load_params(source, model, mesh, model.dtype)
    return assemble(cls, model, params, config, mesh, spec, memory, tokenizer, path_or_preset)


def assemble(
    cls: type[Engine],
    model: ModelConfig,
    params: Any,
    config: EngineConfig,
    mesh: jax.sharding.Mesh,
    spec: KVSpec,
    memory: Any,
    tokenizer: Tokenizer | None = None,
    source: str = "the model",
) -> Engine:
    """An engine from parameters that are on the device already."""
    cache = config.cache
    store = make_store(
        cache.store,
        memory.num_pages,
        model.num_layers,
        memory.pages_per_chunk,
        memory.num_slots,
        spec.page_size,
        memory.max_context,
        HostTier(cache.host_bytes // spec.page_bytes) if cache.host_bytes else None,
        cache.transient_pages,
    )
    clock = WallClock()
    arena_pages = store.arena_pages + cache.transient_pages
    executor = JaxExecutor(
        model, params, config, mesh, spec, arena_pages, store.num_slots, store.table_width, clock, store.view
    )
    engine = cls(model, config, memory, store, executor, clock, tokenizer, source)
    if memory.context_note:
        logging.warning("context is %d tokens: %s", memory.max_context, memory.context_note)
    if memory.slots_note:
        logging.warning("max_num_seqs is %d: %s", memory.num_slots, memory.slots_note)
    if config.precompile:
        engine.warmup()
    return engine


def _resolve(path_or_preset: str, config: EngineConfig) -> tuple[ModelConfig, Path | None, Tokenizer | None]:
    """Model configuration, checkpoint directory (None: random weights) and tokenizer."""
    path = Path(path_or_preset)
    if path_or_preset in PRESETS:
        model, source, tokenizer = PRESETS[path_or_preset], None, None
    elif path.exists():
        model, source, tokenizer = hf_config.read_config(path), path, load_tokenizer(path)
    else:
        raise ConfigError(
            f"model {path_or_preset!r} is neither a directory nor a preset; presets: {', '.join(sorted(PRESETS))}"
        )
    return (model.replace(dtype=config.dtype) if config.dtype else model), source, tokenizer


def _enable_compilation_cache(config: EngineConfig) -> None:
    """JAX's persistent cache: a second process starts in a fraction of the time."""
    if config.compilation_cache_dir is None:
        return
    folder = Path(config.compilation_cache_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        if config.compilation_cache_dir == EngineConfig.compilation_cache_dir:
            logging.warning("no compilation cache: %s cannot be made (%s)", folder, e.strerror)
            return
        raise ConfigError(f"compilation_cache_dir {folder} cannot be made ({e.strerror}): name another, or none") from e
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def warm_up(engine: Engine) -> list[tuple[str, float]]:
    """See `Engine.warmup`."""
    executor, rows = engine.executor, []
    assert isinstance(executor, JaxExecutor)
    for bucket in executor.buckets(mixed=engine.policy.mixes):
        start = time.perf_counter()
        executor.warm_up(bucket)
        rows.append((f"rows={bucket.rows} tiles={bucket.tiles}x{bucket.tile}", time.perf_counter() - start))
    start = time.perf_counter()
    executor.warm_up_deltas()
    return [*rows, ("page-table deltas", time.perf_counter() - start)]

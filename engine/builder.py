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
from engine.executor import distributed
from engine.executor.jax_executor import JaxExecutor
from engine.executor.memory_plan import MemoryPlan, make_memory_plan
from engine.memory.host import HostTier
from engine.memory.store import KVStore
from engine.memory.stores import make_store
from engine.models import llama, orbax_weights, tensors, weights
from engine.models.source import resolve
from engine.tokenizer import Tokenizer
from pallas_kernels import KVSpec

if TYPE_CHECKING:
    from engine.engine import Engine


def build_engine(cls: type[Engine], path_or_preset: str, config: EngineConfig) -> Engine:
    """See `Engine.from_pretrained`."""
    model, source, tokenizer = resolve(path_or_preset, config)
    _enable_compilation_cache(config)
    # Sizes first: what cannot work is refused before any weight is read.
    weight_bytes, spec = device_sizes(model, config)
    if jax.process_count() > 1:
        distributed.check(config, jax.process_count())
    mesh = tensors.device_mesh(config.tensor)
    page_bytes = spec.page_bytes // config.tensor
    memory = make_memory_plan(model, config, weight_bytes, page_bytes, mesh.devices.flat[0])
    if jax.process_count() > 1:
        distributed.send((path_or_preset, config, memory))
    params = _load(model, source, mesh, config)
    return assemble(cls, model, params, config, mesh, spec, memory, tokenizer, path_or_preset)


def follow() -> int:
    """Builds this process's part of the engine that process 0 builds, and runs what it runs until it ends. Returns the
    number of calls.

    Raises:
      ConfigError, WeightsError: as `Engine.from_pretrained`.
      FolioError: process 0 ended without a word.
    """
    message = distributed.receive()
    if message is None:  # it found something wrong
        return 0
    path_or_preset, config, memory = message
    model, source, _ = resolve(path_or_preset, config)
    _enable_compilation_cache(config)
    mesh, (_, spec), config = tensors.device_mesh(config.tensor), device_sizes(model, config), memory.settle(config)
    params = _load(model, source, mesh, config)
    return distributed.follow(_executor(JaxExecutor, model, params, config, mesh, spec, memory, WallClock())[1])


def device_sizes(model: ModelConfig, config: EngineConfig) -> tuple[int, KVSpec]:
    """Bytes of weights on each device, and the pages over all devices: every device has kv heads of its own, copies
    when there are more devices than heads.

    Raises:
      ConfigError: the model does not divide over `config.tensor` devices.
    """
    weight_bytes = tensors.num_bytes(llama.definitions(model, config.tensor), config.tensor)
    heads = model.num_kv_heads * llama.kv_repeats(model, config.tensor)
    return weight_bytes, KVSpec(config.cache.page_size, heads, model.head_dim, model.dtype)


def assemble(
    cls: type[Engine],
    model: ModelConfig,
    params: Any,
    config: EngineConfig,
    mesh: jax.sharding.Mesh,
    spec: KVSpec,
    memory: MemoryPlan,
    tokenizer: Tokenizer | None = None,
    source: str = "the model",
) -> Engine:
    """An engine from parameters that are on the device already."""
    config = memory.settle(config)
    clock, kind = WallClock(), distributed.LeadingExecutor if jax.process_count() > 1 else JaxExecutor
    store, executor = _executor(kind, model, params, config, mesh, spec, memory, clock)
    engine = cls(model, config, memory, store, executor, clock, tokenizer, source)
    for line in memory.warnings():
        logging.warning("%s", line)
    if config.precompile:
        engine.warmup()
    return engine


def _executor(
    kind: type[JaxExecutor],
    model: ModelConfig,
    params: Any,
    config: EngineConfig,
    mesh: jax.sharding.Mesh,
    spec: KVSpec,
    memory: MemoryPlan,
    clock: WallClock,
) -> tuple[KVStore, JaxExecutor]:
    """The store, and the executor over what it maps."""
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
        cache.num_transient,
    )
    arena_pages, shape = store.arena_pages + cache.num_transient, (store.num_slots, store.table_width)
    return store, kind(model, params, config, mesh, spec, arena_pages, *shape, clock, store.view)


def _load(model: ModelConfig, source: Path | None, mesh: jax.sharding.Mesh, config: EngineConfig) -> Any:
    """Parameters from a seed or a checkpoint of either kind."""
    if source is None:
        return weights.init_params(model, mesh, config.seed)
    load = orbax_weights.load_params if orbax_weights.is_orbax(source) else weights.load_params
    return load(source, model, mesh)


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

"""An engine on a virtual clock: the scheduler and memory that serve a real model, over a cost model. No JAX here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from absl import logging

from engine.clock import VirtualClock
from engine.config import EngineConfig
from engine.costmodel.device import DeviceProfile, load_device
from engine.costmodel.step_model import StepModel
from engine.executor.link import LINKS, Link
from engine.executor.memory_plan import MemoryPlan, make_memory_plan
from engine.executor.sim_executor import SimExecutor
from engine.memory.blocks import BlockStore
from engine.memory.host import HostTier
from engine.memory.store import KVStore
from engine.memory.stores import make_store
from engine.models.source import resolve
from engine.scheduler.policy import token_budget

if TYPE_CHECKING:
    from engine.engine import Engine


@dataclass(frozen=True)
class SimDevice:
    """Looks like a JAX device to `make_memory_plan`."""

    profile: DeviceProfile
    platform: str = "sim"

    @property
    def device_kind(self) -> str:
        """Its name."""
        return self.profile.name

    def memory_stats(self) -> dict[str, int]:
        """How much memory a program sees."""
        return {"bytes_limit": int(self.profile.hardware.memory_gib * 2**30)}


def build_simulation(cls: type[Engine], path_or_preset: str, config: EngineConfig) -> Engine:
    """See `Engine.from_pretrained`; of a checkpoint only its configuration is read.

    Raises:
      ConfigError: a device, a model or settings that do not fit each other.
    """
    model, _, tokenizer = resolve(path_or_preset, config)
    profile = load_device(config.sim.device, config.sim.stack)
    cost = StepModel(model, profile, tensor=config.tensor, kernels=config.sim.kernels)
    page_bytes = cost.kv_bytes_per_token // model.num_layers * config.cache.page_size
    sized, derivation = _sized(config, cost)
    memory = make_memory_plan(model, sized, cost.weight_bytes, page_bytes, SimDevice(profile))
    memory = dataclasses.replace(memory, pages_note=derivation)
    store = sim_store(config, memory, model.num_layers, page_bytes * config.tensor)
    clock = VirtualClock()
    links = [make_link(config, profile) for _ in ("in", "out")]
    executor = SimExecutor(cost, config, clock, page_bytes * config.tensor, *links)
    for line in memory.warnings():
        logging.warning("%s", line)
    if profile.estimated:
        logging.warning("device %s: %s are estimates", profile.name, ", ".join(profile.estimated))
    return cls(model, config, memory, store, executor, clock, tokenizer, path_or_preset)


def sim_store(config: EngineConfig, memory: MemoryPlan, num_layers: int, page_bytes: int) -> KVStore:
    """The store, without what only a device needs. `page_bytes`: of a page, all devices together."""
    cache, context = config.cache, memory.max_context
    host = HostTier(cache.host_bytes // page_bytes) if cache.host_bytes else None
    if cache.store == "paged" and memory.pages_per_chunk == 1 and not cache.transient_pages:
        return BlockStore(memory.num_pages, num_layers, memory.num_slots, cache.page_size, context, host)
    sizes = memory.num_pages, num_layers, memory.pages_per_chunk, memory.num_slots, cache.page_size, context
    store = make_store(cache.store, *sizes, host, cache.transient_pages)
    store.device_table = False
    return store


def make_link(config: EngineConfig, profile: DeviceProfile) -> Link:
    """One direction of the links between the devices, all together, and the host: each carries its own share."""
    gbs = config.link_gbs or profile.hardware.link_gbs * config.tensor
    return LINKS[config.sim.link_sharing](gbs * 1e9, profile.hardware.link_latency_us * 1e-6)


def _sized(config: EngineConfig, cost: StepModel) -> tuple[EngineConfig, str]:
    """The configuration with a page count, and how it came about when it was not given."""
    cache, limits = config.cache, config.scheduler
    if cache.num_pages is not None or cache.device_bytes is not None:
        return config, ""
    context = min(config.max_context or cost.model.max_context, cost.model.max_context)
    pages, derivation = cost.num_pages(
        cache.page_size, cache.device_fraction or 0.9, token_budget(limits, context), limits.max_num_seqs
    )
    return dataclasses.replace(
        config, cache=dataclasses.replace(cache, num_pages=pages, device_fraction=None)
    ), derivation

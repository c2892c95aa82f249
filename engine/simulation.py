"""An engine on a virtual clock: the scheduler and memory that serve a real model, over a cost model. No JAX here."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from absl import logging

from engine.clock import VirtualClock
from engine.config import EngineConfig
from engine.costmodel.device import DeviceProfile, load_device
from engine.costmodel.measured_steps import with_measured_steps
from engine.costmodel.stages import Stage
from engine.costmodel.step_model import StepModel
from engine.errors import ConfigError
from engine.executor.link import LINKS, Link
from engine.executor.memory_plan import MemoryPlan, host_tier_note, make_memory_plan, merge_stages
from engine.executor.pipeline_executor import PipelineExecutor
from engine.executor.sim_executor import SimExecutor
from engine.memory.blocks import BlockStore
from engine.memory.host import HostTier
from engine.memory.pages import PagePool
from engine.memory.staged import StagedPool
from engine.memory.store import KVStore
from engine.memory.stores import make_store, paged_store
from engine.models.source import resolve
from engine.scheduler.policy import token_budget

if TYPE_CHECKING:
    from engine.engine import Engine


ON_A_DEVICE = ("attention_backend", "deterministic", "precompile")  # settings of programs that are not run here


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
    stages = [
        StepModel(model, profile, tensor=config.tensor, kernels=config.sim.kernels, stage=stage)
        for stage in Stage.split(model, config.sim.pipeline)
    ]
    page_bytes = stages[0].kv_bytes_per_token // stages[0].model.num_layers * config.cache.page_size
    memory = merge_stages([_stage_memory(config, cost, page_bytes, model.num_layers) for cost in stages])
    if memory.stages:  # a sequence is swapped with its layers of all stages
        note = host_tier_note(config, page_bytes * config.tensor, model.num_layers)
        memory = dataclasses.replace(memory, host_note=note)
    config = memory.settle(config)
    store = sim_store(config, memory, [cost.model.num_layers for cost in stages], page_bytes * config.tensor)
    if memory.stages and store.num_pages < memory.num_pages:
        note = f"{store.num_pages:,} are of use while a sequence's layers stay together: the fullest stage decides"
        memory = dataclasses.replace(memory, pages_note=note)
    clock = VirtualClock()
    links = [(make_link(config, profile), make_link(config, profile)) for _ in stages]
    if len(stages) == 1:
        cost = with_measured_steps(stages[0], config, memory.num_slots)
        executor = SimExecutor(cost, config, clock, page_bytes * config.tensor, *links[0])
    else:
        executor = PipelineExecutor(stages, config, clock, page_bytes * config.tensor, links)
    for line in memory.warnings():
        logging.warning("%s", line)
    if no_effect := [name for name in ON_A_DEVICE if getattr(config, name)]:
        logging.warning("without effect on a virtual clock: %s", ", ".join(no_effect))
    if not (config.sim.link_aware or stages[0].shares_host_link):
        logging.warning("link_aware=False has no effect: no all-reduces travel over the link to the host")
    if profile.estimated:
        logging.warning("device %s: %s are estimates", profile.name, ", ".join(profile.estimated))
    return cls(model, config, memory, store, executor, clock, tokenizer, path_or_preset)


def sim_store(config: EngineConfig, memory: MemoryPlan, layers: list[int], page_bytes: int) -> KVStore:
    """The store, without what only a device needs.

    While all layers of a sequence stay together, the stage with room for the fewest decides what fits, as in vLLM: what
    the others have more is of no use, and the books are of blocks.

    Args:
      layers: how many each pipeline stage has.
      page_bytes: of a page, all devices of a stage together.
    """
    cache, chunk, stages = config.cache, memory.pages_per_chunk, memory.stages or (memory,)
    host = HostTier(cache.host_bytes // page_bytes) if cache.host_bytes else None
    sequences = memory.num_slots, cache.page_size, memory.max_context, host
    if cache.store == "paged" and chunk == 1 and not cache.num_transient:
        blocks = min(plan.num_pages // n for plan, n in zip(stages, layers, strict=True))
        return BlockStore(blocks * sum(layers), sum(layers), *sequences)
    if cache.store == "paged" and memory.stages:
        pools = [PagePool(plan.num_pages, n, chunk) for plan, n in zip(stages, layers, strict=True)]
        store: KVStore = paged_store(StagedPool(pools), *sequences, cache.num_transient)
    else:
        store = make_store(cache.store, memory.num_pages, sum(layers), chunk, *sequences, cache.num_transient)
    store.device_table = False
    return store


def make_link(config: EngineConfig, profile: DeviceProfile) -> Link:
    """One direction of the links between a stage's devices, all together, and the host: each carries its own share, in
    units of its own."""
    gbs = config.link_gbs or profile.hardware.link_gbs * config.tensor
    kind, latency = LINKS[config.sim.link_sharing], profile.hardware.link_latency_us * 1e-6
    if config.tensor == 1 or not profile.shares_host_link:  # nobody to yield to
        return kind(gbs * 1e9, latency)
    unit = config.link_unit_bytes * config.tensor if config.link_unit_bytes else math.inf
    return kind(gbs * 1e9, latency, unit, config.sim.link_aware)


def _stage_memory(config: EngineConfig, cost: StepModel, page_bytes: int, num_layers: int) -> MemoryPlan:
    """Sizes of the devices of one stage out of `num_layers` layers.

    Raises:
      ConfigError: as `make_memory_plan`; names the layers unless they are all.
    """
    layers = cost.stage.layers
    try:
        sized, derivation = _sized(config, cost, num_layers)
        memory = make_memory_plan(cost.model, sized, cost.weight_bytes, page_bytes, SimDevice(cost.profile))
    except ConfigError as error:
        if len(layers) == num_layers:
            raise
        raise ConfigError(f"the stage of layers {layers.start} to {layers.stop - 1}: {error}") from None
    budget = cost.memory_budget(config.cache.device_fraction or 0.9, memory.max_batched_tokens, memory.num_slots)
    return dataclasses.replace(memory, pages_note=derivation, activation_peak=budget.activations)


def _sized(config: EngineConfig, cost: StepModel, num_layers: int) -> tuple[EngineConfig, str]:
    """The configuration with a page count for a stage out of `num_layers` layers, and how it came about when it was not
    given."""
    cache, limits = config.cache, config.scheduler
    if cache.num_pages is not None:
        share = cache.num_pages * cost.model.num_layers // num_layers
        return dataclasses.replace(config, cache=dataclasses.replace(cache, num_pages=share)), ""
    if cache.device_bytes is not None:
        return config, ""
    context = min(config.max_context or cost.model.max_context, cost.model.max_context)
    pages, derivation = cost.num_pages(
        cache.page_size, cache.device_fraction or 0.9, token_budget(limits, context), limits.max_num_seqs
    )
    return dataclasses.replace(
        config, cache=dataclasses.replace(cache, num_pages=pages, device_fraction=None)
    ), derivation

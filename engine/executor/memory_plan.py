"""Where the device's memory goes: sizes the arena and the context, and prints the start-up table."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.config import DTYPES, EngineConfig, ModelConfig, cdiv, next_power_of_two
from engine.errors import ConfigError
from engine.scheduler.policy import needs_host, parks, token_budget

CHUNK_BYTES = 2 << 20  # vTensor's physical chunk; on CPU a chunk is one page
CPU_ARENA_BYTES = 1 << 30  # the most that a default engine takes on CPU
DEVICE_FRACTION = 0.9  # of a GPU or TPU, by default


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes of one engine; bytes are those of each device, of a pipeline's the most that one has."""

    num_pages: int  # usable pages, all layers
    pages_per_chunk: int
    page_bytes: int
    max_context: int  # tokens of one sequence, prompt and output
    context_note: str  # why it is less than the model's; "" if it is not
    max_batched_tokens: int
    weights: int
    arena: int
    page_tables: int
    activation_peak: int  # estimate
    num_devices: int = 1
    num_slots: int = 0  # sequences that hold device KV at once
    pages_note: str = ""  # how their number was derived, when nobody gave it
    slots_note: str = ""  # why they are fewer than asked for; "" if they are not
    transient_pages: int = 0  # beside the pool's: one layer of a step's parked rows is streamed through them
    transient_buffers: int = 0  # their bytes
    staging: int = 0  # blocks on their way to and from the host
    host_cap: int = 0  # of the host tier, all devices together
    host_note: str = ""  # what it can hold
    link_note: str = ""  # why the link's pace means nothing; "" if it does
    stages: tuple[MemoryPlan, ...] = ()  # of a pipeline

    def warnings(self) -> list[str]:
        """What is not as it was asked for, a line each."""
        notes = (
            (f"context is {self.max_context} tokens", self.context_note),
            (f"max_num_seqs is {self.num_slots}", self.slots_note),
            ("link_gbs has no effect", self.link_note),
        )
        return [f"{what}: {why}" for what, why in notes if why]

    def settle(self, config: EngineConfig) -> EngineConfig:
        """The configuration with what it left open for this plan to find."""
        return dataclasses.replace(
            config, cache=dataclasses.replace(config.cache, transient_pages=self.transient_pages)
        )

    def table(self) -> str:
        """The start-up memory table."""
        pages = f"{self.num_pages:,} pages of {self.page_bytes:,} B" + (" in all stages" if self.stages else "")
        rows = [
            ("weights", self.weights, ""),
            ("KV arena", self.arena, pages),
            ("page tables", self.page_tables, ""),
            ("transient buffers", self.transient_buffers, "" if self.transient_buffers else "no layer is parked"),
            ("staging", self.staging, "at most, both directions" if self.host_cap else "no host tier"),
            ("activation peak", self.activation_peak, "estimate"),
            ("host cap", self.host_cap, f"pinned host memory, {self.host_note}" if self.host_cap else "no host tier"),
        ]
        lines = [f"{name:<18}{size / 2**20:>12,.1f} MiB  {note}".rstrip() for name, size, note in rows]
        context = f"context {self.max_context:,} tokens" + (f" ({self.context_note})" if self.context_note else "")
        slots = [f"at most {self.num_slots:,} sequences ({self.slots_note})"] if self.slots_note else []
        most = f", at most; {len(self.stages)} stages" if self.stages else ""
        devices = [f"on each of {self.num_devices} devices{most}"] if self.num_devices > 1 else []
        notes = [f"pages: {self.pages_note}"] if self.pages_note else []
        for i, plan in enumerate(self.stages):
            sizes = f"weights {plan.weights / 2**20:,.1f} MiB, KV arena {plan.arena / 2**20:,.1f} MiB"
            note = f" ({plan.pages_note})" if plan.pages_note else ""
            notes.append(f"stage {i}: {sizes}, {plan.num_pages:,} pages{note}")
        return "\n".join([*devices, *lines, context, *slots, *notes])


def merge_stages(plans: Sequence[MemoryPlan]) -> MemoryPlan:
    """What the stages of a pipeline hold together: the pages of all, and the context and the slots of the stage that
    has room for the least. One stage is the whole."""
    if len(plans) == 1:
        return plans[0]
    shortest = min(plans, key=lambda plan: plan.max_context)
    fewest = min(plans, key=lambda plan: plan.num_slots)
    most = {name: max(getattr(plan, name) for plan in plans) for name in ("weights", "arena", "page_tables")}
    return dataclasses.replace(
        shortest,
        **most,
        num_pages=sum(plan.num_pages for plan in plans),
        num_devices=sum(plan.num_devices for plan in plans),
        num_slots=fewest.num_slots,
        slots_note=fewest.slots_note,
        pages_note="",
        stages=tuple(plans),
    )


def make_memory_plan(
    model: ModelConfig, config: EngineConfig, weights: int, page_bytes: int, device: Any
) -> MemoryPlan:
    """Sizes everything from the configuration and what the device has.

    Args:
      weights, page_bytes: bytes on each device.
      device: any of `config.tensor` equal ones; on CPU they are virtual and share the machine's memory.

    Raises:
      ConfigError: the pool cannot hold what was asked for; says by how much.
    """
    cache, size, layers = config.cache, config.cache.page_size, model.num_layers
    on_cpu, simulated = device.platform == "cpu", device.platform == "sim"
    native = cache.store == "native"  # a sequence's run is owned as a whole, there are no chunks
    chunk = cache.pages_per_chunk or (1 if on_cpu or native or simulated else max(1, CHUNK_BYTES // page_bytes))
    wanted = min(config.max_context or model.max_context, model.max_context)
    if config.max_context and config.max_context > model.max_context:
        raise ConfigError(f"max_context={config.max_context} is more than the model's {model.max_context}")
    tables = layers * config.scheduler.max_num_seqs * cdiv(wanted, size) * 4
    batched = token_budget(config.scheduler, wanted)
    activations = activation_bytes(model, config, batched)
    transient = cache.num_transient * page_bytes
    staging = 2 * cache.staging_bytes // config.tensor if cache.host_bytes else 0
    others = weights + tables + activations + transient + staging
    if cache.num_pages is not None:
        pages = cache.num_pages
    elif cache.device_bytes is not None:
        pages = cache.device_bytes // page_bytes - chunk
    else:
        spare = _spare_bytes(device, config.tensor, cache.device_fraction, others, weights)
        pages = spare // page_bytes - chunk
    _check_host_tier(config)
    derived = cache.transient_pages is None and parks(config.scheduler)
    context, note = _context(config, wanted, pages, chunk, layers, derived)
    streamed = _transient_pages(config, context, derived)
    if derived:
        pages, transient = pages - streamed, streamed * page_bytes
    slots, slots_note, pages = config.scheduler.max_num_seqs, "", pages // chunk * chunk
    if native:
        slots, slots_note, pages = _whole_runs(slots, layers * cdiv(context, size), pages, context)
    arena = (pages + chunk) * page_bytes
    _check_room(arena, weights + transient, config, device)
    host_note = host_tier_note(config, page_bytes * config.tensor, layers)
    return MemoryPlan(
        num_pages=pages,
        pages_per_chunk=chunk,
        page_bytes=page_bytes,
        max_context=context,
        context_note=note,
        max_batched_tokens=token_budget(config.scheduler, context),
        weights=weights,
        arena=arena,
        page_tables=layers * slots * (1 if native else cdiv(context, size)) * 4,
        activation_peak=activations,
        num_devices=config.tensor,
        num_slots=slots,
        slots_note=slots_note,
        transient_pages=streamed,
        transient_buffers=transient,
        staging=staging,
        host_cap=cache.host_bytes,
        host_note=host_note,
        link_note="there is no host tier to copy to, set host_bytes" if config.link_gbs and not host_note else "",
    )


def _check_host_tier(config: EngineConfig) -> None:
    """Raises ConfigError when the policy needs a host tier and there is none."""
    policy, cache = config.scheduler.policy, config.cache
    if needs_host(config.scheduler) and not cache.host_bytes:
        raise ConfigError(f"policy {policy} moves KV to the host: set host_bytes")
    if parks(config.scheduler) and (cache.store != "paged" or cache.transient_pages == 0):
        raise ConfigError(f"policy {policy} parks layers: it needs store=paged, and transient_pages other than 0")


def _check_room(arena: int, fixed: int, config: EngineConfig, device: Any) -> None:
    """Raises ConfigError when the device has no room for the arena, beside `fixed` bytes where nothing is loaded that
    would find out, or the host none for its tier."""
    on_cpu, host_bytes = device.platform == "cpu", config.cache.host_bytes
    room = _available_host_bytes() // config.tensor if on_cpu else _limit(device) or arena
    if device.platform == "sim" and fixed + arena > room:
        raise ConfigError(
            f"the model does not fit: {(fixed + arena - room) / 2**30:,.2f} GiB too little on each "
            f"{device.device_kind} of {room / 2**30:,.2f} GiB for {fixed / 2**30:,.2f} GiB of weights and a KV pool of "
            f"{arena / 2**30:,.2f} GiB: lower num_pages or device_bytes, or share it over more devices"
        )
    if arena > room:
        raise ConfigError(
            f"the KV pool of {arena / 2**30:,.1f} GiB is more than the {room / 2**30:,.1f} GiB that "
            f"{device.device_kind} has: lower num_pages, device_bytes or device_fraction"
        )
    if device.platform != "sim" and host_bytes > (
        left := _available_host_bytes() - (arena * config.tensor if on_cpu else 0)
    ):
        raise ConfigError(
            f"a host tier of {host_bytes / 2**30:,.1f} GiB is more than the {left / 2**30:,.1f} GiB that are "
            "left: lower host_bytes"
        )


def host_tier_note(config: EngineConfig, page_bytes: int, layers: int) -> str:
    """Which sequences the host tier can take, "" without one. `page_bytes`: of a page, all devices together.

    Raises:
      ConfigError: none, and sequences are to be swapped there.
    """
    host_bytes, size = config.cache.host_bytes, config.cache.page_size
    pages = host_bytes // page_bytes
    if config.scheduler.preemption == "swap" and pages < layers:
        raise ConfigError(
            f"preemption=swap: host_bytes={host_bytes:,} holds {pages} pages and the shortest sequence takes {layers}, "
            f"one in each layer: nothing could be swapped; raise host_bytes to {layers * page_bytes:,} at least"
        )
    return f"{pages:,} pages: sequences of up to {pages // layers * size:,} tokens" if host_bytes else ""


def _context(config: EngineConfig, wanted: int, pages: int, chunk: int, layers: int, streams: bool) -> tuple[int, str]:
    """Tokens of the longest sequence that a pool of `pages` holds, and why they are less than the model's. `streams`:
    with pages to stream one of its layers through, as if it had one more."""
    size, parts = config.cache.page_size, layers + streams
    per_layer = max(pages, 0) // chunk // parts * chunk  # pages one sequence can have of every layer
    if per_layer < 1:
        raise ConfigError(
            f"the KV pool has {max(pages, 0)} pages; one page in each of {layers} layers"
            f"{' and to stream one' * streams} (chunks of {chunk} pages) takes {parts * chunk}: raise num_pages, "
            "device_bytes or device_fraction"
        )
    if per_layer * size < wanted:
        if config.max_context:
            raise ConfigError(
                f"max_context={wanted} takes {cdiv(wanted, size) * parts} pages,"
                f"{' those to stream a layer among them,' * streams} the KV pool has {pages}: lower max_context to "
                f"{per_layer * size} or enlarge the pool"
            )
        return per_layer * size, f"the model's {wanted:,} capped by the KV pool"
    return wanted, ""


def _transient_pages(config: EngineConfig, context: int, derived: bool) -> int:
    """Pages to stream one layer of a sequence of `context` tokens through, or those given."""
    given, least = config.cache.num_transient, cdiv(context, config.cache.page_size)
    if derived:
        return least
    if parks(config.scheduler) and given < least:
        raise ConfigError(
            f"transient_pages={given} hold less than a layer of {context} tokens, the longest sequence, which takes "
            f"{least}: raise it, leave it out or lower max_context"
        )
    return given


def _whole_runs(slots: int, run: int, pages: int, context: int) -> tuple[int, str, int]:
    """Sequences that can reserve `run` pages each, why they are fewer than `slots`, and the pages they take."""
    fitting = min(slots, pages // run)
    note = f"{slots} asked for; each reserves {context:,} tokens: lower max_context or enlarge the KV pool"
    return fitting, note if fitting < slots else "", fitting * run


def activation_bytes(model: ModelConfig, config: EngineConfig, batched_tokens: int) -> int:
    """Estimated peak of activations on each device: one layer over T tokens or the LM head over R rows, and x and the
    rope tables of all sub-batches of a step."""
    tiles = config.query_tile * config.max_tiles
    rows = next_power_of_two(config.scheduler.max_num_seqs)
    tokens = max(tiles, rows)
    m, f, v = model.hidden_size, model.ffn_size, model.vocab_size
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    layer = tokens * (4 * m + 3 * (heads + f) // config.tensor) * DTYPES[model.dtype]
    head = rows * v * 4 * 4  # float32 logits and the sampler's copies
    waiting = max(0, batched_tokens - tokens) * (m * DTYPES[model.dtype] + model.head_dim * 4)
    return max(layer, head) + waiting


def _limit(device: Any) -> int | None:
    """Bytes of a GPU or TPU that JAX may take, when it says so."""
    return (device.memory_stats() or {}).get("bytes_limit")


def _spare_bytes(device: Any, tensor: int, fraction: float | None, others: int, weights: int) -> int:
    """Bytes the arena may take on this device."""
    if device.platform == "cpu":
        available = _available_host_bytes()
        return (int(available * fraction) if fraction is not None else min(CPU_ARENA_BYTES, available // 2)) // tensor
    limit = _limit(device)
    if not limit:
        raise ConfigError(f"{device.device_kind} does not report its memory: give num_pages or device_bytes")
    spare = int(limit * (fraction or DEVICE_FRACTION)) - others
    if spare <= 0:
        raise ConfigError(
            f"weights ({weights / 2**30:.1f} GiB) and activations leave nothing of {limit / 2**30:.1f} GiB x "
            f"{fraction or DEVICE_FRACTION} for KV: the model is {-spare / 2**30:.1f} GiB too large"
        )
    return spare


def _available_host_bytes() -> int:
    """Memory this process may still take: the system's own estimate and the container's limit, whichever is less."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: half of what is installed
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = file.read().strip()
    except OSError:
        return available
    return min(available, int(limit)) if limit.isdecimal() else available

"""The stores by name: `CacheConfig.store`, `--store`. No JAX here."""

from __future__ import annotations

from engine.memory.host import HostTier
from engine.memory.native import NativeStore
from engine.memory.paged import PagedStore
from engine.memory.pages import PagePool
from engine.memory.parking import ParkingStore
from engine.memory.staged import Pool
from engine.memory.store import KVStore


def make_store(
    name: str,
    num_pages: int,
    num_layers: int,
    pages_per_chunk: int,
    num_slots: int,
    page_size: int,
    max_tokens: int,
    host: HostTier | None = None,
    transient_pages: int = 0,
) -> KVStore:
    """An empty store of `num_pages` usable pages over all layers (`native`: those of its slots) for sequences of up to
    `max_tokens`; with a host tier, paged sequences can be parked layer by layer."""
    if name == "native":
        return NativeStore(num_slots, num_layers, page_size, max_tokens, host)
    pool = PagePool(num_pages, num_layers, pages_per_chunk)
    return paged_store(pool, num_slots, page_size, max_tokens, host, transient_pages)


def paged_store(
    pool: Pool,
    num_slots: int,
    page_size: int,
    max_tokens: int,
    host: HostTier | None = None,
    transient_pages: int = 0,
) -> PagedStore:
    """An empty store over a pool, or over those of a pipeline's stages; with a host tier it parks layers."""
    if host is None:
        return PagedStore(pool, num_slots, page_size, max_tokens)
    return ParkingStore(pool, num_slots, page_size, max_tokens, host, transient_pages)

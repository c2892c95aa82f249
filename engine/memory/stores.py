"""The stores by name: `CacheConfig.store`, `--store`. No JAX here."""

from __future__ import annotations

from engine.memory.host import HostTier
from engine.memory.native import NativeStore
from engine.memory.paged import PagedStore
from engine.memory.pages import PagePool
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
) -> KVStore:
    """An empty store. `num_pages`: usable pages over all layers, for `native` those of its slots; `max_tokens`: of one
    sequence."""
    if name == "native":
        return NativeStore(num_slots, num_layers, page_size, max_tokens, host)
    return PagedStore(PagePool(num_pages, num_layers, pages_per_chunk), num_slots, page_size, max_tokens, host)

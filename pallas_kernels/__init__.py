"""Kernels over a paged KV cache; a folder holds `api.py`, `reference.py` and one file per backend."""

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention.api import KERNEL as _DECODE
from pallas_kernels.kv_cache import KVArena, KVSpec, KVView, PagedView, RunView, init_arena, storage_dtype
from pallas_kernels.page_copies import KVBlock, copy_pages, gather_pages, scatter_pages
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.prefill_attention.api import KERNEL as _PREFILL
from pallas_kernels.write_kv import write_kv

ATTENTION_KERNELS = (_DECODE, _PREFILL)  # what `attention_backend` chooses for

__all__ = [
    "ATTENTION_KERNELS",
    "KVArena",
    "KVBlock",
    "KVSpec",
    "KVView",
    "PagedView",
    "RunView",
    "copy_pages",
    "decode_attention",
    "gather_pages",
    "init_arena",
    "prefill_attention",
    "scatter_pages",
    "storage_dtype",
    "write_kv",
]

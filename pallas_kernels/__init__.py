"""Kernels over a paged KV cache, one folder each: `api.py`, `reference.py` and one file per backend."""

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention.api import KERNEL as _DECODE
from pallas_kernels.kv_cache import KVArena, KVSpec, KVView, PagedView, RunView, init_arena, storage_dtype
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.prefill_attention.api import KERNEL as _PREFILL
from pallas_kernels.write_kv import write_kv

ATTENTION_KERNELS = (_DECODE, _PREFILL)  # what `attention_backend` chooses for

__all__ = [
    "ATTENTION_KERNELS",
    "KVArena",
    "KVSpec",
    "KVView",
    "PagedView",
    "RunView",
    "decode_attention",
    "init_arena",
    "prefill_attention",
    "storage_dtype",
    "write_kv",
]

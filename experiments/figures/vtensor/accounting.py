"""The stores' own books, for the paper's model: what figures 2 and 11a share. No time in it."""

from __future__ import annotations

from engine.config import cdiv
from engine.costmodel.attention import kv_token_bytes
from engine.costmodel.roofline import Shard
from engine.errors import OutOfPages
from engine.memory.store import KVStore
from engine.memory.stores import make_store
from engine.presets import preset
from experiments.figures.vtensor.setting import GIB, MODEL

YI = preset(MODEL)
PAGE = 16  # tokens of a layer
TOKEN_BYTES = kv_token_bytes(YI, Shard.of(YI, 1))  # K and V of one token of one layer
PAGE_GIB = PAGE * TOKEN_BYTES / GIB
# vTensor's granularity: a row is one physical chunk for K and one for V in every layer.
CHUNK = 2 << 20
ROW_TOKENS = 2 * CHUNK // TOKEN_BYTES
ROW_GIB = 2 * YI.num_layers * CHUNK / GIB


def make(store: str, room: float, slots: int, max_context: int) -> KVStore:
    """An empty store of this name in `room` GiB, for up to `slots` sequences; native has as many as it has runs for."""
    pages, run = int(room / PAGE_GIB), YI.num_layers * cdiv(max_context, PAGE)
    if store == "native":
        slots = min(slots, pages // run)
    return make_store(store, pages, YI.num_layers, 1, slots, PAGE, max_context)


def fill(store: KVStore, num: int, tokens: int) -> int:
    """Opens up to `num` sequences of `tokens`. Returns how many fit."""
    for opened in range(num):
        try:
            store.open(tokens)
        except OutOfPages:
            return opened
    return num


def page_gib(tokens: int) -> float:
    """What a sequence of so many tokens holds in pages."""
    return cdiv(tokens, PAGE) * YI.num_layers * PAGE_GIB


def row_gib(tokens: int) -> float:
    """What a sequence of so many tokens holds under vTensor: the rows that it fills, and the next one ahead."""
    return (cdiv(tokens, ROW_TOKENS) + 1) * ROW_GIB

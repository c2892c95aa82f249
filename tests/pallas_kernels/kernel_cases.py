"""Seeded caches for the kernel tests, built in NumPy without the code under test."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from pallas_kernels import KVArena, KVSpec, KVView, PagedView, RunView, storage_dtype

LAYERS = 2


@dataclass(frozen=True)
class Heads:
    """H query heads, K kv heads, D head dim."""

    h: int
    k: int
    d: int


@dataclass(frozen=True)
class Case:
    """An arena holding `lens` tokens per sequence, NaN in every slot that holds none, and the view of them."""

    arena: KVArena
    view: KVView
    k: list[np.ndarray]  # per sequence [len, K, D]
    v: list[np.ndarray]


def tokens(rng: np.random.Generator, lens, heads: Heads) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Random float32 K and V of sequences."""
    return tuple([rng.normal(size=(n, heads.k, heads.d)).astype(np.float32) for n in lens] for _ in "kv")


def place(
    k: list[np.ndarray], v: list[np.ndarray], page_size: int, kind: str, dtype: str = "float32", seed: int = 0, spare=0
) -> Case:
    """Puts sequences into a poisoned arena: `paged` in shuffled pages of layer 1 of 2, `run` in consecutive pages.

    Table entries beyond a sequence's pages name a page full of NaN. `spare`: more logical pages per table row.
    """
    rng = np.random.default_rng(seed)
    heads, dim = k[0].shape[1:]
    counts = [-(-len(x) // page_size) for x in k]
    width = max(1, max(counts)) + spare
    total = 2 + LAYERS * len(k) * width
    poison = total - 1
    pages = np.full((2, total, page_size, heads, dim), np.nan, np.float32)
    pages[:, 0] = 0.0
    order = np.arange(1, poison) if kind == "run" else rng.permutation(np.arange(1, poison))
    table = order[: LAYERS * len(k) * width].reshape(LAYERS, len(k), width).astype(np.int32)
    rows = np.arange(len(k)) if kind == "run" else rng.permutation(len(k))  # a row's slot in the table
    for row, (n, slot) in enumerate(zip(counts, rows, strict=True)):
        for side, x in enumerate((k[row], v[row])):
            for i in range(n):
                part = x[i * page_size : (i + 1) * page_size]
                pages[side, table[1, slot, i], : len(part)] = part
        if kind == "paged":
            table[1, slot, n:] = poison
    spec = KVSpec(page_size, heads, dim, dtype)
    stored = pages.astype(jnp.dtype(dtype)).view(storage_dtype(spec, "cpu"))
    arena = KVArena(jnp.asarray(stored[0]), jnp.asarray(stored[1]), spec)
    if kind == "run":
        return Case(arena, RunView(jnp.asarray(table[1, :, 0])), k, v)
    return Case(arena, PagedView(jnp.asarray(table), jnp.int32(1), jnp.asarray(rows, jnp.int32)), k, v)


def take_rows(view: KVView, rows) -> KVView:
    """The view of some of its rows, repeated as wished: one row per query tile."""
    rows = jnp.asarray(rows, jnp.int32)
    return (
        RunView(view.start[rows]) if isinstance(view, RunView) else PagedView(view.table, view.layer, view.rows[rows])
    )


def queries(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random float32 queries."""
    return rng.normal(size=shape).astype(np.float32)


def ints(x) -> jnp.ndarray:
    """int32 on the device."""
    return jnp.asarray(np.asarray(x), jnp.int32)

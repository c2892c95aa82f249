"""What memory management costs on this machine: page bookkeeping on the host, page copies on the device.

    python -m experiments.bench_memory

Bookkeeping is compared with a plain Python free list (one `pop` per page, as block managers in Python do) that fills
the same table; both are aged: their free pages lie in random order. Copies are compared with `np.copyto` of as many
bytes. All are measured in turns, in one run; medians are shown, then one JSON line. Units: 1e6 pages/s, microseconds,
1e9 bytes/s of what is moved.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags

from engine.memory.paged import PagedStore
from engine.memory.pages import PagePool
from experiments import common_flags
from experiments.tables import format_table, rounded

LAYERS = flags.DEFINE_integer("layers", 32, "L.", lower_bound=1)
PAGES = flags.DEFINE_integer("bulk_pages", 2048, "Pages of each layer in a bulk allocation.", lower_bound=1)
CHUNK = flags.DEFINE_integer("chunk", 1, "Pages per chunk.", lower_bound=1)
GROWTHS = flags.DEFINE_integer("growths", 500, "Single growths, one page in every layer, per round.", lower_bound=1)
COPIED = flags.DEFINE_integer("copied_pages", 256, "Pages of 2 x 64 KiB to copy; 0: only the host.", lower_bound=0)
ROUNDS = flags.DEFINE_integer("rounds", 15, "Each measurement is the median of so many.", lower_bound=1)

PAGE_SHAPE = (16, 8, 128)  # [S, K, D] float32: 64 KiB of K, as much of V
Sides = dict[str, tuple[float, Callable[[], Any]]]  # name: amount of work, the work


def measure(sides: Sides) -> dict[str, float]:
    """Amount of work per second of each side, in turns; the first round is discarded."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS.value + 1):
        for name, (_, work) in sides.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {name: amount / float(np.median(seconds[name][1:])) for name, (amount, _) in sides.items()}


def bulk() -> dict[str, float]:
    """Allocation and release of many pages: by the pool, by a list, and by the store with its table and deltas."""
    layers, pages, size = LAYERS.value, PAGES.value, 16
    total, rng, held = layers * pages, np.random.default_rng(0), dict[str, Any]()
    pool = PagePool(layers * 2 * (pages + CHUNK.value), layers, CHUNK.value)
    store = PagedStore(pool, 1, size, size * pages)
    pool.free(rng.permutation(pool.allocate(pool.num_chunks // layers * CHUNK.value)))
    free = rng.permutation(pool.num_pages).tolist()
    sides: Sides = {
        "allocate": (total, lambda: held.update(ids=pool.allocate(pages))),
        "free": (total, lambda: pool.free(held["ids"])),
        "list_allocate": (total, lambda: held.update(list=[free.pop() for _ in range(total)])),
        "list_free": (total, lambda: free.extend(held["list"])),
        "open": (total, lambda: held.update(slot=store.open(size * pages))),
        "deltas": (total, store.take_deltas),
        "close": (total, lambda: store.close(held["slot"])),
    }
    per_second = measure(sides)
    rates = {f"{name}_mpages_s": value / 1e6 for name, value in per_second.items()}
    return rates | {"allocate_ratio": per_second["allocate"] / per_second["list_allocate"]}


def growth() -> dict[str, float]:
    """One page more in every layer of one sequence, many times; the deltas are packed once at the end of a round."""
    layers, growths, size = LAYERS.value, GROWTHS.value, 16
    pool = PagePool(layers * (growths + 1 + CHUNK.value), layers, CHUNK.value)
    store = PagedStore(pool, 1, size, size * (growths + 1))
    lengths = [np.array([size * (i + 2)]) for i in range(growths)]
    free = np.random.default_rng(0).permutation(pool.num_pages).tolist()
    slots, table = np.zeros(1, np.int32), np.zeros((layers, growths), np.int32)

    def grow() -> None:
        for length in lengths:
            store.grow(slots, length)

    def grow_list() -> None:
        for i in range(growths):
            table[:, i] = [free.pop() for _ in range(layers)]

    def start() -> None:
        store.open(size)
        store.take_deltas()

    def end() -> None:
        store.close(0)
        free.extend(table.ravel().tolist())

    sides: Sides = {
        "start": (1, start),
        "grow": (growths, grow),
        "grow_deltas": (growths, store.take_deltas),
        "list_grow": (growths, grow_list),
        "end": (1, end),
    }
    per_second = measure(sides)
    micros = {f"{name}_us": 1e6 / per_second[name] for name in ("grow", "grow_deltas", "list_grow")}
    return micros | {"grow_ratio": micros["list_grow_us"] / (micros["grow_us"] + micros["grow_deltas_us"])}


def copies() -> dict[str, float]:
    """Gather (into a fresh block, and into an old one's memory), scatter and copy of pages in random order, and
    `np.copyto`, GB/s."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import KVSpec, copy_pages, gather_pages, init_arena, scatter_pages

    n, (size, heads, dim) = COPIED.value, PAGE_SHAPE
    pages = np.random.default_rng(0).permutation(np.arange(1, 2 * n + 1, dtype=np.int32))
    state: dict[str, Any] = {"arena": init_arena(KVSpec(size, heads, dim, "float32"), 2 * n + 1)}
    state.update(src=jnp.array(pages[:n]), dst=jnp.array(pages[n:]))
    reuse = jax.jit(lambda arena, pages, old: gather_pages(arena, pages), donate_argnums=2, keep_unused=True)
    gather, scatter = jax.jit(gather_pages), jax.jit(scatter_pages, donate_argnums=0)
    copy = jax.jit(copy_pages, donate_argnums=0)
    there, here = np.empty((2, n, *PAGE_SHAPE), np.float32), np.ones((2, n, *PAGE_SHAPE), np.float32)

    def side(name: str, function: Callable[..., Any], *args: str) -> tuple[float, Callable[[], Any]]:
        return here.nbytes, lambda: state.update({name: jax.block_until_ready(function(*(state[a] for a in args)))})

    sides: Sides = {
        "gather": side("block", gather, "arena", "src"),
        "gather_reusing": side("block", reuse, "arena", "src", "block"),
        "scatter": side("arena", scatter, "arena", "dst", "block"),
        "copy": side("arena", copy, "arena", "src", "dst"),
        "copyto": (here.nbytes, lambda: np.copyto(there, here)),
    }
    return {f"{name}_gb_s": value / 1e9 for name, value in measure(sides).items()}


def main() -> int:
    """The program."""
    result = bulk() | growth() | (copies() if COPIED.value else {})
    print(format_table(("measurement", "value"), list(result.items())))
    settings = {f.name: f.value for f in (LAYERS, PAGES, CHUNK, GROWTHS, COPIED, ROUNDS)}
    print(json.dumps({"bench": "memory", **settings, **{k: rounded(v) for k, v in result.items()}}))
    return 0


if __name__ == "__main__":
    common_flags.run_main(main, engine=False)

"""Speed of moving KV to the host and back, against the same copies written by hand and a plain `device_put`.

    python -m experiments.bench_swap --gib=1

Four ways take turns over the same pages of a random order, out and in again:
    engine  the executor's `Transfers`: gathers, copies in lanes, scatters, one block of several pieces per layer
    pieces  by hand, the same pieces: gathers, two `device_put`s per layer and donated scatters, nothing else
    whole   by hand, per layer one gather, two `device_put`s and one donated scatter
    plain   one `device_put` each way of as many bytes that are contiguous already
Prints medians in 1e9 bytes/s (bytes moved out and in over seconds), and of each repeat the engine's speed over the
others' (median, least, most). `engine_over_by_hand` is over the faster way by hand. Ends with one JSON line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from absl import flags

from experiments import common_flags
from experiments.tables import format_table, rounded

flags.declare_key_flag("dtype")
flags.declare_key_flag("page_size")
flags.declare_key_flag("staging_bytes")
flags.declare_key_flag("link_unit")
GIB = flags.DEFINE_float("gib", 1.0, "GiB moved each way.", lower_bound=0.001)
LAYERS = flags.DEFINE_integer("layers", 12, "Blocks they are moved in.", lower_bound=1)
HEADS = flags.DEFINE_integer("kv_heads", 4, "kv heads.", lower_bound=1)
HEAD_DIM = flags.DEFINE_integer("head_dim", 64, "Head dimension.", lower_bound=2)
REPEATS = flags.DEFINE_integer("repeats", 7, "Interleaved repeats; one more is discarded.", lower_bound=1)


def main() -> int:
    """The program."""
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from engine.clock import WallClock
    from engine.executor.transfers import Transfers, piece_sizes, pieces
    from engine.memory.moves import Move
    from engine.models.tensors import device_mesh
    from pallas_kernels import KVSpec, gather_pages, init_arena, scatter_pages

    dtype = common_flags.DTYPE.value or "float32"
    spec = KVSpec(common_flags.PAGE_SIZE.value, HEADS.value, HEAD_DIM.value, dtype)
    per_layer = max(1, int(GIB.value * 2**30 / spec.page_bytes / LAYERS.value))
    num_bytes = per_layer * LAYERS.value * spec.page_bytes
    device = NamedSharding(device_mesh(), P(None, None, "tensor"))
    host = device.with_memory_kind("pinned_host")
    arena = init_arena(spec, per_layer * LAYERS.value + 1, device)
    order = np.random.default_rng(0).permutation(per_layer * LAYERS.value).astype(np.int32) + 1
    layers = np.split(order, LAYERS.value)
    staging_bytes, unit = common_flags.STAGING_BYTES.value, common_flags.LINK_UNIT.value
    transfers = Transfers(device, spec.page_bytes, WallClock(), None, staging_bytes, unit)
    sizes = piece_sizes(spec.page_bytes, unit)
    gather, scatter = jax.jit(gather_pages), jax.jit(scatter_pages, donate_argnums=0)
    contiguous = jax.block_until_ready(gather(arena, order))

    def engine() -> None:
        nonlocal arena
        out = [Move(True, i, i, pages) for i, pages in enumerate(layers)]
        back = [Move(False, i, i, pages) for i, pages in enumerate(layers)]
        for move in out:
            transfers.send(arena, move)
        while len(transfers.take_ended(wait=True)) and transfers.busy:
            pass
        for move in back:
            transfer = transfers.fetch(move)
            assert transfer is not None
            arena = transfers.land(arena, transfer)
        jax.block_until_ready(arena)
        while transfers.busy:
            transfers.take_ended(wait=True)
        transfers.drop(tuple(range(len(layers))))

    def by_hand(cut: list[list[np.ndarray]]) -> None:
        nonlocal arena
        gathered = ([gather(arena, ids) for ids in layer] for layer in cut)
        blocks = jax.block_until_ready([jax.device_put(block, host) for block in gathered])
        for layer, block in zip(cut, blocks, strict=True):
            for ids, piece in zip(layer, jax.device_put(block, device), strict=True):
                arena = scatter(arena, ids, piece)
        jax.block_until_ready(arena)

    def plain() -> None:
        jax.block_until_ready(jax.device_put(jax.block_until_ready(jax.device_put(contiguous, host)), device))

    ways: dict[str, Callable[[], None]] = {
        "engine": engine,
        "pieces": partial(by_hand, [pieces(pages, sizes) for pages in layers]),
        "whole": partial(by_hand, [[pages] for pages in layers]),
        "plain": plain,
    }
    about = {"gib": num_bytes / 2**30, "layers": LAYERS.value, "dtype": dtype, "page_size": spec.page_size}
    report(interleaved(ways, REPEATS.value), 2 * num_bytes, about | {"link_unit": unit})
    return 0


def interleaved(ways: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat of every way, which take turns; a first round is discarded."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(-1, repeats):
        for name in sorted(ways, reverse=bool(repeat % 2)):
            start = time.perf_counter()
            ways[name]()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(seconds: dict[str, list[float]], num_bytes: int, about: dict[str, Any]) -> None:
    """Prints the table and the JSON line. `num_bytes`: moved in each repeat; `about`: what was measured."""
    speed = {name: num_bytes / float(np.median(s)) / 1e9 for name, s in seconds.items()}
    ratio = {name: np.divide(s, seconds["engine"]) for name, s in seconds.items()}
    rows = [[n, speed[n], float(np.median(r)), f"{min(r):.2f}-{max(r):.2f}"] for n, r in ratio.items()]
    print(format_table(["way", "GB/s", "engine / it", "range"], rows))
    line: dict[str, Any] = {"bench": "swap"} | about
    line |= {f"{name}_gbs": rounded(v) for name, v in speed.items()}
    line |= {f"engine_over_{name}": rounded(float(np.median(r))) for name, r in ratio.items() if name != "engine"}
    line["engine_over_by_hand"] = min(line["engine_over_pieces"], line["engine_over_whole"])
    print(json.dumps(line))


if __name__ == "__main__":
    common_flags.run_main(main, engine=False)

"""Times the ops of a model on the device that is here, and fits the constants of the roofline to them.

Ops are single programs, called one after the other over as many different operands as the model has layers (weights
come from memory, as in a step), less what a call of an empty program costs. Peaks are the best of what was measured, as
nobody publishes those of an unknown machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.config import DTYPES, ModelConfig, cdiv
from engine.costmodel.attention import kv_token_bytes, pair_flops, pairs
from engine.costmodel.roofline import Shard
from experiments.quiet import Others
from experiments.step_timing import Samples

STREAM_BYTES = 128 << 20  # read, and written: more than caches hold
COPY_BYTES = (1 << 16, 1 << 20, 1 << 24)
MAX_KV_TOKENS = 16384  # in the arena of timed attention


@dataclass(frozen=True)
class Op:
    """One program with its operands: what is timed, and what its time is a function of."""

    name: str
    call: Callable[..., Any]
    operands: Sequence[tuple[Any, ...]]
    work: dict[str, float]


def make_ops(model: ModelConfig, tensor: int, tokens: Sequence[int], rows: Sequence[int]) -> list[Op]:
    """The ops of one device's share of the model, for these numbers of tokens (prefill) and rows (decode)."""
    shard = Shard.of(model, tensor)
    sizes = sorted({*tokens, *rows})
    return [
        *_products(model, shard, sizes),
        *_elementwise(model, shard, sizes),
        *_attention(model, shard, tokens, rows),
        *_memory(),
    ]


def _products(model: ModelConfig, shard: Shard, tokens: Sequence[int]) -> list[Op]:
    import jax
    import jax.numpy as jnp

    m, heads, kv = model.hidden_size, shard.num_heads * model.head_dim, shard.num_kv_heads * model.head_dim
    shapes = [(m, heads + 2 * kv), (heads, m), (m, 2 * shard.ffn_size), (shard.ffn_size, m), (m, shard.vocab_size)]
    call, ops = jax.jit(jnp.matmul), []
    for k, n in shapes:
        weights = [jnp.full((k, n), 0.01, model.dtype) for _ in range(model.num_layers)]
        for t in tokens:
            if n == shard.vocab_size and t > max(64, tokens[0]):
                continue  # an LM head has rows, not tokens
            x = jnp.full((t, k), 0.01, model.dtype)
            num_bytes = (t * k + k * n + t * n) * DTYPES[model.dtype]
            ops.append(Op("product", call, [(x, w) for w in weights], {"flops": 2 * t * n * k, "bytes": num_bytes}))
    x = jnp.full((1024, 1024), 0.01, "bfloat16")
    ops.append(Op("product_16bit", call, [(x, x)] * 4, {"flops": 2 * 1024**3}))
    return ops


def _elementwise(model: ModelConfig, shard: Shard, tokens: Sequence[int]) -> list[Op]:
    import jax
    import jax.numpy as jnp

    from engine.models.llama import rms_norm

    width, ops = DTYPES[model.dtype], []
    norm = jax.jit(lambda x, r, w: rms_norm(x + r, w, 1e-5))
    gate = jax.jit(lambda x: jax.nn.silu(x[:, 0]) * x[:, 1])
    for t in tokens:
        x, w = jnp.full((t, model.hidden_size), 0.5, model.dtype), jnp.ones(model.hidden_size, model.dtype)
        y = jnp.full((t, 2, shard.ffn_size), 0.5, model.dtype)
        copies = range(model.num_layers)
        ops.append(Op("elementwise", norm, [(x, x, w) for _ in copies], {"bytes": 3 * x.size * width}))
        ops.append(Op("elementwise", gate, [(y,) for _ in copies], {"bytes": 1.5 * y.size * width}))
    return ops


def _attention(model: ModelConfig, shard: Shard, tokens: Sequence[int], rows: Sequence[int]) -> list[Op]:
    import jax
    import jax.numpy as jnp

    from pallas_kernels import KVSpec, PagedView, decode_attention, init_arena, prefill_attention

    size, scale = 16, model.head_dim**-0.5
    spec = KVSpec(size, shard.num_kv_heads, model.head_dim, model.dtype)
    arena = init_arena(spec, MAX_KV_TOKENS // size + 1)
    ids = np.random.default_rng(0).permutation(MAX_KV_TOKENS // size).astype(np.int32) + 1

    def decode(arena, q, table, lens):
        view = PagedView(table, jnp.int32(0), jnp.arange(len(q)))
        return decode_attention(q, arena, view, lens, sm_scale=scale)

    def prefill(arena, q, table, start, count):
        view = PagedView(table, jnp.int32(0), jnp.zeros(len(q), jnp.int32))
        return prefill_attention(q, arena, view, start, count, sm_scale=scale)

    decode, prefill = jax.jit(decode), jax.jit(prefill)
    ops, longest = [], min(MAX_KV_TOKENS, model.max_context)
    for b in rows:
        for kv in (64, 256, 1024, 2048):
            if b * kv > MAX_KV_TOKENS or kv > longest:
                continue
            q = jnp.full((b, shard.num_heads, model.head_dim), 0.1, model.dtype)
            table = np.zeros((1, b, cdiv(longest, size)), np.int32)
            table[0, :, : kv // size] = ids[: b * kv // size].reshape(b, -1)
            operands = (arena, q, jnp.asarray(table), jnp.full(b, kv, jnp.int32))
            ops.append(Op("decode_attention", decode, [operands] * 4, {"rows": b, "kv": b * kv}))
    tile, table = min(tokens), jnp.asarray(ids.reshape(1, 1, -1))
    for new in tokens:
        for before in (0, 512, 1024):
            if before + new > longest:
                continue
            q = jnp.full((new // tile, tile, shard.num_heads, model.head_dim), 0.1, model.dtype)
            start = before + tile * jnp.arange(new // tile, dtype=jnp.int32)
            operands = (arena, q, table, start, jnp.full(new // tile, tile, jnp.int32))
            work = {"pairs": new * before + pairs(new), "tokens": new}
            ops.append(Op("prefill_attention", prefill, [operands] * 2, work))
    return ops


def _memory() -> list[Op]:
    """A stream through the device's memory, copies to pinned host memory and back, and an empty program."""
    import jax
    import jax.numpy as jnp

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    host = here.with_memory_kind("pinned_host")
    x = jnp.zeros(STREAM_BYTES // 4, jnp.float32)
    ops = [
        Op("stream", jax.jit(lambda x: x + 1), [(x,)], {"bytes": 2 * STREAM_BYTES}),
        Op("nothing", jax.jit(lambda x: x + 1), [(jnp.zeros(8),)] * 16, {}),
    ]
    for num_bytes in COPY_BYTES:
        x = jnp.zeros(num_bytes // 4, jnp.float32)
        ops.append(Op("copy_out", lambda x: jax.device_put(x, host), [(x,)], {"bytes": num_bytes}))
        pinned = jax.device_put(x, host)
        ops.append(Op("copy_in", lambda x: jax.device_put(x, here), [(pinned,)], {"bytes": num_bytes}))
    return ops


def time_ops(ops: Sequence[Op], seconds: float, rng: np.random.Generator, others: Others) -> list[Samples]:
    """Rounds of all ops, in an order drawn anew, until the time is used up; at least three, after one that compiles.
    Rounds that others disturb are dropped. Seconds of one call each; an empty program's are taken off the others,
    copies excepted."""
    import jax

    def call(op: Op) -> float:
        start = time.perf_counter()
        jax.block_until_ready([op.call(*operands) for operands in op.operands])
        return (time.perf_counter() - start) / len(op.operands)

    for op in ops:
        call(op)
    samples, spent, rounds = [Samples() for _ in ops], 0.0, 0
    while rounds < 3 or spent < seconds:
        others.share()
        start, taken = time.perf_counter(), [(i, call(ops[i])) for i in rng.permutation(len(ops)).tolist()]
        spent += time.perf_counter() - start
        if others.disturb():
            continue
        for i, value in taken:
            samples[i].seconds.append(value)
        rounds += 1
    empty = next(s.median for op, s in zip(ops, samples, strict=True) if op.name == "nothing")
    for op, s in zip(ops, samples, strict=True):
        if op.name not in ("nothing", "copy_out", "copy_in"):
            s.seconds = [max(x - empty, 1e-7) for x in s.seconds]
    return samples


def least_squares(columns: Sequence[np.ndarray], seconds: np.ndarray) -> np.ndarray:
    """Coefficients of `columns` [n] that make the sum nearest to `seconds` [n] in relative terms; next to nothing where
    one would be negative.
    """
    used = list(range(len(columns)))
    while True:
        x = np.stack([columns[i] / seconds for i in used], 1)
        found = np.linalg.lstsq(x, np.ones(len(seconds)), rcond=None)[0]
        if (found > 0).all():
            out = np.full(len(columns), 1e-30)
            out[used] = found
            return out
        used.pop(int(found.argmin()))


def fit_products(flops: np.ndarray, num_bytes: np.ndarray, seconds: np.ndarray) -> tuple[float, float, float]:
    """(seconds per FLOP, seconds per byte, launch seconds) of max(FLOPs x, bytes x) + launch: least squares with each
    product on the side of the roof that the fit before had it on."""
    per_flop, per_byte, launch = (seconds / flops).min(), (seconds / num_bytes).min(), 0.0
    for _ in range(20):
        computes = flops * per_flop >= num_bytes * per_byte
        columns = [np.where(computes, flops, 0), np.where(computes, 0, num_bytes), np.ones(len(seconds))]
        new = least_squares(columns, seconds)
        per_flop, per_byte, launch = max(new[0], per_flop / 2), max(new[1], per_byte / 2), new[2]
    return float(per_flop), float(per_byte), float(launch)


def fit(model: ModelConfig, tensor: int, ops: Sequence[Op], samples: Sequence[Samples]) -> dict[str, float]:
    """Constants of the roofline and peaks, by their names in a device file, from times of `make_ops`."""
    shard = Shard.of(model, tensor)

    def times(name: str, *columns: str) -> list[np.ndarray]:
        found = [(op, s.median) for op, s in zip(ops, samples, strict=True) if op.name == name]
        return [np.array([op.work[c] for op, _ in found], float) for c in columns] + [np.array([s for _, s in found])]

    flops, num_bytes, seconds = times("product", "flops", "bytes")
    per_flop, per_byte, t0_gemm = fit_products(flops, num_bytes, seconds)
    moved, element_seconds = times("elementwise", "bytes")
    per_element_byte, t0_element = least_squares([moved, np.ones(len(moved))], element_seconds)
    rows, kv, decode_seconds = times("decode_attention", "rows", "kv")
    per_token, edge, t0_attn = least_squares([kv, rows, np.ones(len(kv))], decode_seconds)
    found_pairs, new, prefill_seconds = times("prefill_attention", "pairs", "tokens")
    per_pair, per_query = least_squares([found_pairs, new], np.maximum(prefill_seconds - t0_attn, 1e-7))
    links = {}
    for way in ("copy_out", "copy_in"):
        copied, copy_seconds = times(way, "bytes")
        links[way] = least_squares([copied, np.ones(len(copied))], copy_seconds)
    stream, stream_seconds = times("stream", "bytes")
    token_bytes, flops_of_pair = kv_token_bytes(model, shard), pair_flops(model, shard)
    bandwidths = [stream[0] / stream_seconds[0], 1 / per_byte, token_bytes / per_token]
    memory, peak = max(bandwidths), max(1 / per_flop, flops_of_pair / per_pair)
    sixteen_flops, sixteen = times("product_16bit", "flops")
    return {
        "fp32_tflops" if model.dtype == "float32" else "bf16_tflops": peak / 1e12,
        **({"bf16_tflops": sixteen_flops[0] / sixteen[0] / 1e12} if model.dtype == "float32" else {}),
        "memory_gbs": memory / 1e9,
        "link_gbs": 2 / sum(x[0] for x in links.values()) / 1e9,
        "link_out_gbs": 1 / links["copy_out"][0] / 1e9,
        "link_in_gbs": 1 / links["copy_in"][0] / 1e9,
        "link_latency_us": max(x[1] for x in links.values()) * 1e6,
        "eff_gemm": 1 / per_flop / peak,
        "eff_gemm_bw": 1 / per_byte / memory,
        "t0_gemm_us": t0_gemm * 1e6,
        "eff_attn_prefill": flops_of_pair / per_pair / peak,
        "edge_prefill_tokens": per_query / per_pair,
        "eff_attn_decode_bw": token_bytes / per_token / memory,
        "edge_decode_tokens": edge / per_token,
        "t0_attn_us": t0_attn * 1e6,
        "eff_elementwise_bw": 1 / per_element_byte / memory,
        "t0_elementwise_us": t0_element * 1e6,
    }

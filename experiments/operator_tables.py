"""Measured operator times from public repositories, as arrays of shapes and seconds.

`--profiles` is a folder with files of three repositories as they are there: `vidur/` (MIT), `llmservingsim/` (MIT),
`aiconfigurator/` (Apache-2.0). The last is in parquet and needs pyarrow, which no other part of the project does.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from engine.errors import ConfigError

PROFILES = flags.DEFINE_string("profiles", "../shared/profiles", "Folder of operator tables.")

Floats = np.ndarray  # float64 [n]


@dataclass(frozen=True)
class Products:
    """[m, k] @ [k, n] in 16 bits."""

    m: Floats
    n: Floats
    k: Floats
    seconds: Floats


@dataclass(frozen=True)
class Elementwise:
    """Kernels that stream `num_bytes`."""

    num_bytes: Floats
    seconds: Floats


@dataclass(frozen=True)
class Decodes:
    """Decode attention of `rows` sequences of `kv` tokens each, head dim 128, 16 bits."""

    rows: Floats
    kv: Floats
    kv_heads: Floats
    seconds: Floats


@dataclass(frozen=True)
class Prefills:
    """Prefill attention of `rows` prompts of `tokens` new tokens after `start` cached ones, head dim 128, 16 bits."""

    rows: Floats
    start: Floats
    tokens: Floats
    heads: Floats
    seconds: Floats


@dataclass(frozen=True)
class Mixed:
    """Attention of one prompt's chunk and decode rows in one call, beside the same two alone."""

    prefill: Floats
    decode: Floats
    seconds: Floats


@dataclass(frozen=True)
class AllReduces:
    """All-reduces of `num_bytes` between `degree` devices."""

    degree: Floats
    num_bytes: Floats
    seconds: Floats


@dataclass(frozen=True)
class Tables:
    """What one source has of a device."""

    origin: str
    products: Products
    decodes: Decodes
    prefills: Prefills
    elementwise: Elementwise | None = None
    allreduces: AllReduces | None = None
    mixed: Mixed | None = None


def concatenate(parts: list[Any]) -> Any:
    """One table from several of the same kind."""
    kind = type(parts[0])
    return kind(*(np.concatenate([vars(part)[name] for part in parts]) for name in kind.__dataclass_fields__))


def read_csv(path: Path) -> dict[str, Floats]:
    """The columns of a CSV that hold numbers throughout; empty cells are nan.

    Raises:
      ConfigError: no such file.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}") from None
    columns = {}
    for name, cells in zip(rows[0], zip(*rows[1:], strict=True), strict=True):
        try:
            columns[name] = np.array([float(cell or "nan") for cell in cells])
        except ValueError:
            continue  # words
    return columns


def read_parquet(path: Path) -> dict[str, np.ndarray]:
    """The columns of a parquet file.

    Raises:
      ConfigError: pyarrow is not installed, or no such file.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ConfigError(f"{path.name} is in parquet: install pyarrow to read it") from None
    try:
        table = parquet.read_table(path)
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e}") from None
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def vidur_products(root: Path, device: str = "a100") -> list[Products]:
    """The four products of a layer in vidur's `mlp.csv` files: one table each, over all models and degrees, with the
    same rows in the same order, so that they add up to layers."""
    parts: list[list[Products]] = [[], [], [], []]
    for path in sorted((root / "vidur/compute" / device).glob("*/*/mlp.csv")):
        t = read_csv(path)
        tokens, split, width, ffn = (
            t[name] for name in ("num_tokens", "num_tensor_parallel_workers", "n_embd", "n_expanded_embd")
        )
        heads, kv_heads, dim = t["n_head"], np.maximum(t["n_kv_head"], split), width / t["n_head"]
        shapes = {
            "attn_pre_proj": ((heads + 2 * kv_heads) * dim / split, width),
            "attn_post_proj": (width, heads * dim / split),
            "mlp_up_proj": (2 * ffn / split, width),
            "mlp_down_proj": (width, ffn / split),
        }
        for part, (op, (n, k)) in zip(parts, shapes.items(), strict=True):
            part.append(Products(tokens, n, k, t[f"time_stats.{op}.median"] * 1e-3))
    if not parts[0]:
        raise ConfigError(f"no mlp.csv under {root / 'vidur/compute' / device}")
    return [concatenate(part) for part in parts]


def vidur_elementwise(root: Path, device: str = "a100") -> Elementwise:
    """Norms, rope, activation and residual addition of the same files."""
    parts = []
    for path in sorted((root / "vidur/compute" / device).glob("*/*/mlp.csv")):
        t = read_csv(path)
        tokens, split, width = t["num_tokens"], t["num_tensor_parallel_workers"], t["n_embd"]
        rotated = width * (1 + np.maximum(t["n_kv_head"], split) / t["n_head"]) / split
        elements = {
            "input_layernorm": 2 * width,
            "attn_rope": 2 * rotated,
            "mlp_act": 3 * t["n_expanded_embd"] / split,
            "add": 3 * width,
        }
        parts += [Elementwise(2 * tokens * n, t[f"time_stats.{op}.median"] * 1e-3) for op, n in elements.items()]
    return concatenate(parts)


def read_vidur(root: Path) -> Tables:
    """An A100 as vidur measured it (eager kernels of 2024)."""
    t = read_csv(root / "vidur/history/attention_a100_tp2_8192x64q8kv.csv")
    decoding = np.isfinite(t["time_stats.attn_decode.median"])
    d, p = ({name: column[rows] for name, column in t.items()} for rows in (decoding, ~decoding))
    heads, kv_heads = (
        d["n_q_head"] / d["num_tensor_parallel_workers"],
        d["n_kv_head"] / d["num_tensor_parallel_workers"],
    )
    chunk = p["prefill_chunk_size"]
    r = read_csv(root / "vidur/network/a100_dgx/all_reduce.csv")
    near = (r["devices_per_node"] == r["num_workers"]) & (r["num_workers"] <= 8)
    return Tables(
        "vidur 7d47513, A100 tables",
        concatenate(vidur_products(root)),
        Decodes(d["batch_size"], d["kv_cache_size"], kv_heads, d["time_stats.attn_decode.median"] * 1e-3),
        Prefills(
            p["batch_size"],
            p["kv_cache_size"],
            chunk,
            np.full(len(chunk), heads[0]),
            p["time_stats.attn_prefill.median"] * 1e-3,
        ),
        vidur_elementwise(root),
        AllReduces(r["num_workers"][near], r["size"][near], r["time_stats.all_reduce.median"][near] * 1e-3),
    )


def read_aiconfigurator(root: Path, system: str, version: str, comm_version: str) -> Tables:
    """A GPU under a vLLM version as aiconfigurator measured it (kernels in CUDA graphs)."""
    folder = root / "aiconfigurator" / system
    g = read_parquet(folder / f"gemm/vllm/{version}/gemm_perf.parquet")
    kept = (g["gemm_dtype"] == "bfloat16") & (g["n"] >= 1024) & (g["k"] >= 1024) & (g["m"] <= 16384)
    products = Products(*(g[name][kept].astype(float) for name in ("m", "n", "k")), g["latency"][kept] * 1e-3)
    prefill = _attention(folder / f"attention/vllm/{version}/context_attention_perf.parquet")
    decode = _attention(folder / f"attention/vllm/{version}/generation_attention_perf.parquet")
    r = read_parquet(folder / f"comm/vllm/{comm_version}/custom_allreduce_perf.parquet")
    graph = r["backend"] == "vllm_graph"
    return Tables(
        f"aiconfigurator 095f58a, {system} vLLM {version} tables",
        products,
        Decodes(
            decode["batch_size"],
            decode["isl"] + decode["step"],
            decode["num_key_value_heads"],
            decode["latency"] * 1e-3,
        ),
        Prefills(
            prefill["batch_size"], prefill["step"], prefill["isl"], prefill["num_heads"], prefill["latency"] * 1e-3
        ),
        allreduces=AllReduces(
            r["num_gpus"][graph].astype(float),
            2.0 * r["message_size"][graph],  # elements of 16 bits
            r["latency"][graph] * 1e-3,
        ),
    )


def _attention(path: Path) -> dict[str, Floats]:
    """Rows of 16 bits, head dim 128, at least 8 query heads, no window."""
    t = read_parquet(path)
    kept = (t["attn_dtype"] == "bfloat16") & (t["kv_cache_dtype"] == "bfloat16") & (t["head_dim"] == 128)
    kept &= t["num_heads"] >= 8
    if "window_size" in t:
        kept &= t["window_size"] == 0
    names = ("batch_size", "isl", "step", "num_heads", "num_key_value_heads", "latency")
    return {name: t[name][kept].astype(float) for name in names}


LLAMA3_8B = {  # op of LLMServingSim's tables: (n, k)
    "qkv_proj": (6144, 4096),
    "q_proj": (4096, 4096),
    "o_proj": (4096, 4096),
    "gate_up_proj": (28672, 4096),
    "gate_proj": (14336, 4096),
    "up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}
STREAMED = {"layernorm": 4 * 4096, "rotary_emb": 2 * 5120, "act_fn": 3 * 14336}  # elements per token


def read_llmservingsim(root: Path, device: str) -> Tables:
    """An RTX4090 (vLLM 0.19, eager kernels) or a TPU-v6e-1 with Llama-3.1-8B as LLMServingSim profiled it."""
    folder = root / "llmservingsim" / device
    if device == "RTX4090":
        ops = _by_op(folder / "tp1/dense.csv", "layer", "tokens", "time_us", 1e-6)
        a = read_csv(folder / "tp1/attention.csv")
        chunk, start, rows, kv, seconds = (
            a[name] for name in ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")
        )
        d, p, scale = chunk == 0, rows == 0, 1e-6
        mixed = _mixed(chunk, start, rows, kv, seconds * scale)
    else:
        ops = _by_op(folder / "layers.csv", "layer_name", "input", "latency(ns)", 1e-9)
        a = read_csv(folder / "attention.csv")
        chunk, start, rows, seconds = (
            a[name] for name in ("prefill_chunk_size", "kv_cache_size", "batch_size", "p50_ns")
        )
        d, p, kv, scale, mixed = chunk == 0, chunk > 0, start, 1e-9, None
    products = [
        Products(tokens, np.full(len(tokens), float(n)), np.full(len(tokens), float(k)), times)
        for op, (n, k) in LLAMA3_8B.items()
        for tokens, times in [ops.get(op, (np.empty(0), np.empty(0)))]
    ]
    streamed = [Elementwise(2 * n * ops[op][0], ops[op][1]) for op, n in STREAMED.items() if op in ops]
    return Tables(
        f"LLMServingSim 5daddb2, {device} tables",
        concatenate(products),
        Decodes(rows[d], kv[d], np.full(d.sum(), 8.0), seconds[d] * scale),
        Prefills(np.ones(p.sum()), start[p], chunk[p], np.full(p.sum(), 32.0), seconds[p] * scale),
        concatenate(streamed) if device == "RTX4090" else None,  # on the TPU, XLA fuses them
        mixed=mixed,
    )


def _mixed(chunk: Floats, start: Floats, rows: Floats, kv: Floats, seconds: Floats) -> Mixed:
    """The calls that do both, with the times of their halves."""
    calls = list(zip(chunk, start, rows, kv, seconds, strict=True))
    prefill = {(c, s): t for c, s, r, _, t in calls if r == 0}
    decode = {(r, v): t for c, _, r, v, t in calls if c == 0}
    both = [(prefill[c, s], decode[r, v], t) for c, s, r, v, t in calls if (c, s) in prefill and (r, v) in decode]
    return Mixed(*np.array(both).T)


def _by_op(path: Path, op: str, tokens: str, time: str, scale: float) -> dict[str, tuple[Floats, Floats]]:
    """Tokens and seconds by the name in column `op`."""
    found: dict[str, list[tuple[float, float]]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row[op] != op:  # some files repeat their header
                    found.setdefault(row[op], []).append((float(row[tokens]), float(row[time]) * scale))
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}") from None
    return {name: (np.array(pairs)[:, 0], np.array(pairs)[:, 1]) for name, pairs in found.items()}

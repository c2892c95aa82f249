"""Fits the constants of a kernel stack to measured operator times.

    python -m experiments.fit_device --operators=vidur
    python -m experiments.fit_device --operators=aiconfigurator --accelerator=h100        (needs pyarrow)

`--profiles` is a folder of operator tables (`operator_tables.py` says which). Each op is fitted by itself, with the
formulas of `engine/costmodel`, to the least mean absolute relative error; whole steps are never looked at. Prints a
table of the errors and the entries of a constants file; what no table tells (elementwise kernels inside graphs, the
host, skew) is left to an estimate.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import flags

from engine.costmodel.device import Hardware, load_hardware
from engine.errors import ConfigError
from experiments import common_flags
from experiments.operator_tables import (
    PROFILES,
    AllReduces,
    Decodes,
    Elementwise,
    Floats,
    Mixed,
    Prefills,
    Products,
    Tables,
    read_aiconfigurator,
    read_llmservingsim,
    read_vidur,
)
from experiments.tables import format_table

SOURCES = ("aiconfigurator", "vidur", "llmservingsim")
SOURCE = flags.DEFINE_enum("operators", "vidur", SOURCES, "Where the operator times come from.")
DEVICE = flags.DEFINE_string("accelerator", "a100", "A registered device that the source has, or a device file.")

AICONFIGURATOR = {  # system, vLLM version of the kernels and of the all-reduce
    "a100": ("a100_sxm", "0.14.0", "0.14.0"),
    "h100": ("h100_sxm", "0.24.0", "0.24.0"),
    "l40s": ("l40s", "0.24.0", "0.14.0"),
}
LLMSERVINGSIM = {"rtx4090": "RTX4090", "tpu-v6e": "TPU-v6e-1"}
CACHES_MIB = {"l40s": 96, "rtx4090": 72}  # tables of these have KV that a kernel finds in the last cache
HEAD_DIM, WIDTH = 128, 2
STEPS = (1.3, 1.1, 1.03, 1.01, 1.003, 1.001)  # factors by which a constant is moved, one after the other


@dataclass(frozen=True)
class Fit:
    """Constants of one op, and how well they predict its times."""

    op: str
    values: dict[str, float | dict[str, float]]
    rows: int
    mape: float
    median: float


def minimize(
    predict: Callable[[Floats], Floats], start: list[float], seconds: Floats, power: int = 1
) -> tuple[Floats, Floats]:
    """Moves constants, alone and together, by ever smaller factors while the mean |relative error| ** `power` falls.

    Returns the constants (positive, like `start`) and the absolute relative errors.
    """

    def errors(x: Floats) -> Floats:
        return np.abs(predict(x) / seconds - 1)

    best = np.array(start, float)
    least = (errors(best) ** power).mean()
    for factor in STEPS:
        moves = [np.array(move) for move in itertools.product((1, factor, 1 / factor), repeat=len(start))]
        moved = True
        while moved:
            moved = False
            for move in moves:
                if (mean := (errors(best * move) ** power).mean()) < least - 1e-9:
                    best, least, moved = best * move, mean, True
    return best, errors(best)


def _fit(op: str, names: list[str], predict: Callable[[Floats], Floats], start: list[float], seconds: Floats) -> Fit:
    x, errors = minimize(predict, start, seconds)
    values = {name: rounded(value) for name, value in zip(names, x, strict=True)}
    return Fit(op, dict(values), len(seconds), float(errors.mean()), float(np.median(errors)))


def rounded(value: float) -> float:
    """Three digits; what has been driven to nothing is 0."""
    return float(f"{value:.3g}") if value > 1e-3 else 0.0


def fit_products(t: Products, hardware: Hardware) -> Fit:
    """max(FLOPs / rate, bytes / bandwidth) + launch."""
    flops, num_bytes = 2 * t.m * t.n * t.k, WIDTH * (t.m * t.k + t.k * t.n + t.m * t.n)
    ideal = flops / (hardware.bf16_tflops * 1e12), num_bytes / (hardware.memory_gbs * 1e9)
    return _fit(
        "products",
        ["eff_gemm", "eff_gemm_bw", "t0_gemm_us"],
        lambda x: np.maximum(ideal[0] / x[0], ideal[1] / x[1]) + x[2] * 1e-6,
        [0.8, 0.8, 4.0],
        t.seconds,
    )


def fit_elementwise(t: Elementwise, hardware: Hardware) -> Fit:
    """bytes / bandwidth + launch."""
    ideal = t.num_bytes / (hardware.memory_gbs * 1e9)
    names = ["eff_elementwise_bw", "t0_elementwise_us"]
    return _fit("elementwise", names, lambda x: ideal / x[0] + x[1] * 1e-6, [0.8, 2.0], t.seconds)


def fit_decodes(t: Decodes, hardware: Hardware, cache_mib: float) -> Fit:
    """(tokens + edge) of each row / bandwidth + launch; without what only the last cache has read."""
    token_bytes = 2 * t.kv_heads * HEAD_DIM * WIDTH
    num_bytes = t.rows * t.kv * token_bytes
    kept = (num_bytes > cache_mib * 2**20) | (num_bytes < 1e6)
    ideal = num_bytes[kept] / (hardware.memory_gbs * 1e9), (t.rows * token_bytes)[kept] / (hardware.memory_gbs * 1e9)
    return _fit(
        "decode attention",
        ["eff_attn_decode_bw", "t0_attn_us", "edge_decode_tokens"],
        lambda x: (ideal[0] + ideal[1] * x[2]) / x[0] + x[1] * 1e-6,
        [0.8, 6.0, 50.0],
        t.seconds[kept],
    )


def fit_prefills(t: Prefills, hardware: Hardware, t0_us: float) -> Fit:
    """(pairs + edge of each query) / rate + the launch time of decode attention; chunks of at least 256 tokens."""
    kept = t.tokens >= 256  # shorter chunks leave most of a device idle, which no constant says
    pair = (4 * t.heads * HEAD_DIM / (hardware.bf16_tflops * 1e12) * t.rows)[kept]
    start, tokens = t.start[kept], t.tokens[kept]
    pairs, queries = pair * (tokens * start + tokens * (tokens + 1) / 2), pair * tokens
    return _fit(
        "prefill attention",
        ["eff_attn_prefill", "edge_prefill_tokens"],
        lambda x: (pairs + queries * x[1]) / x[0] + t0_us * 1e-6,
        [0.5, 100.0],
        t.seconds[kept],
    )


def fit_mixed(t: Mixed) -> Fit:
    """Prefill + a factor of decode."""
    return _fit("mixed attention", ["mixed_decode"], lambda x: t.prefill + t.decode * x[0], [1.0], t.seconds)


def fit_allreduces(t: AllReduces) -> Fit:
    """2 (n - 1) / n bytes / bus bandwidth + launch, by number of devices."""
    bandwidth, launch, errors = {}, {}, []
    for degree in (2, 4, 8):
        of = t.degree == degree
        crossing = 2 * (degree - 1) / degree * t.num_bytes[of]
        x, e = minimize(lambda x, c=crossing: c / (x[0] * 1e9) + x[1] * 1e-6, [100.0, 5.0], t.seconds[of])
        bandwidth[str(degree)], launch[str(degree)] = (rounded(value) for value in x)
        errors.append(e)
    e = np.concatenate(errors)
    values = {"allreduce_busbw_gbs": bandwidth, "t0_allreduce_us": launch}
    return Fit("all-reduce", dict(values), len(e), float(e.mean()), float(np.median(e)))


def fit(tables: Tables, hardware: Hardware, cache_mib: float) -> list[Fit]:
    """Every op that the tables have."""
    decodes = fit_decodes(tables.decodes, hardware, cache_mib)
    t0 = decodes.values["t0_attn_us"]
    assert isinstance(t0, float)
    fits = [fit_products(tables.products, hardware), decodes, fit_prefills(tables.prefills, hardware, t0)]
    if tables.elementwise is not None:
        fits.append(fit_elementwise(tables.elementwise, hardware))
    if tables.mixed is not None:
        fits.append(fit_mixed(tables.mixed))
    if tables.allreduces is not None:
        fits.append(fit_allreduces(tables.allreduces))
    return fits


def read(root: Path, source: str, device: str) -> Tables:
    """The tables of a device.

    Raises:
      ConfigError: the source does not have it (lists what it has), or its files cannot be read.
    """
    known = {"vidur": {"a100": ""}, "aiconfigurator": AICONFIGURATOR, "llmservingsim": LLMSERVINGSIM}[source]
    if device not in known:
        raise ConfigError(f"source {source} has no device {device!r}; it has {', '.join(known)}")
    if source == "vidur":
        return read_vidur(root)
    if source == "aiconfigurator":
        return read_aiconfigurator(root, *AICONFIGURATOR[device])
    return read_llmservingsim(root, LLMSERVINGSIM[device])


def main() -> int:
    """The program."""
    tables = read(Path(PROFILES.value), SOURCE.value, DEVICE.value)
    fits = fit(tables, load_hardware(DEVICE.value), CACHES_MIB.get(DEVICE.value, 0))
    rows = [(f.op, f.rows, f"{f.mape:.1%}", f"{f.median:.1%}") for f in fits]
    print(format_table(("op", "rows", "MAPE", "median error"), rows))
    entries = {name: value for f in fits for name, value in f.values.items()}
    print(json.dumps({n: {"value": v, "kind": "fitted", "source": tables.origin} for n, v in entries.items()}))
    return 0


if __name__ == "__main__":
    common_flags.run_main(main, engine=False)

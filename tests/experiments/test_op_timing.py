"""Constants are found again from times that were made with them."""

import numpy as np
import pytest

from engine.config import DTYPES
from engine.costmodel.attention import kv_token_bytes, pair_flops
from engine.costmodel.roofline import Shard
from engine.presets import PRESETS
from experiments.op_timing import Op, fit, fit_products, least_squares
from experiments.step_timing import Samples

MODEL = PRESETS["small-20m"]
TRUE = {
    "fp32_tflops": 0.1, "bf16_tflops": 0.02, "memory_gbs": 20.0, "link_out_gbs": 4.0, "link_in_gbs": 8.0,
    "link_gbs": 2 / (1 / 4 + 1 / 8), "link_latency_us": 300.0, "eff_gemm": 1.0, "eff_gemm_bw": 0.9, "t0_gemm_us": 30.0,
    "eff_attn_prefill": 0.5, "edge_prefill_tokens": 100.0, "eff_attn_decode_bw": 0.4, "edge_decode_tokens": 5.0,
    "t0_attn_us": 90.0, "eff_elementwise_bw": 1.2, "t0_elementwise_us": 8.0,
}  # fmt: skip


def timed(name: str, seconds: float, **work: float) -> tuple[Op, Samples]:
    return Op(name, lambda: None, [()], work), Samples([seconds * 0.9, seconds, seconds * 1.3])


def made() -> list[tuple[Op, Samples]]:
    """Times by the formulas of `engine/costmodel`, noise around them."""
    t, shard = TRUE, Shard.of(MODEL, 1)
    peak, memory = t["fp32_tflops"] * 1e12, t["memory_gbs"] * 1e9
    pair, token = pair_flops(MODEL, shard) / peak / 0.5, kv_token_bytes(MODEL, shard) / memory / 0.4
    rows = [timed("stream", 2e8 / memory, bytes=2e8), timed("product_16bit", 2e9 / 0.02e12, flops=2e9)]
    for m in (1, 8, 64, 1024):
        for k, n in ((384, 640), (384, 2304), (1152, 384)):
            flops, num_bytes = 2 * m * n * k, (m * k + k * n + m * n) * DTYPES[MODEL.dtype]
            roof = max(flops / peak, num_bytes / memory / 0.9)
            rows.append(timed("product", roof + 30e-6, flops=flops, bytes=num_bytes))
        rows.append(timed("elementwise", m * 4096 / memory / 1.2 + 8e-6, bytes=m * 4096))
    for b, kv in ((1, 64), (1, 1024), (8, 256), (32, 512)):
        rows.append(timed("decode_attention", 90e-6 + token * (b * kv + 5 * b), rows=b, kv=b * kv))
    for new, pairs in ((64, 2080), (64, 34848), (1024, 524800)):
        rows.append(timed("prefill_attention", 90e-6 + pair * (pairs + 100 * new), tokens=new, pairs=pairs))
    for size in (1e5, 1e7):
        rows += [timed(f"copy_{way}", 300e-6 + size / bw / 1e9, bytes=size) for way, bw in (("out", 4), ("in", 8))]
    return rows


def test_constants_are_found_again():
    ops, samples = zip(*made(), strict=True)
    assert fit(MODEL, 1, ops, samples) == pytest.approx(TRUE, rel=1e-6)


def test_a_16_bit_model_has_its_own_peak():
    ops, samples = zip(*made(), strict=True)
    found = fit(MODEL.replace(dtype="bfloat16"), 1, ops, samples)
    assert "fp32_tflops" not in found and found["bf16_tflops"] == pytest.approx(0.1)


def test_least_squares_are_relative_and_never_negative():
    """An intercept that would be negative is left out: the best slope through 0 in relative terms is sum r / sum r^2
    with r = x / y."""
    x, y = np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 7.0])
    slope, intercept = least_squares([x, np.ones(3)], y)
    r = x / y
    assert slope == pytest.approx(r.sum() / (r**2).sum()) and 0 <= intercept < 1e-20


def test_products_on_one_side_of_the_roof():
    """Without a product bound by memory the bandwidth is only bounded; FLOPs are found all the same."""
    flops = np.array([1e9, 2e9, 4e9])
    per_flop, _, launch = fit_products(flops, np.ones(3), flops / 1e11 + 1e-5)
    assert per_flop == pytest.approx(1e-11) and launch == pytest.approx(1e-5)

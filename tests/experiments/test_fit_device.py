"""Fitting: constants that made the times are found again, and sources that cannot be read are said so."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.costmodel.device import load_device, load_hardware
from engine.costmodel.paper_kernels import load_kernels
from engine.errors import ConfigError
from experiments import fit_paper_kernels
from experiments.fit_device import (
    CACHES_MIB,
    fit,
    fit_allreduces,
    fit_decodes,
    fit_mixed,
    fit_prefills,
    fit_products,
    minimize,
    read,
)
from experiments.operator_tables import AllReduces, Decodes, Mixed, Prefills, Products

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
RNG = np.random.default_rng(0)
H100 = load_hardware("h100")


def noisy(seconds: np.ndarray) -> np.ndarray:
    """Times with 1% of noise."""
    return seconds * (1 + 0.01 * RNG.standard_normal(len(seconds)))


def test_a_valley_between_two_constants():
    """One large and one small constant of a sum, far from where they start."""
    x = np.linspace(1, 100, 50)
    found, errors = minimize(lambda c: c[0] * x + c[1], [1.0, 1.0], 0.01 * x + 30)
    assert found == pytest.approx([0.01, 30], rel=0.05) and errors.max() < 0.01


def test_products():
    """0.8 of the peak, 0.7 of the bandwidth, 5 us."""
    m, n, k = (2.0 ** RNG.integers(low, high, 400) for low, high in ((0, 14), (10, 15), (10, 15)))
    seconds = np.maximum(2 * m * n * k / (989e12 * 0.8), 2 * (m * k + k * n + m * n) / (3350e9 * 0.7)) + 5e-6
    values = fit_products(Products(m, n, k, noisy(seconds)), H100).values
    assert values["eff_gemm"] == pytest.approx(0.8, rel=0.02) and values["eff_gemm_bw"] == pytest.approx(0.7, rel=0.02)
    assert values["t0_gemm_us"] == pytest.approx(5, rel=0.1)


def test_attention():
    """Decode at 0.9 of the bandwidth with 100 tokens more a row; prefill at 0.6 of the peak, 300 keys more a query."""
    rows, kv = RNG.integers(1, 128, 300).astype(float), RNG.integers(1, 8192, 300).astype(float)
    seconds = rows * (kv + 100) * 4096 / (3350e9 * 0.9) + 8e-6
    decode = fit_decodes(Decodes(rows, kv, np.full(300, 8.0), noisy(seconds)), H100, 0).values
    expected = {"eff_attn_decode_bw": 0.9, "t0_attn_us": 8, "edge_decode_tokens": 100}
    assert decode == {name: pytest.approx(value, rel=0.05) for name, value in expected.items()}
    tokens, start = RNG.integers(256, 8192, 300).astype(float), RNG.integers(0, 8192, 300).astype(float)
    pairs = tokens * start + tokens * (tokens + 1) / 2 + 300 * tokens
    seconds = 4 * 32 * 128 * pairs / (989e12 * 0.6) + 8e-6
    table = Prefills(np.ones(300), start, tokens, np.full(300, 32.0), noisy(seconds))
    values = fit_prefills(table, H100, 8.0).values
    assert values == {
        "eff_attn_prefill": pytest.approx(0.6, rel=0.02),
        "edge_prefill_tokens": pytest.approx(300, rel=0.05),
    }


def test_kv_in_the_last_cache_is_left_out():
    """Rows between 1 MB and the cache's size are read three times as fast: they do not count."""
    kv = np.array([16, 64, 128, 4096, 8192, 16384, 30_000, 60_000, 120_000, 240_000], float)
    cold = kv * 4096 / (3350e9 * 0.5) + 5e-6
    seconds = np.where((kv * 4096 > 1e6) & (kv * 4096 < 96 * 2**20), cold / 3, cold)
    table = Decodes(np.ones(10), kv, np.full(10, 8.0), seconds)
    values = fit_decodes(table, H100, 96).values
    assert values["eff_attn_decode_bw"] == pytest.approx(0.5, rel=0.01)


def test_mixed_and_all_reduces():
    """Decode beside prefill takes 1.8 times; 2, 4 and 8 devices each have a bandwidth and a launch time."""
    prefill, decode = RNG.random(50) * 1e-4, RNG.random(50) * 1e-4
    assert fit_mixed(Mixed(prefill, decode, prefill + 1.8 * decode)).values["mixed_decode"] == pytest.approx(
        1.8, rel=0.01
    )
    degree, size = np.repeat([2.0, 4.0, 8.0], 12), np.tile(2.0 ** np.arange(10, 22), 3)
    seconds = 2 * (degree - 1) / degree * size / (degree * 10e9) + degree * 1e-6
    values = fit_allreduces(AllReduces(degree, size, noisy(seconds))).values
    assert values["allreduce_busbw_gbs"] == {str(n): pytest.approx(10 * n, rel=0.05) for n in (2, 4, 8)}
    assert values["t0_allreduce_us"] == {str(n): pytest.approx(n, rel=0.05) for n in (2, 4, 8)}


def test_sources_that_cannot_be_read(tmp_path, monkeypatch):
    """One line: what a source has, what is missing, what to install."""
    with pytest.raises(ConfigError, match=r"source vidur has no device 'h100'; it has a100"):
        read(tmp_path, "vidur", "h100")
    with pytest.raises(ConfigError, match=r"attention_a100_tp2_8192x64q8kv.csv cannot be read: No such file"):
        read(tmp_path, "vidur", "a100")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"gemm_perf.parquet is in parquet: install pyarrow to read it"):
        read(tmp_path, "aiconfigurator", "h100")


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/profiles")
@pytest.mark.parametrize(
    "source, device, stack", [("vidur", "a100", "vidur-2024"), ("llmservingsim", "rtx4090", "vllm-0.19")]
)
def test_the_packaged_constants_are_those_of_this_program(source, device, stack):
    """Every value that says it was fitted to these tables."""
    profile, tables = load_device(device, stack), read(SHARED / "profiles", source, device)
    fitted = {k: v for f in fit(tables, profile.hardware, CACHES_MIB.get(device, 0)) for k, v in f.values.items()}
    packaged = vars(profile.constants)
    assert set(fitted) == {n for n, o in profile.provenance.items() if o.kind == "fitted" and o.source == tables.origin}
    assert fitted == {name: pytest.approx(packaged[name], rel=0.01) for name in fitted}


def test_the_packaged_kernels_are_those_of_their_program():
    """As fitted to the vTensor paper's figures: decode to the batch sweep alone, so that the others are predictions."""
    figures = json.loads((ROOT / "experiments/published/vtensor.json").read_text())["figures"]
    figures["fig7"]["panels"] = {"batch": figures["fig7"]["panels"]["batch"]}
    for name, fitted in fit_paper_kernels.fit(figures, load_device("a100")).items():
        kernels, provenance = load_kernels(name)
        assert fitted == {key: pytest.approx(getattr(kernels, key), rel=0.01) for key in fitted}
        assert set(fitted) == {key for key, origin in provenance.items() if origin.kind == "fitted"}

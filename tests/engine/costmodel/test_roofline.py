"""Dense ops by hand on a device with round numbers."""

import pytest

from engine.costmodel.roofline import DenseOps, Shard
from engine.costmodel.tables import OpTables
from engine.errors import ConfigError
from engine.presets import PRESETS, preset
from tests.engine.costmodel.device_files import MODEL, profile

US = 1e-6


def ops(tmp_path, tensor=1, model=MODEL, **changes) -> DenseOps:
    return DenseOps(model, profile(tmp_path, **changes), tensor, OpTables())


def test_a_product_bound_by_bandwidth_and_one_by_compute(tmp_path):
    """One row reads 2 (1024 + 1024^2 + 1024) bytes at 800 GB/s; 4,096 take 2 * 4096 * 1024^2 FLOPs at 50 TFLOP/s."""
    product = ops(tmp_path).product
    assert product(1, 1024, 1024) == pytest.approx(2 * (2 * 1024 + 1024**2) / 800e9 + 3 * US)
    assert product(4096, 1024, 1024) == pytest.approx(2 * 4096 * 1024**2 / 50e12 + 3 * US)


def test_a_layer_is_the_sum_of_its_ops(tmp_path):
    """Five products' worth of shapes and five streaming kernels, 10 tokens, all bound by bandwidth."""
    t, m, f, qkv = 10, 1024, 2048, (8 + 2 * 4) * 128
    weights = [(qkv, m), (m, m), (2 * f, m), (m, f)]
    products = sum(2 * (t * k + k * n + t * n) / 800e9 + 3 * US for n, k in weights)
    streamed = 2 * t * (4 * m + 2 * (8 + 4) * 128 + 4 * m + 3 * f) / 800e9 + 4 * 2 * US
    assert ops(tmp_path).layer(t) == (pytest.approx(products + streamed), 0.0)
    qwen = ops(tmp_path, model=MODEL.replace(qk_norm=True)).layer(t)[0]
    assert qwen - products - streamed == pytest.approx(2 * t * 2 * (8 + 4) * 128 / 800e9 + 2 * US)


def test_all_reduces_of_a_layer(tmp_path):
    """Each of 2 devices moves 2 * 1/2 of [10, 1024] at 20 GB/s, each of 4 moves 2 * 3/4 at 10 GB/s; twice a layer."""
    for tensor, busy, launch in ((2, 10 * 1024 * 2 / 20e9, 5 * US), (4, 1.5 * 10 * 1024 * 2 / 10e9, 9 * US)):
        two = ops(tmp_path, tensor)
        assert two.allreduce(10) == (pytest.approx(busy + launch), pytest.approx(busy))
        assert two.layer(10)[1] == pytest.approx(2 * busy)


def test_before_and_after_the_layers(tmp_path):
    """Embedding rows are read and written; the head reads its share of the vocabulary, logits are gathered and read."""
    one, two = ops(tmp_path), ops(tmp_path, 2)
    assert one.embed(10) == pytest.approx(2 * 2 * 10 * 1024 / 800e9 + 2 * US)
    assert two.embed(10) == pytest.approx(one.embed(10) + two.allreduce(10)[0])
    head = 2 * (3 * 1024 + 1024 * 10_000 + 3 * 10_000) / 800e9 + 3 * US
    assert one.head(3) == pytest.approx(head + 4 * 3 * 10_000 / 800e9 + 2 * US) and one.head(0) == two.head(0) == 0
    half = 2 * (3 * 1024 + 1024 * 5_000 + 3 * 5_000) / 800e9 + 3 * US + 4 * 3 * 5_000 / 800e9 + 2 * US
    assert two.head(3) == pytest.approx(half + 2 * 3 * 10_000 / 2 / 20e9 + 5 * US)


def test_float32_is_twice_as_wide_and_takes_its_own_rate(tmp_path):
    """10 TFLOP/s at half of the peak."""
    wide = ops(tmp_path, model=MODEL.replace(dtype="float32"))
    assert wide.product(1, 1024, 1024) == pytest.approx(4 * (2 * 1024 + 1024**2) / 800e9 + 3 * US)
    assert wide.product(4096, 1024, 1024) == pytest.approx(2 * 4096 * 1024**2 / 5e12 + 3 * US)


def test_shards():
    """Heads, ffn and vocabulary are split; kv heads repeat when there are more devices."""
    assert Shard.of(preset("llama3.1-70b"), 4) == Shard(16, 2, 7168, 32064)
    assert Shard.of(preset("yi-6b-200k"), 8) == Shard(4, 1, 1376, 8000)
    for model in PRESETS.values():
        assert Shard.of(model, 1) == Shard(model.num_heads, model.num_kv_heads, model.ffn_size, model.vocab_size)


@pytest.mark.parametrize(
    "tensor, change, message",
    [
        (3, {}, "round: 8 heads and 4 kv heads do not divide over tensor=3 devices"),
        (8, {"num_kv_heads": 4, "ffn_size": 2044}, "round: ffn_size=2044 is not a multiple of tensor=8"),
        (0, {}, "tensor must be >= 1, got 0"),
    ],
)
def test_models_that_do_not_divide(tensor, change, message):
    """One line."""
    with pytest.raises(ConfigError, match=message):
        Shard.of(MODEL.replace(**change), tensor)

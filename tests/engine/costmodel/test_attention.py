"""Attention in coefficients: by hand, against counted pairs, and against many short layers for windows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.costmodel.attention import (
    LinearDecode,
    PairwisePrefill,
    WindowedDecode,
    layer_windows,
    pairs,
    stack_attention,
)
from engine.costmodel.roofline import Shard
from tests.engine.costmodel.device_files import MODEL, profile

lengths = st.integers(1, 300)
windows = st.one_of(st.none(), st.integers(1, 300))


def test_decode_by_hand(tmp_path):
    """Rows of 100 and 300 tokens, 2,048 bytes each at 500 GB/s, 10 tokens more a row, 0.1 of the way to the longest."""
    decode, _ = stack_attention(MODEL, profile(tmp_path, edge_decode_tokens=10, skew_alpha=0.1), Shard.of(MODEL, 1))
    tokens = 400 + 2 * 10 + 0.1 * (2 * 300 - 400)
    assert decode.seconds(2, 400, 300) == pytest.approx(7e-6 + tokens * 2048 / 500e9)


def test_prefill_by_hand(tmp_path):
    """100 new tokens after 50: 100 * 50 + 5,050 pairs and 20 more for each query, 4,096 FLOPs each at 25 TFLOP/s."""
    _, prefill = stack_attention(MODEL, profile(tmp_path, edge_prefill_tokens=20), Shard.of(MODEL, 1))
    one = (100 * 50 + 5050 + 20 * 100) * 4096 / 25e12
    two = (5050 + 20 * 100) * 4096 / 25e12
    assert prefill.seconds(((50, 100), (0, 100))) == pytest.approx(7e-6 + one + two)


def test_a_short_chunk_reads_its_prefix(tmp_path):
    """One token after 20,000 is bound by 2,048 bytes of each at 500 GB/s; in a window, of those in it."""
    _, prefill = stack_attention(MODEL, profile(tmp_path), Shard.of(MODEL, 1))
    assert prefill.seconds(((20_000, 1),)) == pytest.approx(7e-6 + 20_001 * 2048 / 500e9)
    windowed = MODEL.replace(windows=(1000,) * 3)
    _, prefill = stack_attention(windowed, profile(tmp_path), Shard.of(windowed, 1))
    assert prefill.seconds(((20_000, 1),)) == pytest.approx(7e-6 + 1000 * 2048 / 500e9)


def test_devices_share_heads(tmp_path):
    """Four devices have a quarter of the pairs and of the KV each; eight, for 4 kv heads, a quarter of the KV still."""
    one, four = (stack_attention(MODEL, profile(tmp_path), Shard.of(MODEL, n)) for n in (1, 4))
    assert four[0].per_token == pytest.approx(one[0].per_token / 4)
    assert four[1].per_pair == pytest.approx(one[1].per_pair / 4)
    eight = stack_attention(MODEL, profile(tmp_path), Shard.of(MODEL, 8))
    assert eight[0].per_token == four[0].per_token  # 4 kv heads: two devices share one


def test_the_chain_of_the_longest_row():
    """It bounds a batch that more bandwidth would not make faster."""
    decode = LinearDecode(1.0, 0.001, serial_per_token=0.1)
    assert decode.seconds(2, 200, 100) == 11.0 and decode.seconds(400, 40_000, 100) == 41.0


@given(lengths, windows)
def test_pairs_are_counted(tokens, window):
    """Each query sees itself and what is before it, as far as the window goes."""
    assert pairs(tokens, window) == sum(min(i + 1, window or tokens) for i in range(tokens))


@given(st.integers(0, 300), lengths, windows, st.floats(0, 50))
def test_prefill_rates_of_their_own(start, tokens, window, edge):
    """A prompt with a prefix: pairs across and among new tokens at two rates, counted one by one; without: a third."""
    prefill = PairwisePrefill(5.0, 0.25, 2.0, 0.5, edge=edge, windows=((window, 1),))
    across = among = 0
    for i in range(tokens):
        seen = range(max(0, start + i + 1 - (window or start + tokens)), start + i + 1)
        across += sum(key < start for key in seen)
        among += sum(key >= start for key in seen)
    expected = 5.0 + across * 2.0 + (among + edge * tokens) * (0.5 if start else 0.25)
    assert prefill.seconds(((start, tokens),)) == pytest.approx(expected)


@given(st.lists(windows, min_size=1, max_size=6), lengths, st.integers(1, 8))
def test_windows_are_the_mean_of_their_layers(layers, kv, num):
    """Equal rows: each layer by itself, then the mean."""
    decode = LinearDecode(1.0, 0.01, edge=3, serial_per_token=0.02)
    counted = layer_windows(MODEL.replace(num_layers=len(layers), windows=tuple(layers)))
    each = [decode.seconds(num, num * min(kv, w or kv), min(kv, w or kv)) for w in layers]
    assert WindowedDecode(decode, counted).seconds(num, num * kv, kv) == pytest.approx(np.mean(each))
    prefill = PairwisePrefill(1.0, 0.01, 0.01, 0.01, windows=counted)
    one = [PairwisePrefill(1.0, 0.01, 0.01, 0.01, windows=((w, 1),)).seconds(((5, kv),)) for w in layers]
    assert prefill.seconds(((5, kv),)) == pytest.approx(np.mean(one))

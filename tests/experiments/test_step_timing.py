"""Which batches are timed: they fill their bucket, fit the pool, and there is a curve for each."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.config import cdiv
from engine.errors import ConfigError
from engine.executor.packing import Packer
from experiments.step_timing import Point, Samples, attended, points_of

PAGE = 16


@given(
    st.integers(2, 40), st.sampled_from([8, 64]), st.sampled_from([1, 4, 16]), st.integers(1, 300), st.integers(1, 64)
)
def test_points_fill_their_bucket_and_fit(slots, tile, max_tiles, spare, context_pages):
    """The pool holds `spare` pages besides one that each sequence may waste."""
    packer, context = Packer(slots, tile, max_tiles, False), context_pages * PAGE
    try:
        points = {b: points_of(b, packer, spare * PAGE, context) for b in packer.buckets(mixed=True)}
    except ConfigError:
        assume(False)
    for bucket, of in points.items():
        for point in of:
            tiles = sum(len(packer.tile_ends(start, new)) for start, new in point.prefills)
            ((cut, rows, count),) = packer.cut(len(point.contexts), tiles)
            assert (cut, rows, count) == (bucket, len(point.contexts), bucket.tiles)
            lengths = [*point.contexts, *(start + new for start, new in point.prefills)]
            assert len(lengths) <= slots and min(lengths) >= 1 and max(lengths) <= context
            assert sum(cdiv(n, PAGE) for n in lengths) <= spare + slots
        curve = [attended(p, packer) for p in of if not p.skewed]
        assert sorted(set(curve)) == curve, "points of one curve"


def test_points_by_hand():
    """32 slots, 2,000 tokens of pool, prompts up to 1,024: 16 tiles of 64 tokens are 16 prompts of one tile, or one
    prompt; only 0 tokens can come before a prompt of 1,024."""
    packer = Packer(32, 64, 16, False)
    by_key = {(b.rows, b.tiles): points_of(b, packer, 2000, 1024) for b in packer.buckets(mixed=True)}
    assert by_key[0, 16] == [Point((), ((0, 64),) * 16), Point((), ((0, 1024),))]
    assert by_key[0, 1] == [Point((), ((0, 64),)), Point((), ((960, 64),))]
    assert by_key[4, 0][:4] == [Point((n,) * 4) for n in (16, 125, 250, 500)]
    assert by_key[4, 0][4:] == [Point((n, 16, 16, 16), skewed=True) for n in (128, 256, 512, 1024)]
    assert by_key[32, 0][-1] == Point((1024, *(16,) * 31), skewed=True) and by_key[1, 0][-1] == Point((1024,))
    assert by_key[32, 1] == [Point((16,) * 16, ((0, 64),)), Point((16,) * 16, ((960, 64),))]
    assert attended(by_key[0, 16][0], packer) == 16 * 64
    assert attended(by_key[0, 16][1], packer) == 64 * (16 * 17 // 2)


def test_a_pool_that_cannot_fill_a_bucket_is_one_line():
    packer = Packer(4, 64, 16, False)
    with pytest.raises(ConfigError, match="16 query tiles of 64 tokens do not fit 1000 tokens of KV pool, 4 slots"):
        [points_of(b, packer, 1000, 4096) for b in packer.buckets(mixed=False)]
    with pytest.raises(ConfigError, match="the KV pool cannot hold 4 sequences"):
        points_of(packer.buckets(mixed=False)[2], packer, 3, 64)


def test_an_entry_has_median_count_and_spread():
    assert Samples([1.0, 2.0, 3.0, 4.0, 9.0]).entry() == {"seconds": 3.0, "count": 5, "spread": 0.667}

"""The xla backend: the shared suite, and what only it promises: results that do not depend on how work is laid out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import Heads, ints, place, queries, take_rows, tokens
from kernel_suite import HEADS, LAYOUTS, LENS, DecodeSuite, PrefillSuite, Suite, WriteSuite, jitted

from pallas_kernels import PagedView, decode_attention, prefill_attention

WIDE = [Heads(4, 4, 64), Heads(6, 2, 64), Heads(4, 2, 128)]  # models 256 to 512 wide
EVERYWHERE = [*LAYOUTS, (256, "paged"), (256, "run")]

XLA = Suite()


class TestDecode(DecodeSuite):
    pass


class TestPrefill(PrefillSuite):
    pass


class TestWrite(WriteSuite):
    pass


def decode(q, case, lens):
    return XLA.run(decode_attention, q, case.arena, case.view, ints(lens), sm_scale=0.125)


def prefill(q, case, rows, start, count):
    view = take_rows(case.view, rows)
    return XLA.run(prefill_attention, q, case.arena, view, ints(start), ints(count), sm_scale=0.125)[0]


def prompt(case, q, cuts, tiles, width, row=0):
    """Attention of a whole prompt, q [T, H, D], cut before each position in `cuts`, `tiles` query tiles a call."""
    out = np.full_like(q, np.nan)
    starts = np.array([0, *cuts])
    counts = np.diff([*starts, len(q)])
    for at in range(0, len(starts), tiles):
        group = slice(at, at + tiles)
        start, count = (np.zeros(tiles, int) for _ in range(2))
        start[: len(starts[group])], count[: len(starts[group])] = starts[group], counts[group]
        tile = np.full((tiles, width, *q.shape[1:]), 7.0, np.float32)  # junk in the rows that hold no query
        for t, (s, n) in enumerate(zip(start, count, strict=True)):
            tile[t, :n] = q[s : s + n]
        o = prefill(tile, case, [row] * tiles, start, count)
        for t, (s, n) in enumerate(zip(start, count, strict=True)):
            out[s : s + n] = o[t, :n] if n else out[s : s + n]
    return out


@pytest.mark.parametrize("rows", [3, len(LENS)])  # both KV tile sizes
def test_decode_is_bit_identical_between_views_and_page_sizes(rows):
    rng = np.random.default_rng(0)
    lens = LENS[-rows:]
    k, v = tokens(rng, lens, HEADS)
    q = queries(rng, rows, HEADS.h, HEADS.d)
    results = [decode(q, place(k, v, *layout), lens) for layout in EVERYWHERE]
    for o, lse in results[1:]:
        np.testing.assert_array_equal(o, results[0][0])
        np.testing.assert_array_equal(lse, results[0][1])


def test_decode_is_bit_identical_whatever_the_other_rows_hold():
    """As long as the longest row reaches into the same quarter of a tile: that decides how tokens are summed."""
    rng = np.random.default_rng(1)
    k, v = tokens(rng, (70, 5, 300), HEADS)
    other_k, other_v = tokens(rng, (120, 310), HEADS)
    q = queries(rng, 3, HEADS.h, HEADS.d)
    one = decode(q, place(k, v, 16, "paged"), (70, 5, 300))
    other = decode(q, place([k[0], *other_k], [v[0], *other_v], 16, "paged"), (70, 120, 310))
    np.testing.assert_array_equal(one[0][:1], other[0][:1])


@pytest.mark.parametrize("rows", [3, 8])  # both KV tile sizes
@pytest.mark.parametrize("longest", [1, 31, 32, 33, 64, 65, 96, 127, 128, 129, 192, 193, 255, 256, 257, 300])
def test_decode_sees_every_token_up_to_the_longest_row(rows, longest):
    """Lengths around the quarters of the last tile, against one sum over all tokens."""
    rng = np.random.default_rng(longest)
    lens = (longest, *(1 + i * longest // rows for i in range(rows - 1)))
    k, v = tokens(rng, lens, HEADS)
    q = queries(rng, rows, HEADS.h, HEADS.d)
    o, _ = decode(q, place(k, v, 16, "paged"), lens)
    for row, (keys, values) in enumerate(zip(k, v, strict=True)):
        s = np.einsum("kgd,tkd->kgt", np.asarray(q[row]).reshape(HEADS.k, -1, HEADS.d), keys) * HEADS.d**-0.5
        p = np.exp(s - s.max(-1, keepdims=True))
        want = np.einsum("kgt,tkd->kgd", p / p.sum(-1, keepdims=True), values).reshape(HEADS.h, HEADS.d)
        np.testing.assert_allclose(o[row], want, atol=1e-5)


def test_prefill_is_bit_identical_between_views_and_page_sizes():
    rng = np.random.default_rng(2)
    k, v = tokens(rng, PrefillSuite.LENS, HEADS)
    q = queries(rng, len(PrefillSuite.ROWS), 32, HEADS.h, HEADS.d)
    tiles = (PrefillSuite.ROWS, PrefillSuite.START, PrefillSuite.COUNT)
    results = [prefill(q, place(k, v, *layout), *tiles) for layout in EVERYWHERE]
    for o in results[1:]:
        np.testing.assert_array_equal(o, results[0])


@pytest.mark.parametrize("width", [8, 64])
@pytest.mark.parametrize("heads", WIDE, ids=str)
def test_prefill_is_bit_identical_however_the_prompt_is_cut(heads, width):
    """Whole tiles, ragged chunks, other sequences beside it, and single queries as deterministic decode runs them."""
    rng = np.random.default_rng(3)
    length, tiles = 200, 4
    case = place(*tokens(rng, (length, 170), heads), 16, "paged")
    q = queries(rng, length, heads.h, heads.d)
    whole = prompt(case, q, range(width, length, width), tiles, width)
    ragged = prompt(case, q, cuts(rng, length, width), tiles, width)
    np.testing.assert_array_equal(whole, ragged)
    for p in (0, 1, width - 1, 127, 128, 199):  # one valid query, in tile 2, beside another sequence's tiles
        tile = queries(rng, tiles, width, heads.h, heads.d)
        tile[2, 0] = q[p]
        o = prefill(tile, case, (1, 1, 0, 1), (0, 154, p, 77), (width, 16, 1, 0))
        np.testing.assert_array_equal(o[2, 0], whole[p])


def cuts(rng, length, width):
    """Random tile borders, no tile longer than `width`."""
    at, out = 0, []
    while (at := at + int(rng.integers(1, width + 1))) < length:
        out.append(at)
    return out


def test_layer_is_traced_and_picks_its_own_pages():
    rng = np.random.default_rng(4)
    k, v = tokens(rng, (40, 7), HEADS)
    case = place(k, v, 16, "paged")
    q = queries(rng, 2, HEADS.h, HEADS.d)
    right = decode(q, case, (40, 7))[0]
    swapped = PagedView(case.view.table[::-1], jnp.int32(0), case.view.rows)
    before = jitted(decode_attention)._cache_size()
    o, _ = XLA.run(decode_attention, q, case.arena, swapped, ints((40, 7)), sm_scale=0.125)
    np.testing.assert_array_equal(o, right)
    assert jitted(decode_attention)._cache_size() == before


def test_traced_scale_and_window_inside_a_layer_loop():
    """All options that may be traced, traced, in a scan over layers as an engine would write it."""
    rng = np.random.default_rng(5)
    case = place(*tokens(rng, (40, 7), HEADS), 16, "paged")
    q = jnp.asarray(queries(rng, 2, HEADS.h, HEADS.d))

    @jax.jit
    def layers(scale, windows):
        def layer(x, window):
            view = PagedView(case.view.table, jnp.int32(1), case.view.rows)
            return x + decode_attention(x, case.arena, view, ints((40, 7)), sm_scale=scale, window=window), None

        return jax.lax.scan(layer, q, windows)[0]

    want = q
    for window in (5, 100):
        want = want + decode_attention(want, case.arena, case.view, ints((40, 7)), sm_scale=0.125, window=window)
    np.testing.assert_allclose(layers(0.125, ints((5, 100))), want, rtol=1e-5, atol=1e-5)

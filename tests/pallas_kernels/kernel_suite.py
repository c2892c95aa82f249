"""The attention and KV-write tests that every backend must pass. Subclass with `backend` set."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import Heads, ints, place, queries, take_rows, tokens

from engine.config import DTYPES
from pallas_kernels import KVArena, KVSpec, decode_attention, prefill_attention, storage_dtype, write_kv
from pallas_kernels.decode_attention import reference as decode_reference
from pallas_kernels.prefill_attention import reference as prefill_reference

STATIC = ("soft_cap", "return_lse", "backend")
LENS = (0, 1, 15, 16, 63, 64, 65, 127, 128, 129, 200)  # around the borders of pages and KV tiles
HEADS = Heads(6, 2, 64)
SHAPES = (Heads(1, 1, 64), Heads(16, 1, 80), Heads(7, 1, 96), Heads(4, 4, 128), Heads(4, 2, 256))
LAYOUTS = [(s, kind) for s in (1, 16, 64, 128) for kind in ("paged", "run")]
HALVES = [name for name, size in DTYPES.items() if size == 2]
TOL = 1e-5  # float32, of values of order 1
NONE = {"window": None, "soft_cap": None}


@functools.cache
def jitted(function):
    return jax.jit(function, static_argnames=STATIC)


class Suite:
    """How a backend is called, and against what it is checked."""

    backend = "xla"
    jit = True

    def run(self, function, *args, return_lse=True, **options):
        call = jitted(function) if self.jit else function
        return jax.tree.map(np.asarray, call(*args, return_lse=return_lse, backend=self.backend, **options))

    def decode(self, q, case, lens, scale, **options):
        """(o, lse) of the backend, checked against the oracle."""
        got = self.run(decode_attention, jnp.asarray(q), case.arena, case.view, ints(lens), sm_scale=scale, **options)
        oracle = NONE | options
        check(got, decode_reference.decode_attention(q, case.arena, case.view, lens, sm_scale=scale, **oracle))
        return got

    def prefill(self, q, case, rows, start, count, scale, **options):
        """(o, lse) of the backend for one query tile per entry of rows, checked against the oracle."""
        view = take_rows(case.view, rows)
        args = (case.arena, view, ints(start), ints(count))
        got = self.run(prefill_attention, jnp.asarray(q), *args, sm_scale=scale, **options)
        oracle = NONE | options
        check(got, prefill_reference.prefill_attention(q, case.arena, view, start, count, sm_scale=scale, **oracle))
        return got


def check(got, want, tol=TOL):
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=tol, atol=tol)


class DecodeSuite(Suite):
    def setup_method(self):
        self.rng = np.random.default_rng(11)

    @pytest.mark.parametrize(("page_size", "kind"), LAYOUTS)
    def test_ragged(self, page_size, kind):
        case = place(*tokens(self.rng, LENS, HEADS), page_size, kind)
        o, lse = self.decode(queries(self.rng, len(LENS), HEADS.h, HEADS.d), case, LENS, 0.125)
        assert not o[0].any() and (lse[0] == -1e30).all()  # the padding row

    def test_random_lengths(self):
        for seed in range(6):
            rng = np.random.default_rng(seed)
            lens = np.append(rng.integers(0, 200, 4), 200)
            case = place(*tokens(rng, lens, HEADS), 16, "paged", seed=seed, spare=3)
            self.decode(queries(rng, 5, HEADS.h, HEADS.d), case, lens, 0.125)

    @pytest.mark.parametrize("heads", SHAPES, ids=str)
    def test_head_shapes(self, heads):
        lens = (3, 40, 0)
        case = place(*tokens(self.rng, lens, heads), 16, "paged")
        self.decode(queries(self.rng, 3, heads.h, heads.d), case, lens, heads.d**-0.5)

    def test_window_never_reads_what_left_it(self):
        k, v = tokens(self.rng, LENS, HEADS)
        q = queries(self.rng, len(LENS), HEADS.h, HEADS.d)
        for window in (1, 16, 50, 10**9, 2**31 - 1):
            case = place(*forget(k, v, window), 16, "paged")
            self.decode(q, case, LENS, 0.125, window=ints(window))

    def test_soft_cap(self):
        case = place(*tokens(self.rng, LENS, HEADS), 16, "paged")
        self.decode(queries(self.rng, len(LENS), HEADS.h, HEADS.d), case, LENS, 1.0, soft_cap=3.0)

    def test_nothing_to_do(self):
        case = place(*tokens(self.rng, (0, 0), HEADS), 16, "paged")
        o, lse = self.decode(queries(self.rng, 2, HEADS.h, HEADS.d), case, (0, 0), 0.125)
        assert not o.any() and (lse == -1e30).all()

    @pytest.mark.parametrize("dtype", HALVES)
    def test_16_bits_are_as_good_as_the_plain_computation(self, dtype):
        lens = (130,)
        case = place(*tokens(self.rng, lens, HEADS), 16, "paged", dtype=dtype)
        q = jnp.asarray(queries(self.rng, 1, HEADS.h, HEADS.d), dtype)
        o = self.run(
            decode_attention, q, case.arena, case.view, ints(lens), sm_scale=0.125, return_lse=False, window=None
        )
        assert o.dtype == jnp.dtype(dtype)
        want, _ = decode_reference.decode_attention(q, case.arena, case.view, lens, sm_scale=0.125, **NONE)
        assert error(o, want) <= 2 * error(plain_16_bits(q, case.k[0], case.v[0], ints(lens)), want)


class PrefillSuite(Suite):
    LENS = (150, 64, 40, 3)  # tokens of four sequences once the tiles below are written
    ROWS = (0, 0, 1, 2, 3, 3)
    START = (100, 132, 0, 10, 0, 77)
    COUNT = (32, 18, 32, 30, 3, 0)  # full, cut, full (of two), chunk, short, padding

    def setup_method(self):
        self.rng = np.random.default_rng(12)

    def tiles(self, page_size, kind, scale=0.125, heads=HEADS, **options):
        case = place(*tokens(self.rng, self.LENS, heads), page_size, kind)
        q = queries(self.rng, len(self.ROWS), 32, heads.h, heads.d)
        return self.prefill(q, case, self.ROWS, self.START, self.COUNT, scale, **options)

    @pytest.mark.parametrize(("page_size", "kind"), LAYOUTS)
    def test_ragged(self, page_size, kind):
        o, lse = self.tiles(page_size, kind)
        for t, n in enumerate(self.COUNT):
            assert not o[t, n:].any() and (lse[t, n:] == -1e30).all()

    @pytest.mark.parametrize("heads", SHAPES, ids=str)
    def test_head_shapes(self, heads):
        self.tiles(16, "paged", heads.d**-0.5, heads)

    def test_window_never_reads_what_left_it(self):
        k, v = tokens(self.rng, (150,), HEADS)
        q = queries(self.rng, 2, 32, HEADS.h, HEADS.d)
        for window in (1, 16, 50, 2**31 - 1):
            case = place(*forget(k, v, window + 31), 16, "paged")  # the tile's first query is 31 before its last
            self.prefill(q, case, (0, 0), (118, 118), (32, 0), 0.125, window=ints(window))

    def test_soft_cap(self):
        self.tiles(16, "paged", 1.0, soft_cap=3.0)

    @pytest.mark.parametrize("dtype", HALVES)
    def test_16_bits_are_as_good_as_the_plain_computation(self, dtype):
        case = place(*tokens(self.rng, (40,), HEADS), 16, "paged", dtype=dtype)
        q = jnp.asarray(queries(self.rng, 1, 32, HEADS.h, HEADS.d), dtype)
        args = (q, case.arena, case.view, ints([8]), ints([32]))
        o = self.run(prefill_attention, *args, sm_scale=0.125, return_lse=False)
        want, _ = prefill_reference.prefill_attention(*args, sm_scale=0.125, **NONE)
        plain = plain_16_bits(q[0], case.k[0], case.v[0], 9 + jnp.arange(32))
        assert error(o[0], want[0]) <= 2 * error(plain, want[0])


class WriteSuite(Suite):
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("page_size", [1, 16])
    def test_writes_what_it_should_and_nothing_else(self, dtype, page_size):
        rng = np.random.default_rng(13)
        spec, num_pages, count = KVSpec(page_size, 2, 64, dtype), 40, 24
        before = rng.integers(0, 2**16, (2, num_pages, page_size, 2, 64)).astype(np.uint16)
        before = (before if dtype in HALVES else before.astype(np.float32)).astype(storage_dtype(spec, "cpu"))
        slots = rng.permutation(np.arange(page_size, num_pages * page_size))[:count]  # page 0 is not written
        page, offset = slots // page_size, slots % page_size
        page[[0, 5, 9, 23]] = (-1, num_pages, 0, 2**31 - 1)  # skipped
        new = rng.normal(size=(2, count, 2, 64)).astype(np.float32)
        want = before.copy()
        stored = new.astype(jnp.dtype(dtype)).view(before.dtype)
        for t in set(range(count)) - {0, 5, 9, 23}:
            want[:, page[t], offset[t]] = stored[:, t]
        write = jitted_write() if self.jit else write_kv
        arena = KVArena(jnp.array(before[0]), jnp.array(before[1]), spec)
        after = write(arena, jnp.array(new[0]), jnp.array(new[1]), ints(page), ints(offset), backend=self.backend)
        np.testing.assert_array_equal(np.asarray(after.k), want[0])
        np.testing.assert_array_equal(np.asarray(after.v), want[1])


@functools.cache
def jitted_write():
    return jax.jit(write_kv, static_argnames="backend", donate_argnums=0)


def forget(k, v, window):
    """The sequences with NaN in the tokens that the last query's window has left behind."""

    def cut(x):
        x = x.copy()
        x[: max(0, len(x) - window)] = np.nan
        return x

    return [cut(x) for x in k], [cut(x) for x in v]


@jax.jit
def plain_16_bits(q, k, v, end):
    """Attention as written down, every operation in q's dtype: q [N, H, D], query n over the first end[n] tokens."""
    k, v = (jnp.repeat(x.astype(q.dtype), HEADS.h // HEADS.k, axis=1) for x in (k, v))
    s = jnp.einsum("nhd,thd->nht", q, k) * jnp.asarray(0.125, q.dtype)
    s = jnp.where(jnp.arange(k.shape[0]) < end[:, None, None], s, -jnp.inf)
    return jnp.einsum("nht,thd->nhd", jax.nn.softmax(s, axis=-1), v)


def error(got, want) -> float:
    """Root mean square error."""
    return float(np.sqrt(np.mean((np.asarray(got, np.float64) - want) ** 2)))

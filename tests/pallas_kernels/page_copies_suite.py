"""The page-copy tests that every backend must pass. Subclass with `backend` set."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import ints

from pallas_kernels import KVArena, KVBlock, KVSpec, copy_pages, gather_pages, scatter_pages, storage_dtype

P = 23
NOWHERE = (-1, 0, P, P + 1, 2**31 - 1, -(2**31))  # pages that are skipped, or read as zeros
SHAPES = [("float32", 16, 2, 64), ("bfloat16", 16, 2, 64), ("bfloat16", 1, 3, 80), ("float32", 4, 1, 8)]


@functools.cache
def jitted(function):
    donated = () if function is gather_pages else 0
    return jax.jit(function, static_argnames="backend", donate_argnums=donated)


@pytest.mark.parametrize(("dtype", "page_size", "heads", "dim"), SHAPES)
class PageCopiesSuite:
    """Every page holds random bits, many of them NaN with a payload; the oracle is NumPy indexing of those bits."""

    backend = "xla"
    jit = True

    @pytest.fixture(autouse=True)
    def bits(self, dtype, page_size, heads, dim):
        self.rng = np.random.default_rng(17)
        self.spec = KVSpec(page_size, heads, dim, dtype)
        self.stored = np.dtype(storage_dtype(self.spec, "cpu"))
        self.before = self.random(P)
        self.before[:, 0] = 0

    def random(self, count) -> np.ndarray:
        """Bits of K and V of `count` pages, as unsigned integers [2, count, S, K, D]."""
        shape = (2, count, self.spec.page_size, self.spec.num_kv_heads, self.spec.head_dim)
        unsigned = np.dtype(f"uint{8 * self.stored.itemsize}")
        values = self.rng.integers(0, 2 ** (8 * self.stored.itemsize), shape, unsigned)
        nan = np.array(0x7FC0 if unsigned.itemsize == 2 else 0x7FC00000, unsigned)
        return np.where(self.rng.random(shape) < 0.2, values | nan, values)  # most of what is or-ed is NaN

    def arena(self) -> KVArena:
        k, v = self.before.view(self.stored)
        return KVArena(jnp.array(k), jnp.array(v), self.spec)

    def run(self, function, *args):
        return (jitted(function) if self.jit else function)(*args, backend=self.backend)

    def same(self, got, want):
        """Equal to the bit, K and V."""
        for x, bits in zip((got.k, got.v), want, strict=True):
            assert x.dtype == self.stored
            np.testing.assert_array_equal(np.asarray(x).view(bits.dtype), bits)

    @pytest.mark.parametrize("count", [0, 1, 9])
    def test_gather(self, count):
        pages = self.rng.integers(1, P, count)  # of nine out of 22, some repeat or not
        got = self.run(gather_pages, self.arena(), ints(pages))
        assert isinstance(got, KVBlock)
        self.same(got, self.before[:, pages])

    def test_gather_repeats_pages_and_reads_zeros_for_padding(self):
        pages = np.array([5, *NOWHERE, 5, P - 1, 1, 5])
        want = np.where(np.isin(pages, NOWHERE)[:, None, None, None], 0, self.before[:, np.clip(pages, 0, P - 1)])
        self.same(self.run(gather_pages, self.arena(), ints(pages)), want)

    @pytest.mark.parametrize("count", [0, 1, 9, P - 1])
    def test_scatter_writes_its_pages_and_nothing_else(self, count):
        pages, new, want = self.rng.permutation(np.arange(1, P))[:count], self.random(count), self.before.copy()
        want[:, pages] = new
        block = KVBlock(*map(jnp.array, new.view(self.stored)))
        self.same(self.run(scatter_pages, self.arena(), ints(pages), block), want)

    def test_scatter_skips_padding(self):
        pages, want = np.array([NOWHERE[0], 4, *NOWHERE[1:], P - 1, 1, -1]), self.before.copy()
        new = self.random(len(pages))
        kept = ~np.isin(pages, NOWHERE)
        want[:, pages[kept]] = new[:, kept]
        block = KVBlock(*map(jnp.array, new.view(self.stored)))
        self.same(self.run(scatter_pages, self.arena(), ints(pages), block), want)

    def test_out_and_back_elsewhere(self):
        """What a swap does: the pages come back to other places, bit for bit."""
        out, back, want = np.array([3, 9, 1, -1]), np.array([7, 2, 3, -1]), self.before.copy()
        want[:, back[:3]] = self.before[:, out[:3]]
        block = self.run(gather_pages, self.arena(), ints(out))
        self.same(self.run(scatter_pages, self.arena(), ints(back), block), want)

    def test_copy_reads_everything_before_it_writes(self):
        """A permutation of all pages, a rotation by one and its inverse: the worst overlaps."""
        every = np.arange(1, P)
        for src in (self.rng.permutation(every), np.roll(every, 1), np.roll(every, -1)):
            want = self.before.copy()
            want[:, every] = self.before[:, src]
            self.same(self.run(copy_pages, self.arena(), ints(src), ints(every)), want)

    def test_copy_of_one_page_to_many_of_none_and_of_zeros(self):
        src, dst, want = np.array([6, 6, 9, 6, -1, P, 8]), np.array([1, 22, 6, 9, 2, 3, -1]), self.before.copy()
        want[:, dst[:4]] = self.before[:, src[:4]]
        want[:, [2, 3]] = 0
        self.same(self.run(copy_pages, self.arena(), ints(src), ints(dst)), want)
        self.same(self.run(copy_pages, self.arena(), ints([]), ints([])), self.before)

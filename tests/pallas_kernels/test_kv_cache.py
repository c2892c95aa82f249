"""The arena and its views: stored shapes, page ids, and that a step works on it in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.config import DTYPES
from engine.errors import ConfigError
from pallas_kernels import (
    KVSpec,
    PagedView,
    RunView,
    decode_attention,
    init_arena,
    prefill_attention,
    storage_dtype,
    write_kv,
)


def test_spec():
    spec = KVSpec(16, 4, 64, "bfloat16")
    assert spec.page_bytes == 2 * 16 * 4 * 64 * 2
    assert storage_dtype(spec, "cpu") == jnp.uint16 and storage_dtype(spec, "gpu") == jnp.bfloat16
    assert storage_dtype(KVSpec(16, 4, 64, "float16"), "cpu") == jnp.uint16
    assert storage_dtype(KVSpec(16, 4, 64, "float32"), "cpu") == jnp.float32
    with pytest.raises(ConfigError, match="float8"):
        KVSpec(16, 4, 64, "float8")
    with pytest.raises(ConfigError, match="power of two, got 12"):
        KVSpec(12, 4, 64, "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_init_arena(dtype):
    spec = KVSpec(4, 2, 8, dtype)
    arena = init_arena(spec, 3)
    assert arena.k.shape == arena.v.shape == (3, 4, 2, 8) and not np.asarray(arena.k).any()
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    poisoned = init_arena(spec, 3, sharding, poison=True)
    for pages in (poisoned.k, poisoned.v):
        values = np.asarray(poisoned.decode(pages))
        assert not values[0].any() and np.isnan(values[1:]).all()
    with pytest.raises(ConfigError, match="at least 2 pages"):
        init_arena(spec, 1)


def test_values_survive_storage():
    x = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    for dtype in DTYPES:
        arena = init_arena(KVSpec(4, 2, 8, dtype), 2)
        np.testing.assert_array_equal(arena.decode(arena.encode(x)), x.astype(jnp.dtype(dtype)).astype(np.float32))


def test_paged_view_names_pages_and_the_zero_page_beyond_them():
    table = jnp.arange(1, 1 + 2 * 3 * 4, dtype=jnp.int32).reshape(2, 3, 4)
    view = PagedView(table, jnp.int32(1), jnp.asarray([2, 0], jnp.int32))
    np.testing.assert_array_equal(view.page_ids(2, 4), [[23, 24, 0, 0], [15, 16, 0, 0]])
    np.testing.assert_array_equal(jax.jit(lambda f: view.page_ids(f, 2))(jnp.asarray([0, 3])), [[21, 22], [16, 0]])
    np.testing.assert_array_equal(view.take(1, 1).page_ids(0, 4), [[13, 14, 15, 16]])


def test_run_view_names_consecutive_pages():
    view = RunView(jnp.asarray([5, 40], jnp.int32))
    np.testing.assert_array_equal(view.page_ids(2, 3), [[7, 8, 9], [42, 43, 44]])
    np.testing.assert_array_equal(view.page_ids(jnp.asarray([0, 1]), 2), [[5, 6], [41, 42]])
    np.testing.assert_array_equal(view.take(0, 2).page_ids(0, 2), [[5, 6], [40, 41]])


def test_read_stays_inside_the_arena_and_the_tokens_asked_for():
    spec = KVSpec(4, 1, 2, "float32")
    arena = init_arena(spec, 3, poison=True)
    arena = write_kv(arena, jnp.ones((2, 1, 2)), jnp.ones((2, 1, 2)), jnp.asarray([2, 2]), jnp.asarray([1, 2]))
    first, last = jnp.asarray([1, 9]), jnp.asarray([3, 9])
    k, v = (x[:, 0] for x in arena.read(RunView(jnp.asarray([2, 10**6])), 0, 16, first, last))
    want = np.zeros((2, 16, 1, 2))
    want[0, 1:3] = 1
    np.testing.assert_array_equal(k, want)
    np.testing.assert_array_equal(v, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_then_read_in_one_step_is_in_place(dtype):
    """The arena is aliased, and what a step needs beside it does not grow with it."""

    def step(arena, new, view, page, lens):
        arena = write_kv(arena, new, new, page, page)
        q = jnp.repeat(new, 3, axis=1)
        o = decode_attention(q, arena, view, lens, sm_scale=0.125)
        return arena, o + prefill_attention(q[:, None], arena, view, lens, lens, sm_scale=0.125)[:, 0]

    def memory(num_pages):
        arena = init_arena(KVSpec(16, 2, 64, dtype), num_pages)
        four = jnp.zeros(4, jnp.int32)
        view = PagedView(jnp.zeros((2, 4, 8), jnp.int32), jnp.int32(0), four)
        compiled = jax.jit(step, donate_argnums=0).lower(arena, jnp.zeros((4, 2, 64)), view, four, four).compile()
        used = compiled.memory_analysis()
        assert used.alias_size_in_bytes == num_pages * arena.spec.page_bytes
        return used.temp_size_in_bytes

    small, large = memory(500), memory(4000)
    assert small == large < 500 * 2 * 16 * 2 * 64  # less than a tenth of the larger arena, and the same for both

"""Page copies: the shared suite for both backends, that they are in place, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import ints
from page_copies_suite import PageCopiesSuite

from engine.errors import ConfigError
from pallas_kernels import KVBlock, KVSpec, copy_pages, gather_pages, init_arena, scatter_pages


class TestXla(PageCopiesSuite):
    pass


class TestReference(PageCopiesSuite):
    backend, jit = "reference", False


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_they_need_no_memory_that_grows_with_the_arena(dtype):
    """The arena is aliased; a gather and a scatter hold nothing else, a copy the pages in flight."""
    n = 32

    def memory(function, num_pages, *args):
        arena = init_arena(KVSpec(16, 2, 64, dtype), num_pages)
        written = function is not gather_pages
        used = jax.jit(function, donate_argnums=0 if written else ()).lower(arena, *args).compile().memory_analysis()
        assert used is not None
        assert used.alias_size_in_bytes == written * num_pages * arena.spec.page_bytes
        return used.temp_size_in_bytes

    block = gather_pages(init_arena(KVSpec(16, 2, 64, dtype), 2), ints(np.zeros(n)))
    moved = sum(x.nbytes for x in block)
    pages, small = ints(np.zeros(n)), 1000
    for function, args, most in (
        (gather_pages, (pages,), small),
        (scatter_pages, (pages, block), small),
        (copy_pages, (pages, pages), moved + small),
    ):
        assert memory(function, 500, *args) == memory(function, 4000, *args) <= most


def test_a_block_that_is_not_needed_gives_its_memory_to_the_next():
    """As the docstring of `gather_pages` promises; what was sent from the old block before stays as it was."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arena = init_arena(KVSpec(16, 2, 64, "float32"), 6, poison=True)
    again = jax.jit(lambda arena, pages, old: gather_pages(arena, pages), donate_argnums=2, keep_unused=True)
    old = gather_pages(arena, ints([1, 2]))
    places = [x.unsafe_buffer_pointer() for x in old]
    sent = jax.block_until_ready(jax.device_put(old, sharding.with_memory_kind("pinned_host")))
    new = again(arena, ints([0, 1]), old)
    assert [x.unsafe_buffer_pointer() for x in new] == places and old.k.is_deleted()
    assert np.isnan(sent.k).all() and not np.asarray(new.k[0]).any()


def test_a_block_goes_to_the_host_and_back_in_one_call():
    """One `device_put` moves K and V, to pinned host memory and back."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arena = init_arena(KVSpec(4, 2, 8, "bfloat16"), 6, poison=True)
    block = jax.device_put(gather_pages(arena, ints([2, 0])), sharding.with_memory_kind("pinned_host"))
    assert isinstance(block, KVBlock) and {x.sharding.memory_kind for x in block} == {"pinned_host"}
    back = scatter_pages(arena, ints([3, 4]), jax.device_put(block, sharding))
    np.testing.assert_array_equal(back.k[3], arena.k[2])
    assert not np.asarray(back.v[4]).any()


def test_what_does_not_fit_is_refused():
    arena, one = init_arena(KVSpec(4, 2, 8, "bfloat16"), 6), ints([1])
    block = gather_pages(arena, ints([1, 2]))
    with pytest.raises(ValueError, match=r"does not fit: both must be uint16 \(1, 4, 2, 8\)"):
        scatter_pages(arena, one, block)
    with pytest.raises(ValueError, match=r"bfloat16 .*does not fit: both must be uint16"):
        scatter_pages(arena, ints([1, 2]), KVBlock(block.k, jnp.zeros(block.v.shape, jnp.bfloat16)))
    with pytest.raises(ValueError, match="vectors of one length"):
        copy_pages(arena, one, ints([1, 2]))
    with pytest.raises(ValueError, match="vectors of one length"):
        gather_pages(arena, jnp.int32(1))
    with pytest.raises(ConfigError, match=r"gather_pages has no backend 'mosaic'; known: xla, reference"):
        gather_pages(arena, one, backend="mosaic")
    with pytest.raises(ConfigError, match="outside jit"):
        jax.jit(lambda arena: gather_pages(arena, one, backend="reference"))(arena)

"""Every kernel inside shard_map, kv heads over the mesh axis `tensor`: two CPU devices, in an own process."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_two_devices_agree_with_one():
    run = subprocess.run([sys.executable, __file__], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == ["decode", "prefill", "write", "gather", "scatter", "copy"]


def main():
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    from kernel_cases import Heads, ints, place, queries, take_rows, tokens

    from pallas_kernels import (
        KVArena,
        KVBlock,
        copy_pages,
        decode_attention,
        gather_pages,
        init_arena,
        prefill_attention,
        scatter_pages,
        write_kv,
    )

    mesh = Mesh(np.array(jax.devices()), ("tensor",))
    heads = Heads(6, 2, 64)
    rng = np.random.default_rng(0)
    lens, every = (70, 3, 0), PartitionSpec()
    case = place(*tokens(rng, lens, heads), 16, "paged")
    pages, rows = PartitionSpec(None, None, "tensor"), PartitionSpec(None, "tensor")
    arena_spec = KVArena(pages, pages, case.arena.spec)
    arena_shardings = KVArena(*[NamedSharding(mesh, pages)] * 2, case.arena.spec)
    arena = jax.device_put(case.arena, arena_shardings)

    def sharded(f, specs, out):
        return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out))

    def same(got, want):
        np.testing.assert_array_equal(got.k, want.k)
        np.testing.assert_array_equal(got.v, want.v)

    def decode(q, arena, view, lens):
        return decode_attention(q, arena, view, lens, sm_scale=0.125)

    q = queries(rng, 3, heads.h, heads.d)
    got = sharded(decode, (rows, arena_spec, every, every), rows)(q, arena, case.view, ints(lens))
    np.testing.assert_allclose(got, decode(q, case.arena, case.view, ints(lens)), rtol=1e-5, atol=1e-5)
    print("decode")

    def prefill(q, arena, view, start, count):
        return prefill_attention(q, arena, view, start, count, sm_scale=0.125)

    q = jnp.asarray(queries(rng, 2, 32, heads.h, heads.d))
    view, start, count = take_rows(case.view, (0, 1)), ints((38, 0)), ints((32, 3))
    heads_third = PartitionSpec(None, None, "tensor")
    got = sharded(prefill, (heads_third, arena_spec, every, every, every), heads_third)(q, arena, view, start, count)
    np.testing.assert_allclose(got, prefill(q, case.arena, view, start, count), rtol=1e-5, atol=1e-5)
    print("prefill")

    arena = init_arena(case.arena.spec, 8, NamedSharding(mesh, pages))
    new, page, offset = queries(rng, 4, heads.k, heads.d), ints((3, -1, 5, 8)), ints((0, 1, 15, 2))
    got = sharded(write_kv, (arena_spec, rows, rows, every, every), arena_spec)(arena, new, -new, page, offset)
    want = write_kv(init_arena(case.arena.spec, 8), jnp.asarray(new), -jnp.asarray(new), page, offset)
    same(got, want)
    print("write")

    arena, block_spec, ids = jax.device_put(want, arena_shardings), KVBlock(pages, pages), ints((5, -1, 3, 5))
    block = sharded(gather_pages, (arena_spec, every), block_spec)(arena, ids)
    one_block = gather_pages(want, ids)
    np.testing.assert_array_equal(block, one_block)
    print("gather")
    ids = ints((1, 2, 8, 4))
    got = sharded(scatter_pages, (arena_spec, every, block_spec), arena_spec)(arena, ids, block)
    same(got, scatter_pages(want, ids, one_block))
    print("scatter")
    src, dst = ints((5, 3, 1)), ints((3, 5, -1))
    same(sharded(copy_pages, (arena_spec, every, every), arena_spec)(arena, src, dst), copy_pages(want, src, dst))
    print("copy")


if __name__ == "__main__":
    main()

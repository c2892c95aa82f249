"""What the compiler says of the single-layer program: in place, and no temporary that grows with the arena."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.config import DTYPES
from engine.executor.packing import Bucket
from engine.executor.programs import Programs
from engine.models import llama, tensors
from pallas_kernels import KVSpec, init_arena
from tests.engine.tiny import WIDE


def analyse(dtype: str, num_pages: int, bucket: Bucket, view: str):
    """memory_analysis of one layer over an arena of `num_pages`, and the arena's bytes."""
    model = WIDE.replace(dtype=dtype)
    mesh = tensors.single_device_mesh()
    programs = Programs(model, mesh, backend=None, deterministic=False, capture=False, view=view)
    arena = init_arena(KVSpec(16, model.num_kv_heads, model.head_dim, dtype), num_pages)
    weights = tensors.abstract(llama.definitions(model), mesh)["layers"][0]
    x = jax.ShapeDtypeStruct((bucket.tokens, model.hidden_size), jnp.dtype(dtype))
    rope = (jax.ShapeDtypeStruct((bucket.tokens, model.head_dim // 2), jnp.float32),) * 2
    table = jax.ShapeDtypeStruct((model.num_layers, 8, 1 if view == "run" else 64), jnp.int32)
    packed = jax.ShapeDtypeStruct((sum(bucket.sections().values()),), jnp.int32)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = programs.layer(bucket).lower(weights, arena, x, rope, table, packed, scalar, scalar)
    return lowered.compile().memory_analysis(), arena.k.nbytes + arena.v.nbytes


@pytest.mark.parametrize("bucket", [Bucket(8, 0, 16), Bucket(0, 4, 16), Bucket(8, 4, 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", ["paged", "run"])
def test_the_arena_is_updated_in_place(view, dtype, bucket):
    """alias = arena (and the activations, donated too); temporaries independent of the arena's size."""
    small, arena_bytes = analyse(dtype, 256, bucket, view)
    large, large_bytes = analyse(dtype, 4096, bucket, view)
    activations = bucket.tokens * WIDE.hidden_size * np.dtype(jnp.dtype(dtype)).itemsize
    assert small.alias_size_in_bytes in (arena_bytes, arena_bytes + activations)
    assert large.alias_size_in_bytes - small.alias_size_in_bytes == large_bytes - arena_bytes
    assert large.temp_size_in_bytes == small.temp_size_in_bytes < large_bytes

"""What the compiler says of the single-layer program: in place, and no temporary that grows with the arena."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from engine.builder import device_sizes
from engine.config import DTYPES, EngineConfig, ModelConfig
from engine.executor.packing import Bucket
from engine.executor.programs import ARENA, Programs
from engine.models import llama, tensors
from pallas_kernels import init_arena
from tests.engine.tiny import WIDE


def compile_layer(model: ModelConfig, num_pages: int, bucket: Bucket, tensor: int = 1, view: str = "paged"):
    """One layer over an arena of `num_pages` on `tensor` devices, compiled; and the arena."""
    mesh = tensors.device_mesh(tensor)
    programs = Programs(model, mesh, backend=None, deterministic=False, capture=False, view=view)
    _, spec = device_sizes(model, EngineConfig(tensor=tensor))
    arena = init_arena(spec, num_pages, NamedSharding(mesh, ARENA))
    weights = tensors.abstract(llama.definitions(model, tensor), mesh)["layers"][0]

    def whole(shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, PartitionSpec()))

    x = whole((bucket.tokens, model.hidden_size), model.dtype)
    rope = (whole((bucket.tokens, model.head_dim // 2), jnp.float32),) * 2
    table = whole((model.num_layers, 8, 1 if view == "run" else 64))
    packed = whole((sum(bucket.sections().values()),))
    parked = whole((bucket.rows + bucket.tiles, 3))
    lowered = programs.layer(bucket).lower(weights, arena, x, rope, table, packed, whole(()), whole(()), parked)
    return lowered.compile(), arena


def analyse(dtype: str, num_pages: int, bucket: Bucket, view: str):
    """memory_analysis of one layer over an arena of `num_pages`, and the arena's bytes."""
    compiled, arena = compile_layer(WIDE.replace(dtype=dtype), num_pages, bucket, view=view)
    return compiled.memory_analysis(), arena.k.nbytes + arena.v.nbytes


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

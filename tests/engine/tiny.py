"""Small real engines for tests: one place that builds them, so that programs and weights are shared."""

from functools import lru_cache

import numpy as np

from engine.builder import assemble, device_sizes
from engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from engine.engine import Engine
from engine.executor.memory_plan import make_memory_plan
from engine.models import tensors, weights
from pallas_kernels import KVSpec

# 256 wide, the least at which float32 products do not depend on how many rows share them (DESIGN, invariant 4 a).
WIDE = ModelConfig("wide", 2, 256, 4, 2, 64, 512, 512, 2048)
DEEP = WIDE.replace(name="deep", num_layers=4)
NARROW = ModelConfig("narrow", 2, 64, 4, 2, 16, 128, 512, 1024)
SLIDING = WIDE.replace(name="sliding", windows=(24, None))


@lru_cache(None)
def params(model: ModelConfig, tensor: int = 1):
    """Seeded weights, made once."""
    return weights.init_params(model, tensors.device_mesh(tensor), seed=1)


def tiny_engine(
    model: ModelConfig = WIDE,
    num_pages: int = 64,
    page_size: int = 16,
    max_num_seqs: int = 4,
    policy: str = "vllm_v0",
    chunk: int = 1,
    max_batched_tokens: int | None = None,
    host_pages: int = 0,
    transient_pages: int = 0,
    preemption: str = "recompute",
    store: str = "paged",
    **options,
) -> Engine:
    """A real engine on CPU, pages counted per layer, with NaN poison, debug checks and captured logits."""
    defaults = {"debug_checks": True, "poison": True, "capture_logits": True, "query_tile": 16, "max_tiles": 4}
    page_bytes = KVSpec(page_size, model.num_kv_heads, model.head_dim, model.dtype).page_bytes
    config = EngineConfig(
        cache=CacheConfig(
            store=store,
            page_size=page_size,
            num_pages=num_pages * model.num_layers,
            pages_per_chunk=chunk if store == "paged" else None,
            host_bytes=host_pages * model.num_layers * page_bytes,
            transient_pages=transient_pages,
        ),
        scheduler=SchedulerConfig(
            policy=policy,
            max_num_seqs=max_num_seqs,
            watermark=0.0,
            max_num_batched_tokens=max_batched_tokens,
            preemption=preemption,
        ),
        compilation_cache_dir=None,
        **{**defaults, **options},
    )
    mesh = tensors.device_mesh(config.tensor)
    weight_bytes, spec = device_sizes(model, config)
    memory = make_memory_plan(model, config, weight_bytes, spec.page_bytes // mesh.size, mesh.devices.flat[0])
    return assemble(Engine, model, params(model, mesh.size), config, mesh, spec, memory)


def prompts(lengths, vocab: int = 512, seed: int = 0) -> list[list[int]]:
    """Seeded random prompts of these lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, n).tolist() for n in lengths]

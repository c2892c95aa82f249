"""Sizes of the device tier, by hand; and the activation estimate against the compiler."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from engine.config import CacheConfig, EngineConfig, SchedulerConfig, SimConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.executor.memory_plan import CPU_ARENA_BYTES, activation_bytes, make_memory_plan
from engine.executor.packing import Bucket
from engine.executor.programs import Programs
from engine.models import llama, tensors
from engine.scheduler.sampling_rows import FIELDS
from pallas_kernels import KVSpec
from tests.engine.tiny import WIDE

PAGE = 2 * 16 * 2 * 64 * 4  # K and V, 16 tokens, 2 heads of 64, float32


@dataclasses.dataclass
class Device:
    """What `make_memory_plan` asks of a device."""

    platform: str = "gpu"
    device_kind: str = "test"
    limit: int | None = 1 << 30

    def memory_stats(self):
        return {"bytes_limit": self.limit} if self.limit else None


def plan(cache: CacheConfig, device=None, weights: int = 0, preemption: str = "recompute", policy="vllm_v0", **options):
    limits = SchedulerConfig(policy, max_num_seqs=4, preemption=preemption)
    config = EngineConfig(cache, limits, **options)
    return make_memory_plan(WIDE, config, weights, PAGE, device or jax.devices()[0])


def test_by_pages():
    """100 pages asked for: 100 usable, one reserved; 50 pages of 16 tokens in each of 2 layers cap the context."""
    p = plan(CacheConfig(num_pages=100))
    assert (p.num_pages, p.pages_per_chunk, p.arena, p.max_context) == (100, 1, 101 * PAGE, 800)
    assert "2,048 capped" in p.context_note and p.page_tables == 2 * 4 * 50 * 4


def test_by_bytes_counts_the_reserved_chunk():
    """One MiB is 64 pages of 16 KiB: chunks of 4 leave 60 usable."""
    p = plan(CacheConfig(device_bytes=1 << 20, pages_per_chunk=4))
    assert PAGE == 16384 and (p.num_pages, p.arena) == (60, 64 * PAGE)


def test_chunks_are_about_two_mib_on_a_gpu():
    """128 pages of 16 KiB."""
    assert plan(CacheConfig(), Device()).pages_per_chunk == 128
    assert plan(CacheConfig()).pages_per_chunk == 1


def test_by_fraction_of_a_gpu_leaves_room_for_the_rest():
    """Arena + weights + tables + activations fill the fraction to within a chunk."""
    p = plan(CacheConfig(device_fraction=0.5), Device(), weights=100 << 20)
    used = p.arena + p.weights + p.page_tables + p.activation_peak
    assert 0 <= (1 << 29) - used < 129 * PAGE


def test_the_default_on_cpu_is_at_most_one_gib():
    """Whatever the machine has; the model's context fits."""
    p = plan(CacheConfig())
    assert 0 < p.arena <= CPU_ARENA_BYTES + PAGE and (p.max_context, p.context_note) == (2048, "")


def test_the_native_store_takes_whole_reservations():
    """100 pages, contexts of 250 tokens: 16 pages in each of 2 layers, so three sequences and 4 pages less."""
    p = plan(CacheConfig(store="native", num_pages=100), max_context=250)
    assert (p.num_slots, p.num_pages, p.arena, p.page_tables) == (3, 96, 97 * PAGE, 2 * 3 * 4)
    assert "at most 3 sequences (4 asked for; each reserves 250 tokens" in p.table()
    p = plan(CacheConfig(store="native", num_pages=1000), max_context=250)
    assert (p.num_slots, p.num_pages) == (4, 128) and "asked for" not in p.table()


def test_the_native_store_shortens_the_models_context_like_any_other():
    """One sequence at a time then, and both are said; on a GPU too there are no chunks."""
    p = plan(CacheConfig(store="native", num_pages=100), Device())
    assert (p.num_slots, p.max_context, p.num_pages, p.pages_per_chunk) == (1, 800, 100, 1)
    assert "2,048 capped" in p.table() and "each reserves 800 tokens" in p.table()


@pytest.mark.parametrize(
    "pages, chunk, context, tokens, transient",
    [
        (1000, 1, 250, 250, 16),  # what the longest context takes of one layer
        (300, 1, None, 1600, 100),  # 2 layers and what is streamed: 100 pages each
        (302, 1, None, 1600, 100),  # the other two are the pool's
        (300, 4, None, 1600, 100),  # 25 chunks each
        (310, 4, None, 1600, 100),  # 77 chunks: two are left over
    ],
)
def test_transient_pages_of_a_policy_that_parks_come_out_of_the_pool(pages, chunk, context, tokens, transient):
    """One layer of the longest context, whatever that is then, is streamed through them."""
    cache = CacheConfig(num_pages=pages, pages_per_chunk=chunk, host_bytes=100 * PAGE)
    p = plan(cache, policy="layerkv", max_context=context)
    left = (pages - transient) // chunk * chunk
    assert (p.max_context, p.transient_pages, p.num_pages) == (tokens, transient, left)
    assert (p.transient_buffers, p.arena) == (transient * PAGE, (left + chunk) * PAGE)
    assert ("2,048 capped" in p.context_note) == (context is None)
    config = p.settle(EngineConfig(cache))
    assert config.cache.num_transient == transient


def test_transient_pages_that_are_given_are_beside_the_pool():
    """Nothing else changes; without a policy that parks there are none."""
    cache = CacheConfig(num_pages=1000, host_bytes=100 * PAGE, transient_pages=40)
    p = plan(cache, policy="layerkv", max_context=250)
    assert (p.num_pages, p.transient_pages, p.transient_buffers) == (1000, 40, 40 * PAGE)
    p = plan(CacheConfig(num_pages=1000, host_bytes=100 * PAGE), policy="paged_park", max_context=250)
    assert (p.num_pages, p.transient_pages, p.transient_buffers) == (1000, 0, 0)


@pytest.mark.parametrize(
    "cache, options, device, message",
    [
        (CacheConfig(num_pages=1), {}, None, "the KV pool has 1 pages; .* takes 2: raise num_pages"),
        (CacheConfig(num_pages=6, pages_per_chunk=4), {}, None, r"\(chunks of 4 pages\) takes 8"),
        (CacheConfig(num_pages=100), {"max_context": 1000}, None, "takes 126 pages, the KV pool has 100: lower .* 800"),
        (
            CacheConfig(store="native", num_pages=100),
            {"max_context": 1000},
            None,
            "takes 126 pages, the KV pool has 100",
        ),
        (CacheConfig(), {"max_context": 4096}, None, "max_context=4096 is more than the model's 2048"),
        (CacheConfig(), {}, Device(limit=None), "does not report its memory: give num_pages or device_bytes"),
        (CacheConfig(), {}, Device(limit=1 << 20), "too large"),
        (CacheConfig(num_pages=10**12), {}, None, "GiB is more than the .* GiB that cpu has"),
        (CacheConfig(device_bytes=1 << 40), {}, Device(), "GiB is more than the 1.0 GiB that test has"),
        (
            CacheConfig(num_pages=100, host_bytes=2 * PAGE - 1),
            {"preemption": "swap"},
            None,
            "host_bytes=32,767 holds 1 pages and the shortest sequence takes 2, .* raise host_bytes to 32,768",
        ),
        (CacheConfig(num_pages=100), {"policy": "layerkv"}, None, "^policy layerkv moves KV to the host: set host_by"),
        (CacheConfig(num_pages=100), {"policy": "paged_park"}, None, "^policy paged_park moves KV to the host: set ho"),
        (CacheConfig("native", host_bytes=PAGE), {"policy": "layerkv"}, None, "parks layers: it needs store=paged"),
        (
            CacheConfig(num_pages=100, host_bytes=PAGE, transient_pages=0),
            {"policy": "layerkv"},
            None,
            "^policy layerkv parks layers: it needs .* transient_pages other than 0",
        ),
        (
            CacheConfig(num_pages=100, host_bytes=PAGE, transient_pages=15),
            {"policy": "layerkv", "max_context": 250},
            None,
            "^transient_pages=15 hold less than a layer of 250 tokens, .* takes 16",
        ),
        (
            CacheConfig(num_pages=47, host_bytes=PAGE),
            {"policy": "layerkv", "max_context": 250},
            None,
            "max_context=250 takes 48 pages, .* the KV pool has 47: lower max_context to 240",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_numbers(cache, options, device, message):
    """One line: what is wrong and what would be right."""
    with pytest.raises(ConfigError, match=message):
        plan(cache, device, **options)


def test_the_host_tier_says_what_it_can_take():
    """Five pages: two in each of two layers. Without swapping a smaller tier is nobody's mistake."""
    p = plan(CacheConfig(num_pages=100, host_bytes=5 * PAGE), preemption="swap", max_context=100)
    assert p.warnings() == [] and "pinned host memory, 5 pages: sequences of up to 32 tokens" in p.table()
    assert plan(CacheConfig(num_pages=100, host_bytes=1)).host_note == "0 pages: sequences of up to 0 tokens"
    assert "no host tier" in plan(CacheConfig(num_pages=100)).table()


def test_a_pipeline_swaps_the_layers_of_all_stages():
    """tiny-1m has 4 layers of 8 KiB pages: two pages would do for the layers of one of two stages."""
    cache, limits = CacheConfig(num_pages=64, host_bytes=1 << 14), SchedulerConfig(preemption="swap")
    config = EngineConfig(cache, limits, executor="sim", sim=SimConfig(pipeline=2))
    with pytest.raises(ConfigError, match="holds 2 pages and the shortest sequence takes 4"):
        Engine.from_pretrained("tiny-1m", config)


def test_a_link_without_a_host_tier_is_warned_about(caplog):
    """It paces nothing; in a simulation neither."""
    line = "link_gbs has no effect: there is no host tier to copy to, set host_bytes"
    assert plan(CacheConfig(num_pages=100), max_context=100, link_gbs=5.0).warnings() == [line]
    assert plan(CacheConfig(num_pages=100, host_bytes=PAGE), max_context=100, link_gbs=5.0).warnings() == []
    Engine.from_pretrained("tiny-1m", EngineConfig(executor="sim", link_gbs=5.0))
    assert line in caplog.messages


def test_the_activation_estimate_covers_what_the_compiler_needs():
    """Layer program of the largest bucket, and LM head with sampling: temporaries + outputs <= estimate <= 4x."""
    config = EngineConfig(scheduler=SchedulerConfig(max_num_seqs=16), query_tile=64, max_tiles=8)
    model = WIDE.replace(vocab_size=8192)
    mesh = tensors.device_mesh()
    programs = Programs(model, mesh, None, False, capture=False)
    params = tensors.abstract(llama.definitions(model), mesh)
    tiles, rows = Bucket(0, 8, 64), Bucket(16, 0, 64)

    def shape(*dims, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(dims, dtype)

    def packed(bucket):
        return shape(sum(bucket.sections().values()), dtype=jnp.int32)

    from pallas_kernels import init_arena

    arena = init_arena(KVSpec(16, 2, 64, "float32"), 64)
    scalar = shape(dtype=jnp.int32)
    layer = programs.layer(tiles).lower(
        params["layers"][0],
        arena,
        shape(tiles.tokens, model.hidden_size),
        (shape(tiles.tokens, 32),) * 2,
        shape(2, 16, 64, dtype=jnp.int32),
        packed(tiles),
        scalar,
        scalar,
    )
    x, last_tokens, sampling = (
        shape(16, model.hidden_size),
        shape(17, dtype=jnp.int32),
        shape(16, FIELDS, dtype=jnp.int32),
    )
    tail = programs.tail(rows, True).lower(params, x, last_tokens, packed(rows), sampling)
    needs = [p.compile().memory_analysis().temp_size_in_bytes for p in (layer, tail)]
    assert max(needs) <= activation_bytes(model, config, tiles.tokens) <= 4 * max(needs)

"""Engines over simulated pipeline stages: what each stage gets of the memory, which store serves, what is refused."""

import numpy as np
import pytest

from engine.config import CacheConfig, EngineConfig, SchedulerConfig, SimConfig
from engine.costmodel.device import load_device
from engine.costmodel.stages import Stage
from engine.costmodel.step_model import StepModel
from engine.engine import Engine
from engine.errors import ConfigError
from engine.memory.blocks import BlockStore
from engine.memory.parking import ParkingStore
from engine.memory.staged import StagedPool
from engine.presets import preset
from engine.request import SamplingParams

LAYERS = 32  # of Llama-2-7B; a page of one of them holds 16 tokens of 16 KiB
PAGE = 2**18


def engine(pipeline, model="llama2-7b", tensor=1, **cache):
    sim = SimConfig("l20", pipeline=pipeline)
    return Engine.from_pretrained(
        model, EngineConfig(CacheConfig(**cache), SchedulerConfig(), "sim", sim, tensor=tensor, max_context=2048)
    )


def test_given_pages_are_split_in_proportion_to_layers():
    """32,100 pages, over stages of 11, 11 and 10 layers; 1,003 blocks in the fullest, as on one device."""
    three = engine(3, num_pages=32_100)
    assert [p.num_pages for p in three.memory.stages] == [11_034, 11_034, 10_031]
    assert isinstance(three.store, BlockStore) and three.num_pages == 1003 * LAYERS
    assert engine(1, num_pages=32_100).num_pages == 1003 * LAYERS


def test_given_bytes_are_those_of_each_device():
    """1 GiB is 4,096 pages, one of them reserved; 255 blocks of 16 pages fit."""
    two = engine(2, device_bytes=2**30)
    assert [p.num_pages for p in two.memory.stages] == [4095, 4095] and two.num_pages == 255 * LAYERS


def test_derived_pages_follow_from_each_stages_weights():
    """The last of four stages has the LM head and the logits, so it has the fewest pages; the table shows them all."""
    four = engine(4)
    pages = [p.num_pages for p in four.memory.stages]
    assert pages[1] == pages[2] > pages[0] > pages[3]
    assert four.num_pages == pages[3] // 8 * LAYERS
    stages = [StepModel(preset("llama2-7b"), load_device("l20"), stage=s) for s in Stage.split(preset("llama2-7b"), 4)]
    assert [p.weights for p in four.memory.stages] == [s.weight_bytes for s in stages]
    table = four.memory_table().splitlines()
    assert table[0] == "on each of 4 devices, at most; 4 stages"
    assert [line[:8] for line in table[-4:]] == ["stage 0:", "stage 1:", "stage 2:", "stage 3:"]
    assert f"{four.num_pages:,} are of use" in table[-5]


def test_a_model_that_fits_no_device_fits_a_pipeline():
    """65.7 GiB of Llama-3.1-70B on each of two L20; on eight, as 2 x 4 of them, there is room."""
    with pytest.raises(ConfigError, match="the model does not fit"):
        engine(1, "llama3.1-70b", tensor=2)
    with pytest.raises(ConfigError, match="the stage of layers 0 to 39: the model does not fit"):
        engine(2, "llama3.1-70b")
    assert engine(4, "llama3.1-70b", tensor=2).memory.num_devices == 8


def test_what_parks_layers_has_a_pool_in_every_stage():
    """As does what owns pages by chunks; whoever maps pages finds its layers' in their own stage."""
    parks = engine(2, num_pages=6400, host_bytes=2**30, transient_pages=64)
    assert isinstance(parks.store, ParkingStore) and isinstance(parks.store.pool, StagedPool)
    assert [(p.num_pages, p.num_layers) for p in parks.store.pool.pools] == [(3200, 16), (3200, 16)]
    slot = parks.store.open(40)
    assert (parks.store.pages(slot)[:16] <= 3200).all() and (parks.store.pages(slot)[16:] > 3200).all()
    chunks = engine(2, num_pages=6400, pages_per_chunk=4)
    assert isinstance(chunks.store.pool, StagedPool) and chunks.store.pages_per_chunk == 4


@pytest.mark.parametrize("cache", [{}, {"store": "native"}, {"transient_pages": 64}, {"pages_per_chunk": 4}], ids=str)
@pytest.mark.parametrize("policy", ["vllm_v0", "vllm_v1"])
def test_every_store_serves_through_stages(cache, policy):
    """Ten requests in a pool for four, with swap: all end, nothing is left."""
    sizes = CacheConfig(num_pages=4 * 16 * LAYERS, host_bytes=2**34, **cache)
    scheduler = SchedulerConfig(policy, preemption="swap", watermark=0.0)
    sim = SimConfig("l20", pipeline=3)
    e = Engine.from_pretrained(
        "llama2-7b", EngineConfig(sizes, scheduler, "sim", sim, max_context=256, debug_checks=True)
    )
    params = SamplingParams(max_tokens=120, ignore_eos=True)
    outputs = e.generate([np.ones(20 + 10 * i, np.int32) for i in range(10)], params)
    assert all(len(o.token_ids) == 120 for o in outputs)
    while e.has_work():
        e.step()
    assert e.store.num_free_pages == e.store.num_pages and e.store.num_host_pages == 0
    assert (sum(o.metrics.num_preemptions for o in outputs) > 0) == ("store" not in cache)


def test_stages_keep_each_other_busy():
    """48 rows of long contexts: two L20 in a row decode faster than one and slower than twice as fast, where the time
    goes into the rows' KV; one row gains nothing."""

    def seconds(pipeline, rows):
        e = engine(pipeline)
        e.generate([np.ones(1500, np.int32)] * rows, SamplingParams(max_tokens=100, ignore_eos=True))
        return e.clock.now()

    assert 1.2 < seconds(1, 48) / seconds(2, 48) < 2
    assert seconds(2, 1) > seconds(1, 1)


def test_pipelines_are_simulated_only():
    with pytest.raises(ConfigError, match="pipeline=2 is simulated only: set executor=sim"):
        EngineConfig(sim=SimConfig(pipeline=2))

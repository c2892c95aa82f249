"""What each stage of a pipeline holds and does: by hand, and against one device that has everything."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.costmodel.device import load_device
from engine.costmodel.memory import activation_bytes
from engine.costmodel.roofline import Shard
from engine.costmodel.stages import Stage
from engine.costmodel.step_model import StepModel, StepWork
from engine.errors import ConfigError
from engine.presets import PRESETS, preset
from tests.engine.costmodel.device_files import MODEL, profile

H100 = load_device("h100")
MODELS = [m for m in PRESETS.values() if m.dtype == "bfloat16"]


@pytest.mark.parametrize("stages, sizes", [(1, [7]), (3, [3, 2, 2]), (5, [2, 2, 1, 1, 1]), (7, [1] * 7)])
def test_layers_are_split_evenly_and_earlier_stages_get_the_rest(stages, sizes):
    found = Stage.split(MODEL.replace(num_layers=7), stages)
    assert [len(s.layers) for s in found] == sizes
    assert [layer for s in found for layer in s.layers] == list(range(7))
    assert [s.first for s in found] == [True] + [False] * (stages - 1)
    assert [s.last for s in found] == [False] * (stages - 1) + [True]


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ConfigError, match="pipeline=4 stages for the 3 layers of round"):
        Stage.split(MODEL, 4)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(MODELS), st.integers(2, 28), st.sampled_from([1, 2]))
def test_stages_hold_what_one_device_would(model, num_stages, tensor):
    """Every weight once; but where the embedding is also the LM head, the first and the last stage have it both."""
    for tied in (False, True):
        shape = model.replace(tie_embeddings=tied)
        stages = [StepModel(shape, H100, tensor=tensor, stage=s) for s in Stage.split(shape, num_stages)]
        whole, twice = StepModel(shape, H100, tensor=tensor), tied * 2 * shape.hidden_size
        assert sum(s.weight_bytes for s in stages) == whole.weight_bytes + twice * -(-shape.vocab_size // tensor)
        assert sum(s.kv_bytes_per_token for s in stages) == whole.kv_bytes_per_token


def test_logits_are_the_last_stages():
    """16 rows of 10,000 float32 logits and a copy."""
    first, last = Stage.split(MODEL, 2)
    shard = Shard.of(MODEL, 1)
    more = activation_bytes(MODEL, shard, last, 100, 16) - activation_bytes(MODEL, shard, first, 100, 16)
    assert more == 16 * 10_000 * 4 * 2


WORK = StepWork(3, 700, 400, ((50, 98),), 4)


@pytest.mark.parametrize("model", [MODEL, MODEL.replace(windows=(None, 128, 1024))], ids=["full", "windows"])
@pytest.mark.parametrize("num_stages", [2, 3])
def test_stages_take_together_what_one_device_takes(model, num_stages, tmp_path):
    """The embedding in the first, the norm and the head in the last, each layer's window where the layer is."""
    device = profile(tmp_path)
    stages = [StepModel(model, device, stage=s).step(WORK) for s in Stage.split(model, num_stages)]
    whole = StepModel(model, device).step(WORK)
    assert sum(s.device for s in stages) == pytest.approx(whole.device, rel=1e-12)
    assert stages[0].embed == whole.embed and stages[-1].tail == whole.tail
    assert all(s.embed == 0 for s in stages[1:]) and all(s.tail == 0 for s in stages[:-1])


def test_sends_by_hand():
    """1,000 tokens of 4,096 bfloat16 and 10 us: at NVLink's 450 GB/s; over PCIe at what copies reach, 25 GB/s."""
    sizes = {name: StepModel(preset("llama3.1-8b"), load_device(name)).send_seconds(1000) for name in ("h100", "l20")}
    assert sizes["h100"] == pytest.approx(8_192_000 / 450e9 + 10e-6)
    assert sizes["l20"] == pytest.approx(8_192_000 / 25e9 + 10e-6)

"""Whole steps: the sum of their parts, laws that hold on every device, and many decodes in one call."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.costmodel.attention import stack_attention
from engine.costmodel.device import device_names, load_device
from engine.costmodel.paper_kernels import NAMES
from engine.costmodel.roofline import DenseOps
from engine.costmodel.step_model import StepModel, StepTime, StepWork
from engine.costmodel.tables import OpTables
from engine.presets import preset
from tests.engine.costmodel.device_files import MODEL, profile

WINDOWED = MODEL.replace(windows=(None, 128, 1024))
MODELS = {
    **{f"8b on {name}": StepModel(preset("llama3.1-8b"), load_device(name)) for name in device_names()},
    "70b on 4 l20": StepModel(preset("llama3.1-70b"), load_device("l20"), tensor=4),
    "70b on 8 h100": StepModel(preset("llama3.1-70b"), load_device("h100"), tensor=8),
    "windows": StepModel(WINDOWED, load_device("a100")),
    **{name: StepModel(preset("yi-6b-200k"), load_device("a100"), kernels=name) for name in NAMES},
}
models = st.sampled_from(list(MODELS.values()))
rows = st.lists(st.integers(1, 20_000), max_size=64)
prompts = st.lists(st.tuples(st.integers(0, 8000), st.integers(1, 4000)), max_size=4)


def work(kv: list[int], prefills=(), sampled: int | None = None) -> StepWork:
    """A step of decode rows of these lengths and of prefills; all are sampled unless said otherwise."""
    num = len(kv) + len(prefills) if sampled is None else sampled
    return StepWork(len(kv), sum(kv), max(kv, default=0), tuple(prefills), num)


def test_a_step_is_the_sum_of_its_parts(tmp_path):
    """Host, embedding, layers with both kinds of attention, norm and head; decode beside prefill costs 1.5 times."""
    device = profile(tmp_path, mixed_decode=1.5)
    ops = DenseOps(MODEL, device, 2, OpTables())
    decode, prefill = stack_attention(MODEL, device, ops.shard)
    step = StepModel(MODEL, device, tensor=2).step(work([100, 300], [(50, 98)], sampled=2))
    layer, held = ops.layer(100)
    attention = 1.5 * decode.seconds(2, 400, 300) + prefill.seconds(((50, 98),))
    assert step.host == pytest.approx(100e-6) and step.embed == ops.embed(100) and step.collective == held > 0
    assert step.layer == pytest.approx(layer + attention) and step.num_layers == 3
    assert step.tail == pytest.approx(ops.op("final_norm", 100) + ops.head(2))
    assert step.device == pytest.approx(step.embed + 3 * step.layer + step.tail)
    assert step.total == pytest.approx(step.device + 100e-6)
    alone = StepModel(MODEL, device, tensor=2).step(work([100, 300]))
    assert alone.layer == pytest.approx(ops.layer(2)[0] + decode.seconds(2, 400, 300))


def test_page_copies(tmp_path):
    """1.6 GB over 2 devices at 800 GB/s each: read and written, 2 ms, and a launch of 2 us."""
    assert StepModel(MODEL, profile(tmp_path), tensor=2).page_copy_seconds(1_600_000_000) == pytest.approx(2.002e-3)


def test_an_empty_step_takes_the_hosts_time(tmp_path):
    """Nothing runs on the device."""
    assert StepModel(MODEL, profile(tmp_path)).step(StepWork()) == StepTime(
        pytest.approx(100e-6), 0.0, 0.0, 0.0, 0.0, 3
    )


@given(models, st.integers(1, 256), st.integers(1, 30_000), st.integers(0, 60_000), st.integers(1, 60))
def test_several_decodes_are_bit_equal_to_each(model, num, mean, more, repeat):
    """`decode_seconds` is `step(...).device` of every one of them."""
    kv, longest = num * mean, mean + more * (num > 1)
    found = model.decode_seconds(num, kv, longest, repeat)
    assert found.dtype == np.float64 and found.shape == (repeat,)
    each = [model.step(StepWork(num, kv + num * i, longest + i, (), num)).device for i in range(repeat)]
    assert found.tolist() == each


@given(models, rows, prompts, st.integers(0, 63), st.integers(1, 2000))
def test_more_work_is_never_faster(model, kv, prefills, which, more):
    """A longer row, another row, a longer prompt, another prompt, a longer prefix, more sampled rows."""
    before = model.step(work(kv, prefills)).total
    longer = [n + more * (i == which % max(len(kv), 1)) for i, n in enumerate(kv)]
    longer_prompts = [(s, n + more * (i == 0)) for i, (s, n) in enumerate(prefills)]
    heavier = [
        work(longer, prefills),
        work([*kv, more], prefills),
        work(kv, longer_prompts),
        work(kv, [*prefills, (0, more)]),
        work(kv, prefills, sampled=len(kv) + len(prefills) + more),
    ]
    if not model.kernels:  # Triton's prefix kernel is slower at prompts without a prefix than at pairs with one
        heavier.append(work(kv, [(s + more, n) for s, n in prefills]))
    assert all(model.step(w).total >= before * (1 - 1e-12) for w in heavier)


RATES = ["bf16_tflops", "memory_gbs", "eff_gemm", "eff_gemm_bw", "eff_attn_prefill", "eff_attn_decode_bw"]


@given(st.sampled_from(RATES), st.floats(1, 2), rows, prompts)
def test_a_faster_device_is_never_slower(tmp_path_factory, rate, factor, kv, prefills):
    """Any rate raised by itself."""
    folder = tmp_path_factory.getbasetemp()
    base = {"bf16_tflops": 100, "memory_gbs": 1000}.get(rate, 0.4)
    slow, fast = (StepModel(MODEL, profile(folder, **{rate: value})) for value in (base, base * factor))
    assert fast.step(work(kv, prefills)).total <= slow.step(work(kv, prefills)).total * (1 + 1e-12)


@given(rows, prompts)
def test_more_devices_compute_less_each(kv, prefills):
    """With all-reduces taken out, each of 4 devices has less to do than 2, and 2 than one; with them, it is told."""
    steps = [StepModel(MODEL, load_device("h100"), tensor=n).step(work(kv, prefills)) for n in (1, 2, 4)]
    launches = [2 * load_device("h100").allreduce(n)[1] if kv or prefills else 0 for n in (2, 4)]
    computed = [steps[0].layer] + [s.layer - s.collective - t for s, t in zip(steps[1:], launches, strict=True)]
    assert computed == sorted(computed, reverse=True) and steps[0].collective == 0
    assert all(0 <= s.collective <= s.layer for s in steps)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=32))
def test_unequal_rows_lie_between_the_mean_and_the_longest(kv):
    """t(mean) <= t <= t(longest), for a batch of so many rows."""
    model, num = StepModel(MODEL, load_device("h100")), len(kv)
    step, equal = model.step(work(kv)).total, model.step(StepWork(num, sum(kv), -(-sum(kv) // num), (), num)).total
    longest = model.step(work([max(kv)] * num)).total
    assert equal <= step + 1e-9 and step <= longest + 1e-9


def test_what_is_printed_says_where_it_comes_from():
    """Constants of the stack and of the kernels, each with its kind."""
    text = MODELS["vllm-0.4.2"].describe()
    assert "constants vllm-0.14; estimated: " in text and "kernels vllm-0.4.2" in text
    lines = [line for line in text.splitlines() if line.startswith(("eff_", "t0_", "edge_"))]
    assert len(lines) > 12
    assert all(any(f" {kind} " in line for kind in ("fitted", "measured", "estimated")) for line in lines)

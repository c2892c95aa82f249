"""LayerKV writes, parks, streams and brings home single layers; no token notices. Invariant 4 on the tiny real engine.

Every engine here has NaN in all KV that nobody has written, a pool for about two of the longer sequences, and copies
that land late by chance. The plain run is `identity`'s: each prompt alone, in a large pool, with nothing on the host.
"""

import subprocess
import sys
import time
from collections import Counter
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import LayerKVConfig
from engine.executor.transfers import Lane
from engine.request import SamplingParams
from engine.scheduler.layerkv.config import PATTERNS, STREAMS
from tests.engine.identity import LOADS, OUTPUT, RELAXED, check_close, plain, serve, variant
from tests.engine.tiny import DEEP, prompts, tiny_engine

ROOT = Path(__file__).resolve().parents[2]
RETAINED = (0, 1, DEEP.num_layers // 2, DEEP.num_layers)
PAGES = 10  # of each layer: the longest sequence takes 7
LOAD = [(90, 0), (40, 0), (65, 1), (17, 0), (63, 3), (33, 0)]  # prompt tokens, steps since the one before
KNOBS = {
    "chunked": st.booleans(),
    "retained_layers": st.sampled_from([None, *RETAINED]),
    "pattern": st.sampled_from(PATTERNS),
    "stream": st.sampled_from(STREAMS),
    "overlap": st.booleans(),
    "append_pages": st.sampled_from([1, 2]),
    "slo_rule": st.booleans(),
    "tpot_slo": st.sampled_from([0.001, 0.02, 1.0]),
    "forecast": st.booleans(),
    "lengths": st.sampled_from(["quantile", "oracle"]),
}


def land_late(engine, most: float = 0.01) -> None:
    """Copies to the host end up to `most` seconds late, each by chance; those back, for which steps wait, a tenth."""
    transfers = engine.executor.transfers
    for seed, (lane, seconds) in enumerate(((transfers._out, most), (transfers._in, most / 10))):
        rng = np.random.default_rng(seed)

        def wait(transfer, lane=lane, seconds=seconds, rng=rng):
            time.sleep(seconds * rng.random())
            Lane._wait_for(lane, transfer)

        lane._wait_for = wait


@lru_cache(None)
def device(deterministic: bool, tensor: int = 1):
    """What the runs share. A paced link makes a step wait until what it reads has come."""
    options = {"deterministic": deterministic, "tensor": tensor, "link_gbs": 5.0}
    engine = tiny_engine(DEEP, PAGES, host_pages=80, transient_pages=PAGES, **options)
    land_late(engine)
    return engine


def served(engine, load, knobs: LayerKVConfig, budget=None, async_depth=1, forced=None, policy="layerkv"):
    """Outputs of a load under LayerKV with these knobs, and what happened how often."""
    lengths, gaps = zip(*load, strict=True)
    engine = variant(engine, async_depth, budget, policy=policy, layerkv=knobs)
    forced = forced or [()] * len(load)
    params = [SamplingParams(max_tokens=OUTPUT, ignore_eos=True, forced_tokens=t) for t in forced]
    outputs, preemptions = serve(engine, prompts(lengths), params, gaps)
    happened = Counter(preempted=preemptions)
    for copy in (c for record in engine.step_log for c in record.copies):
        assert copy.ok
        way = "out" if copy.out else "in"
        happened[f"streamed {way}" if copy.transient else f"moved {way}"] += 1
    return outputs, happened


def check_bits(load, knobs: LayerKVConfig, **options) -> Counter:
    """Check (a): every bit of every logit is as in the plain run."""
    outputs, happened = served(device(True), load, knobs, **options)
    for prompt, out in zip(prompts([n for n, _ in load]), outputs, strict=True):
        tokens, logits = plain("deep", tuple(prompt), True)
        assert tuple(out.token_ids) == tokens
        assert np.array_equal(out.logits, logits)
    return happened


def check_forced(engine, load, knobs: LayerKVConfig, **options) -> Counter:
    """Check (b): teacher-forced, the logits are as close as sums in another order allow."""
    expected = [plain("deep", tuple(prompt), False) for prompt in prompts([n for n, _ in load])]
    outputs, happened = served(engine, load, knobs, forced=[tokens for tokens, _ in expected], **options)
    assert [tuple(o.token_ids) for o in outputs] == [tokens for tokens, _ in expected]
    check_close(np.concatenate([e for _, e in expected]), np.concatenate([o.logits for o in outputs]))
    return happened


def expect(happened: Counter, retained: int) -> None:
    """What was not retained was written for the host and streamed from there; what was retained had to leave."""
    if retained < DEEP.num_layers:
        assert happened["streamed out"] > 0 and happened["streamed in"] > 0, happened
    else:
        assert happened["moved out"] > 0, happened


QUICK = [
    (0, "interleave"), (1, "interleave"), (1, "suffix"), (2, "prefix"), (2, "random"), (2, "interval"),
    (4, "interleave"), (4, "random"),
]  # fmt: skip


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("retained, pattern", QUICK)
def test_a_no_bit_changes(retained, pattern, chunked):
    """However many layers stay, whichever, and whether prompts are computed whole or in chunks."""
    knobs = LayerKVConfig(retained_layers=retained, pattern=pattern, chunked=chunked, stream="always", slo_rule=False)
    depth = QUICK.index((retained, pattern)) % 2
    expect(check_bits(LOAD, knobs, budget=40 if chunked else None, async_depth=depth), retained)


@pytest.mark.long
@pytest.mark.parametrize("async_depth", [0, 1])
@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("retained, pattern", [*product(RETAINED, PATTERNS)])
def test_a_no_bit_changes_in_any_combination(retained, pattern, chunked, async_depth):
    """All of them."""
    for stream in STREAMS:
        knobs = LayerKVConfig(
            retained_layers=retained, pattern=pattern, chunked=chunked, stream=stream, slo_rule=stream == "hidden"
        )
        expect(check_bits(LOAD, knobs, budget=40 if chunked else None, async_depth=async_depth), retained)


@settings(RELAXED, max_examples=6)
@given(
    load=LOADS,
    async_depth=st.integers(0, 1),
    budget=st.sampled_from([None, 16, 40]),
    knobs=st.builds(LayerKVConfig, **KNOBS),
)
def test_a_no_bit_changes_with_any_knobs(load, knobs, **options):
    """Few loads; `--long` serves many."""
    check_bits(load, knobs, **options)


@pytest.mark.long
@settings(RELAXED, max_examples=150)
@given(
    load=LOADS,
    async_depth=st.integers(0, 1),
    budget=st.sampled_from([None, 16, 40]),
    knobs=st.builds(LayerKVConfig, **KNOBS),
)
def test_a_no_bit_changes_with_any_knobs_at_length(load, knobs, **options):
    """The same, over many more."""
    check_bits(load, knobs, **options)


@pytest.mark.parametrize("async_depth", [0, 1])
def test_a_nor_does_one_when_whole_requests_are_parked(async_depth):
    """`paged_park`, the baseline."""
    knobs = LayerKVConfig(slo_rule=False)
    happened = check_bits(LOAD, knobs, async_depth=async_depth, policy="paged_park")
    assert happened["moved out"] > 0 and happened["moved in"] > 0 and happened["preempted"] > 0


@pytest.mark.parametrize(
    "retained, pattern, chunked", [(0, "interleave", True), (2, "prefix", False), (4, "random", True)]
)
def test_b_teacher_forced_logits_are_close(retained, pattern, chunked):
    """Default buckets: with streams and chunks, batches have other shapes than in the plain run."""
    knobs = LayerKVConfig(retained_layers=retained, pattern=pattern, chunked=chunked, slo_rule=False)
    expect(check_forced(device(False), LOAD, knobs, budget=40 if chunked else None), retained)


@pytest.mark.long
def test_b_on_four_devices():
    """Devices are asked for before JAX starts, so this file runs as a program of its own."""
    command = [sys.executable, "-m", "tests.engine.test_layerkv_tokens"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split()[-1] == "done"


def on_four_devices():
    """Two devices hold the same kv head; pages and blocks are spread over all of them."""
    for retained, chunked in ((0, False), (2, True), (4, False)):
        knobs = LayerKVConfig(retained_layers=retained, chunked=chunked, slo_rule=False)
        expect(check_forced(device(False, tensor=4), LOAD, knobs, budget=40 if chunked else None), retained)


if __name__ == "__main__":
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    on_four_devices()
    print("done")

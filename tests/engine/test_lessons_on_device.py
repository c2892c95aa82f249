"""The lessons of `test_lessons.py` that need the real executor: programs, lanes, pinned memory, a paced link."""

import gc
import pickle
import threading
import time
import weakref
from collections import Counter
from itertools import pairwise

import jax
import numpy as np
import pytest

from engine.errors import OutOfPages
from engine.executor import distributed, transfers
from engine.request import SamplingParams
from tests.engine.test_fuzz import CompileCount
from tests.engine.tiny import NARROW, WIDE, prompts, tiny_engine

PARAMS = SamplingParams(max_tokens=20, ignore_eos=True)
LENGTHS = [44, 46, 30, 60]
LINK_GBS = 0.02  # 16 pages of 64 KiB take 50 ms


def swapping_engine(model=WIDE, **options):
    """A pool that holds two of the requests, so that the others are swapped out and in."""
    return tiny_engine(model, num_pages=8, host_pages=64, preemption="swap", deterministic=True, **options)


@pytest.fixture(scope="module")
def undisturbed():
    """What the requests produce when nobody is ever preempted."""
    return tiny_engine(WIDE, num_pages=64, deterministic=True).generate(prompts(LENGTHS), PARAMS)


def check(outputs, undisturbed, preempted=True):
    """The same bits, although somebody was swapped."""
    assert not preempted or sum(o.metrics.num_preemptions for o in outputs) > 0
    for out, want in zip(outputs, undisturbed, strict=True):
        assert out.token_ids == want.token_ids and np.array_equal(out.logits, want.logits)


def drained(engine):
    """Every page, block and copy is gone."""
    while engine.has_work():
        engine.step()
    assert engine.store.num_free_pages == engine.store.num_pages and engine.store.num_host_pages == 0
    assert not engine.executor.transfers._blocks and not engine.executor.transfers.busy


@pytest.mark.parametrize("async_depth", [0, 1])
def test_a_paced_link_changes_no_bit_and_every_byte_is_accounted(undisturbed, async_depth):
    """Lessons 1 and 2 on the device, behind a link that is slow enough for steps to overtake copies: the same logits.
    Bytes by direction and layer are those of the pages moved, and take at least their time on the link."""
    engine = swapping_engine(link_gbs=LINK_GBS, async_depth=async_depth)
    moved = Counter()
    submit = engine.executor.submit

    def watched(plan):
        for m in plan.moves:
            moved[m.out, m.layer] += len(m.pages)
        return submit(plan)

    engine.executor.submit = watched
    check(engine.generate(prompts(LENGTHS), PARAMS), undisturbed)
    drained(engine)
    copies = [c for record in engine.step_log for c in record.copies] + engine._copies
    found = Counter()
    for c in copies:
        found[c.out, c.layer] += c.num_bytes
        assert c.ok and c.end - c.start >= 0.999 * c.num_bytes / (LINK_GBS * 1e9)
    assert found == {key: pages * engine.memory.page_bytes for key, pages in moved.items()} and len(found) == 4
    for out in (True, False):
        lane = sorted((c for c in copies if c.out is out), key=lambda c: c.start)
        assert all(a.end <= b.start for a, b in pairwise(lane)), "two copies share one lane"
    out, back = (sum(getattr(r, name) for r in engine.step_log) for name in ("bytes_out", "bytes_in"))
    assert out == back == sum(c.num_bytes for c in copies) / 2


def test_lesson_04_a_layer_that_was_not_landed_is_loud(monkeypatch, undisturbed):
    """4. One accessor forgot to wait, and a few answers in ten thousand were wrong. Pages are NaN until their layer has
    landed: an engine that skips one landing produces NaN at once, not a slightly different answer."""
    engine = swapping_engine(link_gbs=LINK_GBS)
    land, skipped = engine.executor.transfers.land, []

    def forgetful(kv, transfer, first=0):
        if transfer.move.layer == 1 and not skipped:
            skipped.append(transfer.done.wait())
            return kv
        return land(kv, transfer, first)

    monkeypatch.setattr(engine.executor.transfers, "land", forgetful)
    outputs = engine.generate(prompts(LENGTHS), PARAMS)
    wrong = [o for o, want in zip(outputs, undisturbed, strict=True) if not np.array_equal(o.logits, want.logits)]
    assert skipped and len(wrong) == 1 and np.isnan(wrong[0].logits).any()


def test_lesson_05_the_wait_is_in_the_path_that_serves(monkeypatch, undisturbed):
    """5. Graph replay skipped the per-layer waits: they existed in the path that was tested. After warm-up, with every
    program compiled and nothing compiled again, a block is scattered only when the paced link has brought it, and its
    layer runs after that."""
    engine = swapping_engine(link_gbs=LINK_GBS)
    compiles = CompileCount()
    engine.warmup()
    compiles.n = 0
    executor, order = engine.executor, []
    scatter, land = executor.transfers._scatter, executor.transfers.land
    arrived = {}
    layer_of = executor.programs.layer

    def watched_land(kv, transfer, first=0):
        arrived.update({id(block): transfer for block in transfer.to_land})
        return land(kv, transfer, first)

    def watched_scatter(kv, ids, block):
        assert arrived[id(block)].done.is_set(), "scattered before the link has brought it"
        order.append(("landed", arrived[id(block)].move.layer))
        return scatter(kv, ids, block)

    def watched_layer(bucket):
        program = layer_of(bucket)

        def run(weights, kv, x, rope, table, packed, index, *rest):
            order.append(("layer", int(index)))
            return program(weights, kv, x, rope, table, packed, index, *rest)

        return run

    monkeypatch.setattr(executor.transfers, "land", watched_land)
    monkeypatch.setattr(executor.transfers, "_scatter", watched_scatter)
    monkeypatch.setattr(executor.programs, "layer", watched_layer)
    check(engine.generate(prompts(LENGTHS), PARAMS), undisturbed)
    assert compiles.n == 0
    landings = [i for i, (what, _) in enumerate(order) if what == "landed"]
    assert landings
    for i in landings:
        following = next(j for j in range(i, len(order)) if order[j][0] == "layer")
        assert order[following] == ("layer", order[i][1]), "a layer's pages land just before it runs"


def test_lesson_06_host_buffers_belong_to_the_copy(monkeypatch):
    """6. An asynchronous copy read a pinned table that the next step had overwritten. JAX may read a NumPy array as
    long as it lives, so every one that is handed over must be its own memory and stay as it is, at every step."""
    given = []
    device_put = jax.device_put

    def keep(array, *args, **kwargs):
        if isinstance(array, np.ndarray) and array.size:
            given.append((array, array.copy()))
        return device_put(array, *args, **kwargs)

    monkeypatch.setattr(jax, "device_put", keep)
    engine = swapping_engine(NARROW)
    kinds = [{}, {"temperature": 0.9, "seed": 1}, {"forced_tokens": (5, 6, 7)}, {"logprobs": 2}]
    params = [SamplingParams(max_tokens=20, ignore_eos=True, **kind) for kind in kinds]
    engine.generate(prompts(LENGTHS), params)
    assert len(given) > 100
    assert all(np.array_equal(array, before) for array, before in given), (
        "an array was changed after it was handed over"
    )
    spans = sorted((a.__array_interface__["data"][0], a.nbytes) for a, _ in given)
    assert all(a + n <= b for (a, n), (b, _) in pairwise(spans)), "two arrays share memory"


@pytest.mark.parametrize("out", [True, False])
@pytest.mark.parametrize("how", ["start", "arrive"])
def test_copies_that_fail_cost_work_and_no_token(monkeypatch, undisturbed, out, how):
    """Lesson 13 on the device. A copy cannot be started (`device_put` raises), or fails on its way (the lane finds an
    error): its sequence is recomputed, the arena stays whole, and the others are served on."""
    engine = swapping_engine(link_gbs=LINK_GBS)
    memory, lane = ("pinned_host", "lane out") if out else ("device", "lane in")
    calls = Counter()

    def once_failing(original, concerns):
        def run(x, *args):
            if concerns(*args):
                calls["seen"] += 1
                if calls["seen"] == 2:
                    raise RuntimeError("injected")
            return original(x, *args)

        return run

    if how == "start":
        to = engine.executor.transfers._pinned if out else engine.executor.transfers._device
        assert to.memory_kind == memory
        monkeypatch.setattr(transfers.jax, "device_put", once_failing(jax.device_put, lambda *a: a == (to,)))
    else:
        mine = lambda *_: threading.current_thread().name == lane  # noqa: E731
        monkeypatch.setattr(transfers.jax, "block_until_ready", once_failing(jax.block_until_ready, mine))
    check(engine.generate(prompts(LENGTHS), PARAMS), undisturbed)
    assert calls["seen"] >= 2
    assert sum(not c.ok for r in engine.step_log for c in r.copies) == 1
    drained(engine)


def test_lesson_14_decisions_are_made_once(monkeypatch):
    """14. Ranks disagreed about whether an allocation had succeeded; one skipped a collective, and all hung. Here one
    process decides, and the others run its calls (`distributed.LeadingExecutor`): allocations that fail, preemptions
    and an abort there leave the same KV, page table and tokens everywhere, although the others have no store at all."""
    engine, other = (tiny_engine(NARROW, num_pages=8, max_num_seqs=3, deterministic=True) for _ in range(2))
    follower, calls = other.executor, []

    def send(message):
        name, args = pickle.loads(pickle.dumps(message))
        calls.append(name)
        getattr(follower, name)(*args)

    monkeypatch.setattr(distributed, "send", send)
    engine.executor.__class__ = distributed.LeadingExecutor
    allocate, allocations, failed = engine.store.pool.allocate, [], []

    def failing(counts):
        allocations.append(counts)
        if len(allocations) in (2, 7, 13):
            raise OutOfPages("injected")
        return allocate(counts)

    monkeypatch.setattr(engine.store.pool, "allocate", failing)
    requests = [engine._live[engine.add_request(p, PARAMS)] for p in prompts(LENGTHS)]
    while engine.has_work():
        try:
            engine.step()
        except OutOfPages:
            failed.append(len(calls))
        if len(calls) > 20:
            engine.abort(requests[1].id)
    assert len(failed) == 3 and sum(r.num_preemptions for r in requests) > 3 and "submit" in calls
    for name in ("_kv", "_table", "_last_tokens"):
        ours, theirs = (jax.tree.leaves(getattr(executor, name)) for executor in (engine.executor, follower))
        assert all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(ours, theirs, strict=True))
    assert all(r.finish_reason == ("abort" if r is requests[1] else "length") for r in requests)


def test_an_idle_lane_holds_no_memory():
    """What a lane carried is gone when its copies are: no block lives on in a thread's frame."""
    engine = swapping_engine(NARROW, capture_logits=False)
    blocks = []
    for lane in (engine.executor.transfers._out, engine.executor.transfers._in):
        start = lane.start
        lane.start = lambda t, start=start: (blocks.append(weakref.ref(t.arrays[0].k)), start(t))
    engine.generate(prompts(LENGTHS), PARAMS)
    drained(engine)
    assert len(blocks) >= 4
    del start, lane
    for _ in range(50):  # the thread lets go a moment after it has reported
        gc.collect()
        if not any(ref() is not None for ref in blocks):
            return
        time.sleep(0.01)
    raise AssertionError(f"{sum(ref() is not None for ref in blocks)} of {len(blocks)} blocks are alive")

"""The simulated executor on plans worked out by hand, and laws for any plan."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.clock import VirtualClock
from engine.config import EngineConfig
from engine.executor.link import FifoLink, Link
from engine.executor.sim_executor import SimExecutor
from engine.memory.moves import Move, Stream
from engine.scheduler.plan import Plan, Prefill
from tests.engine.executor.flat_cost import FlatCost

NO_DELTAS, NOBODY = np.empty((0, 4), np.int32), np.empty(0, np.int32)


def plan(step=1, positions=(), prefills=(), moves=(), streams=()):
    slots = np.arange(len(positions), dtype=np.int32)
    at = np.array(positions, np.int32)
    return Plan(step, slots, np.full(len(slots), -1, np.int32), at, prefills, NO_DELTAS, None, None, moves, streams)


def out(block, layer, pages, transient=False):
    return Move(True, block, layer, np.arange(pages, dtype=np.int32), transient=transient)


def back(block, layer, pages, transient=False):
    return Move(False, block, layer, np.arange(pages, dtype=np.int32), ("a",), transient)


def executor(cost, depth=1, rate=256.0, kind=Link, prefetch_depth=1, unit=0.0):
    config = EngineConfig(async_depth=depth, prefetch_depth=prefetch_depth)
    return SimExecutor(cost, config, VirtualClock(), 1, kind(rate, 0.0, unit), kind(rate, 0.0, unit))


ONE_SECOND = {"base": 1.0, "row": 0.0, "kv": 0.0, "token": 0.0}  # in two layers; moving a page on the device: 1/4096 s


def test_steps_queue_and_the_host_delays_only_an_idle_device():
    """Each takes 1 s, the host 0.25 s: what is submitted while the device works starts when it is free."""
    e = executor(FlatCost(**ONE_SECOND, host=0.25))
    first, second = e.submit(plan(1, [3])), e.submit(plan(2, [4]))
    assert (first.start, first.ends, second.start, second.ends) == (0.0, [1.25], 1.25, [2.25])
    assert (e.collect(first).end, e.clock.now(), e.collect(second).end) == (1.25, 1.25, 2.25)
    e.clock.wait_until(5.0)
    assert e.submit(plan(3, [5])).ends == [6.25]


def test_a_copy_out_is_gathered_first_and_outlasts_its_step():
    """1,024 pages: a quarter of a second to gather, 4 s on the link."""
    e = executor(FlatCost(**ONE_SECOND))
    result = e.collect(e.submit(plan(moves=(out(7, 0, 1024),), positions=[0])))
    assert (result.end, result.copies) == (1.25, ())
    (copy,) = e.wait_for_copies()
    assert (copy.out, copy.block, copy.ok, copy.num_bytes, copy.start, copy.end) == (True, 7, True, 1024, 0.25, 4.25)
    assert e.clock.now() == 4.25


@pytest.mark.parametrize("depth, end", [(0, 5.25), (1, 4.75)])
def test_a_layer_waits_for_what_it_reads(depth, end):
    """Layer 1's 1,024 pages are asked for with the step (depth 1) or when layer 0 has ended at 0.5 s; they take 4 s to
    come, 0.25 s to scatter, and the layer 0.5 s."""
    e = executor(FlatCost(**ONE_SECOND), prefetch_depth=depth)
    result = e.collect(e.submit(plan(moves=(back(7, 1, 1024),), positions=[0])))
    assert result.end == end
    assert [(c.out, c.end, c.owners) for c in result.copies] == [(False, end - 0.75, ("a",))]


def test_what_is_regathered_leaves_behind_its_layer():
    """Layer 0 fetches 256 pages (1 s, 1/16 s to scatter), computes 0.5 s, gathers them (1/16 s), and they leave."""
    e = executor(FlatCost(**ONE_SECOND))
    stream = Stream(0, np.zeros((1, 4), np.int32), (back(1, 0, 256, True),), (out(2, 0, 256, True),))
    result = e.collect(e.submit(plan(streams=(stream,), positions=[0])))
    assert result.end == 1 + 1 / 16 + 0.5 + 1 / 16 + 0.5
    (copy,) = e.wait_for_copies()
    assert (copy.transient, copy.start, copy.end) == (True, 1.625, 2.625)


@pytest.mark.parametrize("kind", [Link, FifoLink])
def test_the_two_all_reduces_of_a_layer_wait_for_a_unit_each(kind):
    """Layers of 0.75 s, each half of which ends with 1/8 s of all-reduce; a quarter of a second to gather 1,024 pages,
    which move in units of 3/16 s. All four all-reduces ask 1/16 s behind a unit's beginning."""
    e = executor(FlatCost(**ONE_SECOND, collective=0.25), kind=kind, unit=48)
    result = e.collect(e.submit(plan(moves=(out(7, 0, 1024),), positions=[0])))
    assert result.end == 0.25 + 2 * 0.75 + 4 / 8
    (copy,) = e.wait_for_copies()
    assert (copy.start, copy.end) == (0.25, 0.25 + 4 + 4 / 8)
    assert e.collect(e.submit(plan(2, positions=[1]))).end == 4.75 + 1.5  # nothing waits without copies


def test_a_copy_is_reported_once_and_not_before_it_ended():
    """Two steps of 1 s are under way when a copy ends at 1.5 s."""
    e = executor(FlatCost(**ONE_SECOND))
    first = e.submit(plan(1, [0], moves=(out(7, 0, 320),)))  # 5/64 s to gather, 1.25 s on the link
    second = e.submit(plan(2, [1]))
    assert e.collect(first).copies == ()
    assert [c.end for c in e.collect(second).copies] == [5 / 64 + 1.25]
    assert e.collect(e.submit(plan(3, [2]))).copies == ()


def test_teacher_forcing_gives_the_forced_tokens():
    e = executor(FlatCost())
    forced = Plan(1, np.array([0, 1], np.int32), np.full(2, -1, np.int32), np.zeros(2, np.int32), (), NO_DELTAS, None,
                  np.array([5, -1], np.int32))  # fmt: skip
    assert e.collect(e.submit(forced)).tokens.tolist() == [5, 0]


MOVES = st.lists(st.tuples(st.booleans(), st.integers(0, 1), st.integers(1, 400)), max_size=4)
STEPS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 200), MOVES), min_size=1, max_size=6)


def served(steps, kind=Link, rate=256.0, depth=1, collective=0.0, unit=0.0):
    """Start and end of each step, and all copies; results are collected `depth` steps late."""
    e, block = executor(FlatCost(host=1 / 512, collective=collective), depth, rate, kind, unit=unit), 0
    tickets, results = [], []
    for number, (rows, tokens, moves) in enumerate(steps, 1):
        prefills = (Prefill(99, 0, np.zeros(tokens, np.int32), True),) if tokens else ()
        made = tuple((out if o else back)(block + i, layer, n) for i, (o, layer, n) in enumerate(moves))
        block += len(moves)
        tickets.append(e.submit(plan(number, range(rows), prefills, made)))
        if len(tickets) > depth:
            results.append(e.collect(tickets.pop(0)))
    results += [e.collect(ticket) for ticket in tickets]
    copies = [c for r in results for c in r.copies]
    while len(copies) < block:
        copies += e.wait_for_copies()
    return results, copies


@settings(max_examples=150, deadline=None)
@given(steps=STEPS, kind=st.sampled_from([Link, FifoLink]), depth=st.integers(0, 1))
def test_laws(steps, kind, depth):
    """No event in the past; a step is no shorter than its compute, nor longer than all its parts one after the other;
    no more bytes pass than the link carries."""
    results, copies = served(steps, kind, depth=depth)
    cost, before, backlog = FlatCost(), 0.0, 0.0
    for (rows, tokens, moves), result in zip(steps, results, strict=True):
        assert before <= result.start <= result.end
        work = sum(n for _, _, n in moves) / 4096
        compute = cost.base + cost.row * rows + cost.kv * rows * (rows + 1) / 2 + cost.token * tokens
        backlog += sum(n for _, _, n in moves) / 256
        assert result.end - result.start >= compute + work - 1e-9
        assert result.end - result.start <= compute + work + 1 / 512 + backlog + 1e-9
        before = result.end
    assert len({(c.block, c.out) for c in copies}) == len(copies) == sum(len(moves) for *_, moves in steps)
    for way in (True, False):
        ended = sorted((c for c in copies if c.out is way), key=lambda c: c.end)
        for c in ended:
            assert c.end - c.start >= c.num_bytes / 256 - 1e-9
            inside = [d for d in ended if d.start >= c.start and d.end <= c.end]
            assert sum(d.num_bytes for d in inside) <= 256 * (c.end - c.start) * (1 + 1e-9)


@settings(max_examples=80, deadline=None)
@given(steps=STEPS, depth=st.integers(0, 1), unit=st.sampled_from([1, 16, 100]))
def test_units_delay_each_all_reduce_by_one_at_most(steps, depth, unit):
    """One copy after the other, on links that all-reduces hold for 1/256 s a layer."""
    stopping, _ = served(steps, FifoLink, 256.0, depth, 1 / 256)
    results, copies = served(steps, FifoLink, 256.0, depth, 1 / 256, unit)
    for i, (a, b) in enumerate(zip(stopping, results, strict=True), 1):
        assert a.end - 1e-9 <= b.end <= a.end + 4 * i * unit / 256 + 1e-9
    assert sum(c.num_bytes for c in copies) == sum(n for *_, moves in steps for _, _, n in moves)


@settings(max_examples=80, deadline=None)
@given(steps=STEPS, depth=st.integers(0, 1))
def test_more_bandwidth_is_never_slower(steps, depth):
    """One copy after the other; what holds under processor sharing is in test_overlap.py."""
    slow, _ = served(steps, FifoLink, 256.0, depth)
    fast, _ = served(steps, FifoLink, 512.0, depth)
    assert all(f.end <= s.end + 1e-9 for f, s in zip(fast, slow, strict=True))

"""The lessons of `test_lessons.py` about requests that end, copies that fail and steps that fail while KV moves."""

import itertools

import pytest

from engine.errors import OutOfPages
from engine.request import Phase
from tests.engine.pattern_engine import PARAMS, finish, land_all, pattern_engine, serving, swap_out
from tests.engine.pattern_executor import Injected
from tests.engine.pattern_model import MODEL


@pytest.mark.parametrize("order", list(itertools.permutations(["abort", "out", "step"])))
@pytest.mark.parametrize("ok", [True, False])
def test_lesson_12_every_order_of_abort_and_copy_out(order, ok):
    """12. An abort with a transfer in flight leaked, freed twice or crashed, depending on which came first. Whether the
    copies out land or fail, before or after the abort, and whether a step lies between."""
    engine = pattern_engine(pages=9, host_pages=100)
    a, b = serving(engine, 9, 9)
    swap_out(engine, a)
    engine.step()
    for what in order:
        if what == "abort":
            assert engine.abort("a")
        elif what == "out":
            while engine.executor.lanes[True]:
                engine.executor.land(True, ok)
        else:
            engine.step()
        engine.state.check()
    finish(engine, a, b)


@pytest.mark.parametrize("order", list(itertools.permutations(["abort", "in", "step", "again"])))
@pytest.mark.parametrize("lost", [0, 1, 3])
def test_lesson_12_every_order_of_abort_and_copy_in(order, lost):
    """12, the other direction: copies in that land late or fail, before or after the abort, and a new request that
    takes the name of the aborted one."""
    engine = pattern_engine(pages=9, host_pages=100)
    a, b = serving(engine, 9, 9)
    requests = [a, b]
    swap_out(engine, a)
    engine.step()
    land_all(engine, True)
    engine.executor.fail_start[False] = lost
    while a.phase is Phase.SWAPPED:
        engine.step()
    for what in order:
        if what == "abort":
            assert engine.abort(a.id)
        elif what == "in":
            land_all(engine, False)
        elif what == "step":
            engine.step()
        elif "a" not in engine._live:
            engine.add_request([3] * 9, PARAMS, request_id="a")
            requests.append(engine._live["a"])
        engine.state.check()
    finish(engine, *requests)


def test_lesson_12_abort_copy_out_and_copy_in_in_one_step():
    """12, all at once: in one step a copy out lands, another fails, a copy in ends, and their requests are aborted."""
    for aborted in itertools.chain.from_iterable(itertools.combinations("abc", n) for n in range(4)):
        engine = pattern_engine(pages=14, host_pages=300)
        requests = serving(engine, 9, 9, 9)
        swap_out(engine, requests[0])
        engine.step()
        land_all(engine, True)
        while requests[0].phase is Phase.SWAPPED:
            engine.step()
        for request in requests[1:]:
            swap_out(engine, request)
        engine.step()
        for _ in range(MODEL.num_layers):
            engine.executor.land(True)
        engine.executor.land(True, ok=False)
        land_all(engine, False)
        for name in aborted:
            engine.abort(name)
        engine.step()
        engine.state.check()
        finish(engine, *requests)


@pytest.mark.parametrize("out", [True, False])
@pytest.mark.parametrize("failed", range(1, 2**MODEL.num_layers))
def test_lesson_13_the_layers_of_a_sequence_land_or_fail_as_one(out, failed):
    """13. Some layers of a chunk were evicted or never stored, and existence was checked on layer 0 only. Any set of
    layers whose copies fail takes the others with it: nothing is left of the sequence, and it is recomputed."""
    engine = pattern_engine(pages=9, host_pages=100)
    a, b = serving(engine, 9, 9)
    swap_out(engine, a)
    engine.step()
    if not out:
        land_all(engine, True)
        start = engine.executor._start

        def failing(move):
            engine.executor.fail_start[False] = int(not move.out and failed >> move.layer & 1)
            return start(move)

        engine.executor._start = failing
    else:
        for layer in range(MODEL.num_layers):
            engine.executor.land(True, ok=not failed >> layer & 1)
    while not a.lost:
        engine.step()
        engine.state.check()
    assert not engine.store.host.holds("a"), "a part of it is still there"
    finish(engine, a, b)


@pytest.mark.parametrize("aborted", [None, "a", "b"])
def test_lesson_13_a_failed_allocation_leaves_nothing_behind(aborted):
    """13, the other half: pins of a load that could not be allocated stayed, the pool filled up, the engine hung. The
    second of two sequences in one plan gets no pages: the first one's reservation goes back too, and whoever sits in
    its slot next finds nothing of it there, not even the token it was about to decode."""
    engine = pattern_engine(pages=12, host_pages=300)
    a, b = serving(engine, 9, 9)
    for request in (a, b):
        swap_out(engine, request)
    engine.step()
    land_all(engine, True)
    engine.executor.wait_lands = True, True
    allocate, calls = engine.store.pool.allocate, []

    def failing(counts):
        calls.append(counts)
        if len(calls) == 2:
            raise OutOfPages("injected")
        return allocate(counts)

    engine.store.pool.allocate = failing
    with pytest.raises(OutOfPages):
        for _ in range(3):
            engine.step()
    engine.state.check()
    assert engine.store.num_free_pages == engine.store.num_pages
    engine.abort(aborted)
    finish(engine, a, b)


@pytest.mark.parametrize("where", ["poison", "submit", "half way", "collect"])
@pytest.mark.parametrize("moment", ["out", "in"])
def test_a_step_that_fails_with_its_copies_loses_no_move(where, moment):
    """Ours: a plan that never reached the executor left copies that nobody had started, and the engine waited for them
    for ever; a sequence swapped out with a token in flight came back one token short."""
    engine = pattern_engine(pages=9, host_pages=100)
    a, b = serving(engine, 9, 9)
    swap_out(engine, a)
    if moment == "in":
        engine.step()
        land_all(engine, True)
        for _ in range(2):
            engine.step()
    engine.executor.fail.add(where)
    with pytest.raises(Injected):
        for _ in range(3):
            engine.step()
    engine.state.check()
    finish(engine, a, b)

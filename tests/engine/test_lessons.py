"""Ways in which other engines lost, leaked or mixed up KV while it moved, one regression test each.

The numbers are those of a survey of their issue trackers; each docstring says what went wrong there. This half needs no
device: pages hold patterns (`pattern_executor`), and every read of every step is checked. Elsewhere:

* 5, 6, and 1, 2, 4, 13 on real memory, 14: `test_lessons_on_device.py`
* 12, 13: `test_lessons_failures.py`
* 15 here, as far as it applies: what is on the host belongs to a request id, not to a hash. The rest of it (256-bit
  hashes or tokens compared on a hit, tagged key fields, a salt per tenant that reaches every tier) has no subject
  before there is a prefix tree, and comes with it (issue "vTensor / FlexInfer").
"""

import numpy as np
import pytest

from engine.errors import OutOfPages, RequestError
from engine.request import Phase, SamplingParams
from tests.engine.pattern_engine import PARAMS, finish, land_all, pattern_engine, serving, swap_out
from tests.engine.pattern_model import LOST, MODEL, expected_output


def test_lesson_01_a_page_is_copied_out_after_it_is_written():
    """1 (RAW). A store read KV while compute was still writing it: the scheduler's word that it was done was host
    bookkeeping. Here the step that writes the last token is in flight when the copy out is planned, and the block must
    hold that token; the pages are reused in the very plan that copies them out."""
    engine = pattern_engine(pages=10, host_pages=100)
    a, b = serving(engine, 9, 17, steps=2)
    assert a.in_flight == 1, "a step in flight still writes"
    newest = int(engine.state.cached[a.slot]) - 1
    swap_out(engine, a)
    freed = set(engine.store._moves[0].pages.tolist())
    c = engine.add_request([1] * 9, PARAMS, request_id="c")
    engine.step()
    layer_0 = engine.executor.blocks[0].ravel()
    assert layer_0[newest] >= 0 and (layer_0[: newest + 1] & 0xFF == np.arange(newest + 1)).all()
    land_all(engine, True)
    while not freed & set(engine.store.table[engine.state.running, 0].ravel().tolist()):
        engine.step()
    finish(engine, a, b)
    assert c not in engine._live


def test_lesson_02_a_copy_in_waits_for_readers_of_its_pages():
    """2 (WAR). A load overwrote a reused page that was still being read. Here b's stop is found late: while the step
    with its last row is in flight, its pages are free, and a's copies come into them."""
    engine = pattern_engine(pages=8, host_pages=100)
    a, b = serving(engine, 9, 9)
    b.stop_ids, b.may_stop = frozenset(expected_output(b)[11:12]), True
    swap_out(engine, a)
    while len(b.output) < 11:
        engine.step()
        pages = set(engine.store.table[b.slot, :, : engine.store.mapped[b.slot]].ravel().tolist())
    land_all(engine, True)
    engine.step()
    assert b.phase is Phase.FINISHED and engine.has_work() and engine._in_flight[0].rows[0][0] is b
    engine.executor.plans.clear()
    engine.step()
    moves = [m for m in engine.executor.plans[0].moves if not m.out]
    assert len(moves) == MODEL.num_layers and all(pages & set(m.pages.tolist()) for m in moves)
    finish(engine, a, b)


def test_lesson_03_pages_of_a_finished_request_wait_for_its_last_step():
    """3. Overlap scheduling freed pages of a finished request while its last step was in flight, and somebody else's
    tokens went there. A stop is found late here: the row in flight writes once more into pages that are free, and
    whoever gets them must write after it. Tight pool, so that they are reused at once."""
    engine = pattern_engine(pages=7, num_slots=2)
    stops = SamplingParams(max_tokens=17, stop_token_ids=tuple(range(0, MODEL.vocab_size, 3)))
    requests = []
    for i in range(8):
        engine.add_request([i + 1] * 11, stops, request_id=str(i))
        requests.append(engine._live[str(i)])
    finish(engine, *requests)
    assert sum(r.num_late for r in engine.step_log) >= 4, "no stop was found late"


@pytest.mark.parametrize("layer", range(MODEL.num_layers))
def test_lesson_04_a_layer_that_has_not_landed_is_never_read(layer):
    """4. One accessor forgot to wait for its layer: a few corrupted answers in ten thousand. Here every read of every
    layer is checked against poison; a layer whose copy in failed is read by the rows that were on their way, and none
    of their tokens may count."""
    engine = pattern_engine(pages=9, host_pages=100)
    a, b = serving(engine, 9, 9)
    swap_out(engine, a)
    engine.step()
    land_all(engine, True)
    fetch, fetched = engine.executor._fetch, []

    def failing(move):
        engine.executor.fail_start[False] = int(move.layer == layer and not fetched)
        fetch(move)
        fetched.extend([move] * (move.layer == layer))

    engine.executor._fetch = failing
    while not fetched:
        engine.step()
    assert (engine.executor.arena == LOST).any()
    finish(engine, a, b)
    assert a.lost == 1 and b.lost == 0


def test_lesson_07_pages_are_conserved_in_both_tiers_and_ids_are_not_mixed_up():
    """7. Offloading swapped ids: answers with other prompts' tokens, free counters below zero. Device pages, host
    blocks and page numbers within a block come from ranges that do not meet here, so an id in the wrong place is an
    error; both tiers add up after every step."""
    engine = pattern_engine(pages=9, host_pages=60)
    engine.store.host._next = 10_000
    requests = serving(engine, 13, 13, 13, steps=0)
    while engine.has_work():
        land_all(engine, True)
        engine.step()
        engine.state.check()
        host, pool = engine.store.host, engine.store.pool
        used = int((pool.refcount > 0).sum())
        assert used + engine.store.num_free_pages == engine.store.num_pages
        assert host.used == sum(map(len, engine.executor.blocks.values())) and 0 <= host.used <= host.capacity
    assert engine.store.host.peak > 0
    finish(engine, *requests)


@pytest.mark.parametrize("moment", ["swapped", "coming in", "parked", "regathered"])
def test_lesson_15_a_key_used_again_never_finds_what_lay_under_it(moment):
    """15. Short hashes and untagged keys let one tenant read another's KV. The host tier's key is the request id: a
    client that uses one again, with another prompt, while KV of the former request is on the host or on its way, is
    served from its own. (Every read is checked, so one page of the former would be an error.)"""
    engine = pattern_engine(pages=20, host_pages=300)
    former, other = serving(engine, 40, 5)
    if moment in ("swapped", "coming in"):
        swap_out(engine, former)
        engine.step()
        land_all(engine, True)
        while moment == "coming in" and not engine.executor.lanes[False]:
            engine.step()
    for end in range(1, {"parked": 4, "regathered": 10}.get(moment, 0)):
        for layer in range(MODEL.num_layers):
            engine.store.park(layer, [former.slot], ["a"], [end])
        engine.step()
        land_all(engine, True)
    while moment == "regathered" and not engine.store.host.regathering(0):
        engine.step()
    assert engine.store.host.blocks
    engine.abort("a")
    engine.add_request([3] * 40, PARAMS, request_id="a")
    again = engine._live["a"]
    while again.slot < 0:
        engine.step()
    finish(engine, former, other, again)


@pytest.mark.parametrize("out", [True, False])
def test_lesson_08_both_ends_of_a_copy_are_held_until_it_is_processed(out):
    """8. Slots were freed that a copy in flight was filling, host nodes were evicted before the load was acknowledged.
    The request dies with its copy under way: the block stays until the engine has seen the copy's end (`drop` asserts
    it), and the device pages that it fills or read are reused by nobody who could notice."""
    engine = pattern_engine(pages=8, host_pages=100)
    a, b = serving(engine, 9, 9)
    swap_out(engine, a)
    engine.step()
    if not out:
        land_all(engine, True)
        while not engine.executor.lanes[False]:
            engine.step()
    held = engine.store.num_host_pages
    engine.abort("a")
    engine.add_request([7] * 9, PARAMS, request_id="c")
    c = engine._live["c"]
    for _ in range(3):
        engine.step()
        assert engine.store.num_host_pages == held == sum(map(len, engine.executor.blocks.values()))
    land_all(engine, out)
    engine.step()
    assert engine.store.num_host_pages == 0 and not engine.executor.blocks
    finish(engine, a, b, c)


def test_lesson_09_a_sequence_comes_back_whole_or_not_at_all():
    """9. Two half-loaded requests each held blocks, neither could finish: deadlock. Coming back reserves every layer
    and the next token at once: of two swapped sequences one fits, nothing is reserved for the other, and both finish.
    """
    engine = pattern_engine(pages=16, host_pages=300)
    a, b, c = serving(engine, 25, 13, 9)
    for request in (a, b):
        swap_out(engine, request)
    while c.num_tokens < 25:  # seven pages of each layer: nine are left, a wants seven and b four
        engine.step()
    land_all(engine, True)
    for _ in range(2):
        engine.step()
    assert a.phase is Phase.RUNNING and b.phase is Phase.SWAPPED
    free = engine.store.num_free_pages
    with pytest.raises(OutOfPages):
        engine.store.swap_in(b.id, b.num_tokens)
    assert engine.store.num_free_pages == free and engine.store.host.holds("b")
    finish(engine, a, b, c)


def test_lesson_10_what_never_fits_is_refused_at_arrival():
    """10. A request larger than the whole cache blocked the head of the queue for ever. It is refused with the reason,
    and those behind it are served; the largest that fits is served too."""
    engine = pattern_engine(pages=10)
    with pytest.raises(RequestError, match="never fit the KV pool"):
        engine.add_request([1] * 30, SamplingParams(max_tokens=12))
    engine.add_request([1] * 30, SamplingParams(max_tokens=11), request_id="largest")
    largest = engine._live["largest"]
    (small,) = serving(engine, 5)
    finish(engine, largest, small)


def test_lesson_11_a_preemption_frees_pages_for_this_very_step():
    """11. Victims' pages were in a deferred list: each preemption freed nothing, and the next victim was taken. Here a
    victim's pages are free in the same plan, so a step preempts no more than it must, the oldest never loses its place,
    and the number of preemptions is bounded by the growth that forced them."""
    engine = pattern_engine(pages=12, num_slots=6)
    requests = serving(engine, 9, 9, 9, 9, steps=0)
    preempt, freed = engine.state.preempt, []

    def watched(slot, swap=False):
        before = engine.store.num_free_pages
        preempt(slot, swap)
        freed.append(engine.store.num_free_pages - before)

    engine.state.preempt = watched
    finish(engine, *requests)
    assert freed and min(freed) >= MODEL.num_layers
    assert requests[0].num_preemptions == 0
    assert max(r.num_preempted for r in engine.step_log) == 1, "one victim is enough for one page per layer"
    pages_grown = sum(20 // engine.store.page_size + 1 for _ in requests)
    assert len(freed) <= pages_grown

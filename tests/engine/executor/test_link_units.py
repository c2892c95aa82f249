"""Copies in units that yield to collectives: turns worked out by hand, and a slow simulation in fractions."""

import math
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig, SimConfig
from engine.costmodel.device import load_device
from engine.errors import ConfigError
from engine.executor.link import LINKS, FifoLink, Link
from engine.simulation import make_link

SLACK = 1e-9  # seconds: rounding
kinds = st.sampled_from(list(LINKS))


@pytest.mark.parametrize(
    "kind, unit, yields, turns",
    [
        # A's units end at 2, 4, 5, B's at 7, 9, 10
        ("fifo", 20, True, {0: 0, 0.5: 2, 2: 2, 2.5: 4, 4.5: 5, 5: 5, 5.5: 7, 9.5: 10, 10: 10, 11: 11}),
        # they share, and both end at 10: every 2 s a unit of one of them
        ("ps", 20, True, {0: 0, 0.5: 2, 2: 2, 2.5: 4, 4.5: 6, 5.5: 6, 9.5: 10, 10: 10, 11: 11}),
        ("ps", 30, True, {0.5: 3, 8.5: 9, 9.5: 10}),  # the last unit ends when the link is idle
        ("fifo", 0, True, {0.5: 0.5, 9.5: 9.5}),  # any byte is the last
        ("ps", 0, True, {0.5: 0.5, 9.5: 9.5}),
        ("fifo", math.inf, True, {0: 0, 0.5: 5, 5: 5, 5.5: 10}),  # whole copies
        ("ps", math.inf, True, {0: 0, 0.5: 10, 9.5: 10, 11: 11}),
        ("fifo", 20, False, {0: 10, 0.5: 10, 9.5: 10, 10: 10, 11: 11}),  # all that was submitted
        ("ps", 20, False, {0: 10, 0.5: 10, 11: 11}),
    ],
)
def test_turns(kind, unit, yields, turns):
    """Copies A and B of 50 bytes from time 0 on, at 10 bytes/s."""
    for now, turn in turns.items():
        link = LINKS[kind](10, 0, unit, yields)
        link.submit(0, 50), link.submit(0, 50)
        assert link.turn(now) == turn, now


def test_units_go_on_behind_a_window():
    """The second collective meets the unit that begins behind the first, not one counted on the clock."""
    link = FifoLink(10, 0, 20)
    job = link.submit(0, 50)
    assert link.turn(1) == 2
    link.hold(2, 5)
    assert link.turn(5) == 5, "it follows right behind the first"
    link.hold(5, 6)
    assert link.turn(7) == 8 and link.completion(job) == 9
    link.hold(8, 9)
    assert link.turn(9.5) == link.completion(job) == 10


@pytest.mark.parametrize("kind", list(LINKS))
def test_what_waits_for_its_latency_holds_nobody_up(kind):
    link = LINKS[kind](10, 2, 20)
    link.submit(0, 20)  # from 2 to 4
    assert link.turn(1) == 1
    link.submit(3, 20)  # from 5 to 7: the link is idle before, and its units count anew
    assert (link.turn(3), link.turn(4.5), link.turn(5.5)) == (4, 4.5, 7)


@pytest.mark.parametrize("kind", list(LINKS))
def test_collectives_that_follow_each_other_keep_the_link(kind):
    """No unit slips in between by a rounding error."""
    link, now = LINKS[kind](26.3e9, 7e-6, 4e6), 0.1003
    link.submit(0.1, 10**9)
    for i in range(1, 300):
        turn = link.turn(now)
        assert turn == now or i == 1
        now = turn + i / 3e5
        link.hold(turn, now)


@pytest.mark.parametrize("kind", list(LINKS))
def test_a_copy_that_ends_with_its_unit_is_not_held_up_by_the_window(kind):
    """However its end and that of the unit are rounded."""
    link = LINKS[kind](26.3e9, 7e-6, 4e6)
    for i in range(1, 300):
        jobs = [link.submit(i * 3.7, 1_234_567 + j) for j in range(3)]
        turn = link.turn(i * 3.7 + 1.6e-4)  # all but the last bytes have moved
        link.hold(turn, turn + 1)
        assert link.take_ended(i * 3.7 + 1.1) == jobs and all(job.end <= turn + SLACK for job in jobs)


def reference(rate, latency, events, unit, yields, fifo) -> tuple[list[Fraction], list[Fraction]]:
    """(turns, ends): from event to event, every latency and byte counted down. See `schedules`; whoever is behind the
    last event finishes."""
    wait, left, ends = [], [], []
    turns: list[Fraction] = []
    now = moved = Fraction(0)  # bytes of the stretch that the link is busy with

    def some(until):
        """Lets time pass to the next thing that happens, `until` at the latest."""
        nonlocal now, moved
        here = [i for i, end in enumerate(ends) if end is None]
        waiting, moving = [i for i in here if wait[i]], [i for i in here if not wait[i]]
        moving = moving[:1] if fifo else moving
        share = Fraction(rate) / max(1, len(moving))
        step = min([until - now, *(wait[i] for i in waiting), *(left[i] / share for i in moving)])
        if moving and unit < math.inf:
            step = min(step, (unit - moved % unit) / rate)
        now += step
        moved += step * share * len(moving)
        for i in waiting:
            wait[i] -= step
        for i in moving:
            left[i] -= step * share
            ends[i] = None if left[i] else now
        if not any(left[i] for i in moving):
            moved = Fraction(0)
        return here

    def under_way():
        return moved % unit if unit < math.inf else moved

    for submits, gap, amount in events:
        target = now + Fraction(gap)
        while now < target:
            some(target)
        if submits:
            wait.append(Fraction(latency)), left.append(Fraction(amount)), ends.append(None)
            continue
        while under_way() if yields else None in ends:
            some(math.inf)
        turns.append(now)
        now += Fraction(amount)
    while None in ends:
        some(math.inf)
    return turns, ends


def grid(lowest, highest):
    return st.integers(lowest, highest).map(lambda n: n / 8)


@st.composite
def schedules(draw):
    """(rate, latency, events): a copy is (True, seconds since the event before, bytes), a collective (False, seconds
    since then, seconds that it takes). An event is over when its collective is."""
    copy = st.tuples(st.just(True), grid(0, 24), st.integers(1, 60))
    collective = st.tuples(st.just(False), grid(0, 24), grid(1, 16))
    events = draw(st.lists(st.one_of(copy, collective), min_size=1, max_size=12))
    return draw(st.sampled_from([3, 8, 10])), draw(st.sampled_from([0.0, 0.125, 1.0])), events


def run(rate, latency, events, unit, yields, kind) -> tuple[list[float], list[float], list[float]]:
    """When collectives asked, their turns, and the ends of the copies."""
    link, now, asked, turns, jobs = LINKS[kind](rate, latency, unit, yields), 0.0, [], [], []
    for submits, gap, amount in events:
        now += gap
        if submits:
            jobs.append(link.submit(now, amount))
            continue
        asked.append(now)
        turns.append(link.turn(now))
        now = turns[-1] + amount
        link.hold(turns[-1], now)
    link.advance(now + 1e6)
    assert [job.num_bytes for job in jobs] == [amount for submits, _, amount in events if submits]
    return asked, turns, [job.end for job in jobs]


units = st.sampled_from([1, 2.5, 7, 16, 100, math.inf])


@settings(max_examples=400, deadline=None)
@given(schedules(), units, st.booleans(), kinds)
@example((3, 0.0, [(True, 0.0, 10), (False, 0.375, 0.125), (False, 2.375, 0.125)]), 1, True, "ps")  # ten thirds
def test_as_the_reference_says(schedule, unit, yields, kind):
    _, turns, ends = run(*schedule, unit, yields, kind)
    expected = reference(*schedule, Fraction(unit) if unit < math.inf else unit, yields, kind == "fifo")
    assert (turns, ends) == tuple(pytest.approx([float(x) for x in part], abs=1e-9) for part in expected)


@settings(max_examples=200, deadline=None)
@given(schedules(), units, kinds)
def test_a_collective_waits_for_one_unit_at_most_and_all_bytes_move(schedule, unit, kind):
    """And no copy has moved more than an open link carries when it ends."""
    rate, _, events = schedule
    asked, turns, ends = run(*schedule, unit, True, kind)
    assert all(0 <= turn - at <= unit / rate + SLACK for at, turn in zip(asked, turns, strict=True))
    held = list(zip(turns, (amount for submits, _, amount in events if not submits), strict=True))
    sizes = [amount for submits, _, amount in events if submits]
    for last in ends:
        moved = sum(size for size, end in zip(sizes, ends, strict=True) if end <= last)
        closed = sum(max(0.0, min(last, turn + seconds) - turn) for turn, seconds in held)
        assert moved <= rate * (last - closed + SLACK)
    assert all(math.isfinite(end) for end in ends)


@settings(max_examples=200, deadline=None)
@given(schedules(), kinds)
def test_the_smaller_the_unit_the_closer_to_stopping_at_once(schedule, kind):
    now, small = run(*schedule, 0, True, kind), run(*schedule, 1e-6, True, kind)
    assert now[1] == now[0], "nobody waits for a unit of 0"
    for a, b in zip(now, small, strict=True):
        assert a == pytest.approx(b, abs=12 * 1e-6)


@pytest.mark.parametrize("kind", list(LINKS))
def test_bad_units(kind):
    for unit in (-1, float("nan")):
        with pytest.raises(ConfigError, match="unit must be >= 0 bytes"):
            LINKS[kind](1, 0, unit)
    link = Link(10, 0, 20)
    link.submit(5, 10)
    with pytest.raises(ValueError, match="an event at 4 on a link with time 5"):
        link.turn(4)


@pytest.mark.parametrize(
    "device, tensor, settings, unit",
    [
        ("l20", 4, {}, 4 * (4 << 20)),
        ("l20", 2, {"link_unit_bytes": 500_000}, 1_000_000),
        ("l20", 4, {"link_unit_bytes": 0}, math.inf),
        ("l20", 4, {"link_unit_bytes": None}, math.inf),
        ("l20", 1, {}, 0),  # no all-reduces
        ("h100", 4, {}, 0),  # they have links of their own
    ],
)
def test_links_of_a_simulation(device, tensor, settings, unit):
    """A link stands for those of all devices, each with units of its own: a unit takes as long as on one of them."""
    config = EngineConfig(executor="sim", sim=SimConfig(device), tensor=tensor, **settings)
    link = make_link(config, load_device(device))
    assert (link.unit_bytes, link.yields) == (unit, True)
    if unit == 4 * (4 << 20):
        assert link.unit_bytes / link.bytes_per_second == pytest.approx(167.8e-6, rel=1e-3)  # 4 MiB at 25 GB/s


def test_copies_that_do_not_yield():
    config = EngineConfig(executor="sim", sim=SimConfig("l20", link_aware=False, link_sharing="fifo"), tensor=4)
    link = make_link(config, load_device("l20"))
    assert isinstance(link, FifoLink) and not link.yields
    with pytest.raises(ConfigError, match="link_unit_bytes must be >= 0"):
        EngineConfig(link_unit_bytes=-1)
    with pytest.raises(ConfigError, match="link_aware=False is simulated only"):
        EngineConfig(sim=SimConfig(link_aware=False))

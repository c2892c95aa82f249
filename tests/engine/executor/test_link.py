"""The link against schedules worked out by hand, and against a slow simulation in fractions that moves every byte."""

import itertools
import math
import random
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.executor.link import LINKS, FifoLink, Link

SLACK = 1e-9  # seconds: rounding, of times up to some hundreds


def reference(rate, latency, jobs, windows, fifo) -> list[Fraction]:
    """Ends of jobs [(time, bytes)] in order of time, windows [(start, end)] in order: from event to event, every job's
    latency and bytes counted down. Skips examples in which rounding decides whether a copy ends before a window."""
    wait, left = [Fraction(latency)] * len(jobs), [Fraction(size) for _, size in jobs]
    ends: list[Fraction | None] = [None] * len(jobs)
    now = Fraction(0)
    while None in ends:
        here = [i for i, (at, _) in enumerate(jobs) if at <= now and ends[i] is None]
        later = [Fraction(at) - now for at, _ in jobs if at > now]
        waiting, moving = [i for i in here if wait[i]], [i for i in here if not wait[i]]
        share = Fraction(rate)
        if fifo:
            moving = moving[:1]
        elif moving:
            share /= len(moving)
        if inside := [end for start, end in windows if start <= now < end]:
            now += min([Fraction(inside[0]) - now, *later])
            continue
        opens = [Fraction(start) - now for start, _ in windows if start > now]
        assume(all(abs(left[i] / share - gap) > SLACK for i in moving for gap in opens))
        step = min([*later, *opens, *(wait[i] for i in waiting), *(left[i] / share for i in moving)])
        now += step
        for i in waiting:
            wait[i] -= step
        for i in moving:
            left[i] -= step * share
            if not left[i]:
                ends[i] = now
    return ends


def run(rate, latency, jobs, windows, kind) -> list[float]:
    """Ends of the jobs on a real link that hears of each window when it is about to start; equal to the reference."""
    link = LINKS[kind](rate, latency)
    events = sorted([*((at, 1, size) for at, size in jobs), *((start, 0, end) for start, end in windows)])
    handles = [link.submit(at, what) if submits else link.hold(at, what) for at, submits, what in events]
    ends = [link.completion(job) for job in handles if job is not None]
    assert ends == pytest.approx([float(end) for end in reference(rate, latency, jobs, windows, kind == "fifo")])
    return ends


def grid(lowest, highest):
    return st.integers(lowest, highest).map(lambda n: n / 8)


@st.composite
def schedules(draw):
    """(rate, latency, jobs, windows), in the order of time."""
    jobs = sorted(draw(st.lists(st.tuples(grid(0, 64), st.integers(1, 60)), min_size=1, max_size=7)))
    cuts = draw(st.lists(grid(0, 80), max_size=6, unique=True).map(sorted))
    windows = [(a + 1 / 64, b + 1 / 64) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    return draw(st.sampled_from([3, 8, 10])), draw(grid(0, 12)), jobs, windows


kinds = st.sampled_from(list(LINKS))


def test_alone():
    link = Link(100, 0.5)
    job = link.submit(2, 300, "a")
    assert (job.num_bytes, job.tag, job.submitted, job.end) == (300, "a", 2, math.inf)
    assert link.completion(job) == link.next_completion == 5.5 and link.busy
    assert link.take_ended(5.4) == [] and link.take_ended(5.5) == [job] and link.take_ended(9) == []
    assert job.end == link.completion(job) == 5.5 and not link.busy and link.next_completion is None


def test_shares():
    """A and B each take half, then C joins: a third each; what leaves gives its share to the rest."""
    link = Link(6)
    a = link.submit(0, 12)  # by 2 it has moved 9 of 12
    b = link.submit(1, 9)  # by 2 it has moved 3 of 9
    assert link.completion(a) == 3 and link.completion(b) == 3.5
    c = link.submit(2, 9)
    # 3 bytes each until 3.5, then A is gone; B has 3 left at 3 bytes/s until 4.5; C has 3 left at 6 bytes/s
    assert [link.completion(job) for job in (a, b, c)] == [3.5, 4.5, 5]
    assert link.take_ended(4.5) == [a, b] and link.next_completion == 5


def test_latency_takes_no_share():
    link = Link(10, 2)
    a, b = link.submit(0, 40), link.submit(3, 10)  # A moves from 2, B from 5 when A has 10 left
    assert link.completion(a) == link.completion(b) == 7
    assert link.take_ended(100) == [a, b]
    c, d = link.submit(100, 10), link.submit(101.5, 10)  # C is gone before D has waited
    assert link.completion(c) == 103 and link.completion(d) == 104.5


def test_one_after_the_other():
    """`FifoLink`: B's latency passes while A moves."""
    link = FifoLink(10, 2)
    a, b, c = link.submit(0, 40), link.submit(1, 10), link.submit(8, 10)
    assert [link.completion(job) for job in (a, b, c)] == [6, 7, 11]
    link.hold(8, 9)
    assert link.take_ended(20) == [a, b, c] and c.end == 12


@pytest.mark.parametrize(
    "windows, end",
    [
        ([(3, 4)], 6),  # while it moves
        ([(0, 1)], 6),  # while its latency passes
        ([(5, 7)], 5),  # from the moment on at which it ends
        ([(4.5, 7)], 7.5),
        ([(1, 2), (2, 3)], 7),  # adjacent
        ([(1, 3), (2, 4), (2, 2.5)], 8),  # overlapping, inside
        ([(1, 1)], 5),  # empty
        ([(1, 2), (6, 9)], 6),  # the second one opens at the end that the first one gave it
        ([(1, 2), (5.5, 6.5)], 7),
    ],
)
@pytest.mark.parametrize("kind", list(LINKS))
def test_windows(kind, windows, end):
    """40 bytes from time 0 at 10 bytes/s after 1 s: they end at 5 when nobody holds the link."""
    link = LINKS[kind](10, 1)
    job = link.submit(0, 40)
    for window in windows:
        link.hold(*window)
    assert link.completion(job) == link.next_completion == end
    assert link.take_ended(end - 0.01) == [] and link.take_ended(end) == [job] and job.end == end


def test_submitted_in_a_window():
    link = Link(10, 1)
    link.hold(2, 4)
    a, b = link.submit(1.5, 10), link.submit(3, 10)  # A waits 0.5 s more from 4 on, B 1 s; they share from 5
    assert (link.completion(a), link.completion(b)) == (6, 6.5)
    link.hold(5.5, 7.5)  # A has 2.5 left then, B 7.5
    assert (link.completion(a), link.completion(b)) == (8, 8.5)


def test_a_window_that_grows_while_it_is_on():
    link = Link(10)
    link.hold(1, 3)
    job = link.submit(2, 10)
    link.hold(2, 5)
    assert link.completion(job) == 6


@settings(max_examples=300, deadline=None)
@given(schedules(), kinds)
def test_as_the_reference_says_at_every_event(schedule, kind):
    """After each event, `completion` of every job is the end if nothing more happens; and the ended jobs come out at
    that very time, once, in order, whatever is asked in between."""
    rate, latency, jobs, windows = schedule
    link, handles, known, out = LINKS[kind](rate, latency), [], [], []
    events = sorted([*((at, 1, size) for at, size in jobs), *((start, 0, end) for start, end in windows)])
    for i, (at, submits, what) in enumerate(events):
        out += link.take_ended(at)
        if submits:
            handles.append(link.submit(at, what))
        else:
            link.hold(at, what)
            known.append((at, what))
        expected = reference(rate, latency, jobs[: len(handles)], known, kind == "fifo")
        ends = [link.completion(job) for job in handles]
        assert ends == pytest.approx([float(end) for end in expected])
        ahead = [end for job, end in zip(handles, ends, strict=True) if job.end == math.inf]
        assert link.next_completion == min(ahead, default=None) and link.busy == bool(ahead)
        assert all(end >= at for end in ahead), "an event in the past"
        if i + 1 == len(events):
            for end in sorted(set(ahead)):
                link.advance((at + end) / 2)
                at = end
                assert [link.completion(job) for job in handles] == ends, "asking moved an end"
                taken = link.take_ended(end)
                assert taken and all(job.end == end for job in taken)
                out += taken
    assert sorted(map(id, out)) == sorted(map(id, handles)) and not link.busy and link.next_completion is None
    order = {id(job): n for n, job in enumerate(handles)}
    for job, after in itertools.pairwise(out):
        assert job.end <= after.end
        if (job.submitted, job.num_bytes) == (after.submitted, after.num_bytes):
            assert order[id(job)] < order[id(after)]


def open_seconds(a, b, windows):
    return b - a - sum(max(0, min(b, end) - max(a, start)) for start, end in windows)


@settings(max_examples=150, deadline=None)
@given(schedules(), kinds)
def test_never_more_than_the_link_carries(schedule, kind):
    """In every interval, the jobs that came and went in it have no more bytes than the open link carries; and none
    ends before it could on a link of its own, not by a rounding error."""
    rate, latency, jobs, windows = schedule
    ends = run(rate, latency, jobs, windows, kind)
    for (at, size), end in zip(jobs, ends, strict=True):
        assert end >= at + latency + size / rate
    for a, b in itertools.product({at for at, _ in jobs}, ends):
        moved = sum(size for (at, size), end in zip(jobs, ends, strict=True) if a <= at and end <= b)
        assert not moved or moved <= rate * (open_seconds(a, b, windows) - latency + SLACK)


@settings(max_examples=150, deadline=None)
@given(schedules(), kinds)
def test_never_idle_with_work(schedule, kind):
    """Lindley's recursion: whatever the discipline, the backlog is gone when an always busy link has moved it."""
    rate, latency, jobs, windows = schedule
    backlog_gone = 0.0  # in link time
    for n, (at, size) in enumerate(jobs, 1):
        backlog_gone = max(backlog_gone, open_seconds(0, at, windows) + latency) + size / rate
        last = max(run(rate, latency, jobs[:n], windows, kind))
        assert open_seconds(0, last, windows) == pytest.approx(backlog_gone)


@settings(max_examples=150, deadline=None)
@given(schedules(), kinds, st.integers(0, 5))
def test_better_is_never_slower(schedule, kind, which):
    """More bandwidth, less latency, or a window less: no job ends later."""
    rate, latency, jobs, windows = schedule
    ends = run(rate, latency, jobs, windows, kind)
    better = [run(rate * 1.5, latency, jobs, windows, kind), run(rate, latency / 2, jobs, windows, kind)]
    if windows:
        which %= len(windows)
        better.append(run(rate, latency, jobs, windows[:which] + windows[which + 1 :], kind))
    for others in better:
        assert all(other <= end + SLACK for other, end in zip(others, ends, strict=True))


@pytest.mark.parametrize("kind", list(LINKS))
def test_precise_after_hours(kind):
    """Rounding does not pile up: 3,000 bursts with windows in 5 hours, each by itself, equal shares ending together."""
    link, rate, size = LINKS[kind](26.3e9, 7e-6), 26.3e9, 1_234_567
    for i in range(3000):
        at = i * 6.1 + 0.1
        link.hold(at + 1e-5, at + 2e-5)
        jobs = [link.submit(at, size) for _ in range(7)]
        assert link.take_ended(at + 1) == jobs
        moved = [7] * 7 if kind == "ps" else range(1, 8)
        assert [job.end - at for job in jobs] == pytest.approx(
            [7e-6 + 1e-5 + n * size / rate for n in moved], abs=2e-11
        )
        assert kind == "fifo" or len({job.end for job in jobs}) == 1
        assert all(job.end >= at + 7e-6 + size / rate for job in jobs)


@pytest.mark.parametrize("rate, latency", [(0.3, 0.0), (7.7, 7e-6)])
@pytest.mark.parametrize("kind", list(LINKS))
def test_rounding_never_shows(kind, rate, latency):
    """With many ends that differ by a rounding error or not at all: none is before the copy could end alone, before one
    that was taken earlier, or in the past; and what is said to end at a time has ended then."""
    rng, link, now, jobs, ended = random.Random(0), LINKS[kind](rate, latency), 0.0, [], []
    for _ in range(3000):
        now += rng.randint(0, 8) / rate
        if rng.random() < 0.3:
            link.hold(now, now + rng.randint(1, 4) / rate)
        jobs += [link.submit(now, size) for size in rng.choices((1, 2, 3, 6), k=rng.randint(1, 2))]
        assert link.next_completion >= now
        while link.busy and rng.random() < 0.4:
            now = link.next_completion
            taken = link.take_ended(now)
            assert taken and taken[-1].end == now
            ended += taken
    ended += link.take_ended(2 * now + 1e6)
    assert len(ended) == len(jobs)
    assert all(job.end >= job.submitted + latency + job.num_bytes / rate for job in jobs)
    assert all(a.end <= b.end for a, b in itertools.pairwise(ended))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda link: link.submit(4, 1), "an event at 4 on a link with time 5"),
        (lambda link: link.submit(float("nan"), 1), "an event at nan"),
        (lambda link: link.advance(4), "an event at 4 on a link with time 5"),
        (lambda link: link.submit(6, 0), "a copy of 0 bytes"),
        (lambda link: link.hold(4, 6), r"window \[4, 6\) on a link with time 5"),
        (lambda link: link.hold(7, 6), r"window \[7, 6\)"),
        (lambda link: link.hold(7, float("inf")), r"window \[7, inf\)"),
        (lambda link: link.hold(7.5, 9), r"window \[7.5, 9\) .* last window \(8, 9\)"),
        (lambda link: link.completion(Link(1).submit(0, 9)), "a copy of 9 bytes that is not on this link"),
    ],
)
@pytest.mark.parametrize("kind", list(LINKS))
def test_wrong_calls_change_nothing(kind, call, message):
    link = LINKS[kind](10)
    job = link.submit(5, 50)
    link.hold(8, 9)
    with pytest.raises(ValueError, match=message):
        call(link)
    assert link.completion(job) == link.next_completion == 11


@pytest.mark.parametrize("kind", list(LINKS))
def test_bad_links(kind):
    for rate in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="bandwidth must be > 0 bytes/s"):
            LINKS[kind](rate)
    for latency in (-1, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="latency must be >= 0 seconds"):
            LINKS[kind](1, latency)

"""A step's layers and copies: schedules worked out by hand, the real executor's `_land` on a virtual link, and laws."""

import math
from collections import deque
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.executor.jax_executor import JaxExecutor
from engine.executor.link import LINKS, FifoLink, Link
from engine.executor.overlap import STEP_START, LayerTimes, Payload, StepCopies, run_layers
from engine.memory.moves import Move

SLACK = 1e-9  # seconds: rounding


def payloads(**sizes: list[int]) -> dict[int, list[Payload]]:
    """l0=[10, 20] -> {0: [Payload(10, "l0"), Payload(20, "l0")]}."""
    return {int(name[1:]): [Payload(n, name) for n in of] for name, of in sizes.items()}


def test_without_copies():
    times = run_layers(5, [1, 2, 3], StepCopies(), Link(1), Link(1), prefetch_depth=1)
    assert times == LayerTimes(ends=[6, 8, 11], stalls=[0, 0, 0], waits=[0, 0, 0])
    assert run_layers(5, [], StepCopies(), Link(1), Link(1), 1) == LayerTimes([], [], [])


@pytest.mark.parametrize(
    "kind, depth, ends, stalls",
    [
        # layer 0 lands at 3 and ends at 5; layer 1 is fetched from 5 to 8; layer 2 from 10 to 13
        ("fifo", 0, [5, 10, 15], [3, 3, 3]),
        ("ps", 0, [5, 10, 15], [3, 3, 3]),
        # layers 0 and 1 land at 3 and 6; layer 2 is submitted at 5, when layer 1 has its turn, and lands at 9
        ("fifo", 1, [5, 8, 11], [3, 1, 1]),
        # layers 0 and 1 share and land at 6; layer 2 is fetched from 8 to 11
        ("ps", 1, [8, 10, 13], [6, 0, 1]),
        # all are submitted at once and land at 3, 6, 9; or all at 9
        ("fifo", 2, [5, 8, 11], [3, 1, 1]),
        ("ps", 2, [11, 13, 15], [9, 0, 0]),
    ],
)
def test_fetches(kind, depth, ends, stalls):
    """Three layers of 2 s, each reading 30 bytes that come at 10 bytes/s."""
    copies = StepCopies(fetches=payloads(l2=[30], l0=[30], l1=[30]))
    times = run_layers(0, [2, 2, 2], copies, LINKS[kind](10), LINKS[kind](10), depth)
    assert times == LayerTimes(ends, stalls, [0.0] * len(ends))


def test_what_is_fetched_next_may_be_far_ahead():
    """Of four layers of 2 s the first and the last read 30 bytes that come at 10 bytes/s. The last one's are on their
    way since the first one's turn: from 3 to 6, and it has its turn at 9."""
    copies = StepCopies(fetches=payloads(l0=[30], l3=[30]))
    times = run_layers(0, [2, 2, 2, 2], copies, FifoLink(10), FifoLink(10), prefetch_depth=1)
    assert times == LayerTimes(ends=[5, 7, 9, 11], stalls=[3, 0, 0, 0], waits=[0.0] * 4)


def test_a_layer_waits_for_all_of_its_fetches():
    copies = StepCopies(fetches=payloads(l1=[10, 30]))
    times = run_layers(0, [2, 2], copies, FifoLink(10), FifoLink(10), prefetch_depth=1)
    assert times == LayerTimes(ends=[2, 6], stalls=[0, 2], waits=[0, 0])


def test_sends_leave_when_their_layer_has_ended():
    """A prefill's layers of 2 s, 30 bytes each to send at 10 bytes/s, behind 5 bytes that were sent at the start."""
    link_in, link_out = FifoLink(10), FifoLink(10)
    copies = StepCopies(sends={STEP_START: [Payload(5, "start")], **payloads(l0=[30], l1=[10, 20], l2=[30])})
    assert run_layers(1, [2, 2, 2], copies, link_in, link_out, 1) == LayerTimes([3, 5, 7], [0, 0, 0], [0, 0, 0])
    jobs = link_out.take_ended(99)
    assert [(job.tag, job.submitted, job.end) for job in jobs] == [
        ("start", 1, 1.5),
        ("l0", 3, 6),
        ("l1", 5, 7),
        ("l1", 5, 9),
        ("l2", 7, 12),
    ]


def test_links_are_kept_from_step_to_step():
    """What the first step has sent is still leaving, and what came in before the second step comes first."""
    link_in, link_out = FifoLink(10), FifoLink(10)
    times = run_layers(0, [1, 1], StepCopies(sends=payloads(l1=[40])), link_in, link_out, 1)
    homecoming = link_in.submit(2, 20, "home")
    copies = StepCopies(fetches=payloads(l0=[10]), sends=payloads(l0=[10]))
    times = run_layers(times.ends[-1], [1, 1], copies, link_in, link_out, 1)
    assert times == LayerTimes(ends=[6, 7], stalls=[3, 0], waits=[0, 0]) and link_in.take_ended(7)[0] is homecoming
    assert [(job.submitted, job.end) for job in link_out.take_ended(7)] == [(2, 6), (6, 7)]


def test_collectives_hold_both_directions():
    """The last half second of each layer's 2 s is the all-reduce's."""
    link_in, link_out = Link(10), Link(10)
    copies = StepCopies(fetches=payloads(l1=[25]), sends=payloads(l0=[20]))
    times = run_layers(0, [2, 2, 2], copies, link_in, link_out, 1, collective_seconds=0.5)
    assert times == LayerTimes(
        ends=[2, 5, 7], stalls=[0, 1, 0], waits=[0, 0, 0]
    )  # 15 bytes by 1.5, 10 more from 2 to 3
    (job,) = link_out.take_ended(7)
    assert (job.submitted, job.end) == (2, 4)
    link_out.submit(7, 10)
    assert link_out.next_completion == 8  # no window is left behind


def test_collectives_all_the_time():
    """Copies that can only move between layers' collectives wait for the end of the step."""
    link_in, link_out = Link(10), Link(10)
    copies = StepCopies(sends=payloads(l0=[1]))
    run_layers(0.1, [0.1] * 9, copies, link_in, link_out, 1, collective_seconds=0.1)
    (job,) = link_out.take_ended(9)
    assert job.end == pytest.approx(1.1)


@pytest.mark.parametrize(
    "sizes, unit, yields, ends, left",
    [
        # the copy moves until 1.5, 2 to 3.5, 4 to 5
        ([40], 0, True, [2, 4, 6], [5]),
        # units end at 2 and 4 of link time: the first all-reduce waits from 1.5 to 2, the second from 4 to 4.5
        ([40], 20, True, [2.5, 5, 7], [4.5]),
        ([20, 20], math.inf, True, [2.5, 5, 7], [2, 4.5]),
        ([40], math.inf, True, [4.5, 6.5, 8.5], [4]),
        ([20, 20], 20, False, [4.5, 6.5, 8.5], [2, 4]),
    ],
)
def test_collectives_wait_for_the_unit_under_way(sizes, unit, yields, ends, left):
    """Layers of 2 s, the last half second an all-reduce's, while 40 bytes leave at 10 bytes/s."""
    link_in, link_out = (FifoLink(10, 0, unit, yields) for _ in range(2))
    copies = StepCopies(sends={STEP_START: [Payload(n) for n in sizes]})
    times = run_layers(0, [2, 2, 2], copies, link_in, link_out, 1, collective_seconds=0.5)
    assert times.ends == ends and sum(times.waits) == ends[-1] - 6 and times.stalls == [0, 0, 0]
    assert [job.end for job in link_out.take_ended(99)] == left


def test_a_collective_waits_for_both_directions():
    """Out, a unit ends at 1.75; in, one at 2. The next one out does not begin in between."""
    link_in, link_out = FifoLink(10, 0, 20), FifoLink(10, 0, 17.5)
    copies = StepCopies(fetches=payloads(l2=[40]), sends={STEP_START: [Payload(35)]})
    times = run_layers(0, [2, 2, 2], copies, link_in, link_out, 2, collective_seconds=0.5)
    # then both move from 2.5 on; at 4 they are at 3.25 and 3.5, and end at 3.5 and 4 of link time
    assert times == LayerTimes(ends=[2.5, 5, 7], stalls=[0, 0, 0], waits=[0.5, 0.5, 0])
    assert link_out.take_ended(9)[0].end == 4.25 and link_in.take_ended(9)[0].end == 4.5


def test_every_collective_of_a_layer_waits():
    """Two in each layer of 4 s, at 1.5 to 2 and at the end; units of 2 s."""
    link_in, link_out = FifoLink(10), FifoLink(10, 0, 20)
    copies = StepCopies(sends={STEP_START: [Payload(60)]})
    times = run_layers(0, [4, 4], copies, link_in, link_out, 1, collective_seconds=1, collectives=2)
    # from 1.5 to 2, held to 2.5; from 4 (3.5 of link time) to 4.5, to 5; then 6.5 (5.5) to 7, to 7.5; nothing is left
    assert times == LayerTimes(ends=[5, 9.5], stalls=[0, 0], waits=[1, 0.5])


@dataclass(frozen=True)
class Step:
    """A step and the links that it runs on."""

    seconds: list[float]
    fetches: dict[int, list[int]]
    sends: dict[int, list[int]]
    depth: int
    collective: float = 0.0
    latency: float = 0.0
    kind: str = "fifo"
    rate: float = 8.0
    start: float = 1.0
    unit: float = 0.0
    yields: bool = True
    collectives: int = 1

    def links(self) -> tuple[Link, Link]:
        made = LINKS[self.kind]
        return tuple(made(self.rate, self.latency, self.unit, self.yields) for _ in range(2))

    def run(self) -> LayerTimes:
        """Its times, and nothing it could have broken."""
        fetches, sends = ({i: [Payload(n, i) for n in of] for i, of in d.items()} for d in (self.fetches, self.sends))
        link_in, link_out = self.links()
        times = run_layers(
            self.start, self.seconds, StepCopies(fetches, sends), link_in, link_out, self.depth, self.collective,
            self.collectives,
        )  # fmt: skip
        assert all(wait >= 0 for wait in times.waits)
        begins = [end - s - wait for end, s, wait in zip(times.ends, self.seconds, times.waits, strict=True)]
        befores = [self.start, *times.ends]
        for begin, before, stall in zip(begins, befores[:-1], times.stalls, strict=True):
            assert stall >= 0 and begin == pytest.approx(before + stall)
        landed, left = link_in.take_ended(1e6), link_out.take_ended(1e6)
        for jobs, wanted in ((landed, self.fetches), (left, self.sends)):
            assert sorted((job.tag, job.num_bytes) for job in jobs) == sorted((i, n) for i in wanted for n in wanted[i])
        assert all(job.end <= begins[job.tag] + SLACK for job in landed), "a layer read what had not landed"
        reading = [layer for layer in sorted(self.fetches) if self.fetches[layer]]
        turns = {b: reading[i - self.depth] if i >= self.depth else 0 for i, b in enumerate(reading)}
        assert all(job.submitted == befores[turns[job.tag]] for job in landed)
        assert all(job.submitted == befores[job.tag + 1] for job in left)
        return times


@st.composite
def steps(draw):
    seconds = draw(st.lists(st.integers(1, 24).map(lambda n: n / 8), min_size=1, max_size=6))
    copies = st.lists(st.integers(1, 40), max_size=3)
    layers = range(len(seconds))
    fetches = {i: draw(copies) for i in draw(st.permutations(layers))}
    sends = {i: draw(copies) for i in (STEP_START, *layers) if draw(st.booleans())}
    collective = draw(st.sampled_from([0.0, 1 / 3, 1.0])) * min(seconds)
    latency, kind = draw(st.sampled_from([0.0, 0.0, 0.3, 2.0])), draw(st.sampled_from(list(LINKS)))
    return Step(seconds, fetches, sends, draw(st.integers(0, len(seconds))), collective, latency, kind)


class VirtualTransfers:
    """`Transfers` on a virtual link: `land` waits as it does on a paced one."""

    def __init__(self, link: Link, now: float):
        self.link, self.now = link, now

    def fetch(self, move: Move):
        return SimpleNamespace(move=move, job=self.link.submit(self.now, len(move.pages)))

    def land(self, kv, transfer, first):
        self.now = max(self.now, self.link.completion(transfer.job))
        return kv


@settings(max_examples=150, deadline=None)
@given(steps())
def test_as_the_real_executor_lands(step):
    """`JaxExecutor._land` itself, called when the layer before has ended, on a link that moves a page a byte."""
    step = replace(step, collective=0.0)
    transfers = VirtualTransfers(step.links()[0], step.start)
    executor = SimpleNamespace(
        transfers=transfers, config=SimpleNamespace(prefetch_depth=step.depth), _fetched=deque(), _kv=None, _transient=0
    )
    moves = [Move(False, 0, i, np.zeros(n, np.int32)) for i in sorted(step.fetches) for n in step.fetches[i]]
    incoming, ends, stalls = deque(moves), [], []
    for layer, seconds in enumerate(step.seconds):
        before = transfers.now
        JaxExecutor._land(executor, incoming, layer)
        stalls.append(transfers.now - before)
        transfers.now += seconds
        ends.append(transfers.now)
    assert step.run() == LayerTimes(ends, stalls, [0.0] * len(ends))


@settings(max_examples=300, deadline=None)
@given(steps())
def test_no_longer_than_its_parts_no_shorter_than_its_longest(step):
    compute = sum(step.seconds)
    reading = [i for i, of in step.fetches.items() if of]
    copying = sum(map(sum, step.fetches.values())) / step.rate
    took = step.run().ends[-1] - step.start
    assert max(compute, copying + step.latency * bool(reading)) <= took + SLACK
    assert took <= compute + copying + step.latency * len(reading) + SLACK


@settings(max_examples=300, deadline=None)
@given(steps(), st.integers(0, 6))
def test_prefetching_deeper(step, other):
    """One after the other in the order of the layers, deeper is never slower for any layer, and sharing is never
    faster than that. Sharing, deeper can be slower, as in `test_fetches`; but no step is slower than at depth 0."""
    shallow, deep = sorted([step.depth, other])
    ends = {(kind, d): replace(step, kind=kind, depth=d).run().ends for kind in LINKS for d in (0, shallow, deep)}
    for better, worse in [(("fifo", deep), ("fifo", shallow)), *((("fifo", d), ("ps", d)) for d in (shallow, deep))]:
        assert all(x <= y + SLACK for x, y in zip(ends[better], ends[worse], strict=True)), (better, worse)
    assert max(ends["ps", shallow][-1], ends["ps", deep][-1]) <= ends["ps", 0][-1] + SLACK


@settings(max_examples=300, deadline=None)
@given(steps())
def test_better_is_never_slower(step):
    """More bandwidth, less latency, no collectives on the link, faster layers, nothing to send: no layer ends later, if
    copies go one after the other, or if all of a layer's fetches, or of the step's, are submitted at once."""
    if step.kind == "ps":
        step = replace(step, depth=len(step.seconds) if step.depth else 0)
    ends = step.run().ends
    better = {"rate": step.rate * 1.5, "latency": step.latency / 2, "collective": 0.0, "sends": {}}
    if not step.collective:
        better["seconds"] = [s / 2 if i % 2 else s for i, s in enumerate(step.seconds)]
    for name, value in better.items():
        others = replace(step, **{name: value}).run().ends
        assert all(x <= y + SLACK for x, y in zip(others, ends, strict=True)), name


@st.composite
def yielding_steps(draw):
    """All-reduces on the links, once or twice a layer, and copies in units."""
    step = draw(steps())
    collective = draw(st.sampled_from([1 / 3, 1.0])) * min(step.seconds)
    unit = draw(st.sampled_from([0.5, 3.0, 10.0, 64.0, math.inf]))
    return replace(step, collective=collective, unit=unit, collectives=draw(st.integers(1, 2)))


def no_later(better: list[float], worse: list[float], by=0.0) -> bool:
    """No layer l of `better` ends later than in `worse`, or by more than `by` for each layer so far."""
    return all(x <= y + by * i + SLACK for i, (x, y) in enumerate(zip(better, worse, strict=True), 1))


@settings(max_examples=300, deadline=None)
@given(yielding_steps(), st.sampled_from([0.5, 3.0, 10.0]))
def test_no_collective_waits_for_more_than_a_unit(step, unit):
    """One after the other, a layer comes no sooner than with copies that stop at once, and no later than by what its
    collectives and those before waited at most. If nothing is read (what lands while a collective waits holds up no
    layer), whole copies are no worse than copies that do not yield."""
    step = replace(step, unit=unit)
    times, most = step.run(), step.collectives * unit / step.rate
    assert all(wait <= most + SLACK for wait in times.waits)
    step = replace(step, kind="fifo")
    ends, stopping = step.run().ends, replace(step, unit=0.0).run().ends
    assert no_later(stopping, ends) and no_later(ends, stopping, by=most)
    whole, unaware = (replace(step, unit=math.inf, yields=y).run().ends for y in (True, False))
    assert no_later(stopping, whole) and no_later(stopping, unaware)
    whole, unaware = (replace(step, fetches={}, unit=math.inf, yields=y).run().ends for y in (True, False))
    assert no_later(whole, unaware)


@settings(max_examples=200, deadline=None)
@given(yielding_steps())
def test_units_of_nothing_stop_at_once(step):
    """What today's link gives; under processor sharing too."""
    small, stopping = replace(step, unit=1e-9).run(), replace(step, unit=0.0).run()
    assert small.ends == pytest.approx(stopping.ends, abs=1e-6) and max(stopping.waits) == 0


@settings(max_examples=100, deadline=None)
@given(yielding_steps(), st.booleans())
def test_units_change_nothing_without_copies_or_without_collectives(step, yields):
    """To the bit."""
    for other in (replace(step, fetches={}, sends={}), replace(step, collective=0.0)):
        times = replace(other, yields=yields).run()
        assert times == replace(other, unit=0.0).run() and max(times.waits) == 0


@settings(max_examples=300, deadline=None)
@given(yielding_steps())
def test_better_is_later_by_a_unit_for_each_collective_at_most(step):
    """More bandwidth, less latency, nothing to send, one after the other: what comes sooner may meet a unit that has
    just begun. Where copies do not yield, there are none to meet: better is never slower."""
    step = replace(step, kind="fifo")
    most = step.collectives * step.unit / step.rate
    better = {"rate": step.rate * 1.5, "latency": step.latency / 2, "sends": {}}
    for name, value in better.items():
        other = replace(step, **{name: value})
        assert no_later(other.run().ends, step.run().ends, by=most), name
        unaware, others = (replace(s, yields=False).run().ends for s in (step, other))
        assert no_later(others, unaware), name


@pytest.mark.parametrize("rate, ends", [(10, [2, 4]), (15, [2, 4.5])])
def test_more_bandwidth_can_meet_a_unit_that_has_just_begun(rate, ends):
    """72 bytes leave from 2 on in units of 15, which end at 3.5 and 5, or at 3, 4, 5, when an all-reduce wants to run
    from 3.5 to 4."""
    step = Step([2, 2], {}, {0: [72]}, depth=1, collective=0.5, rate=rate, start=0, unit=15)
    assert step.run().ends == ends


@pytest.mark.parametrize("kind, slow, fast", [("ps", [2, 8, 9], [1, 9, 10]), ("fifo", [2, 6, 9], [1, 6, 9])])
def test_sharing_can_punish_a_faster_layer(kind, slow, fast):
    """Layers 1 and 2 fetch 4 bytes each at 1 byte/s. When layer 0 takes 1 s less, the fetch of layer 2 begins 1 s
    sooner, and its share is taken from the fetch that layer 1 waits for."""
    step = Step([2, 2, 1], {1: [4], 2: [4]}, {}, depth=1, kind=kind, rate=1, start=0)
    assert step.run().ends == slow
    assert replace(step, seconds=[1, 2, 1]).run().ends == fast


@pytest.mark.parametrize(
    "layers, copies, depth, collective, message",
    [
        (2, StepCopies(fetches=payloads(l2=[1])), 1, 0, "copies of layer 2 in a step of 2 layers"),
        (2, StepCopies(fetches={-1: [Payload(1)]}), 1, 0, "copies of layer -1 in a step of 2 layers"),
        (2, StepCopies(sends=payloads(l2=[1])), 1, 0, "copies of layer 2 in a step of 2 layers"),
        (2, StepCopies(), -1, 0, "a prefetch depth of -1"),
        (2, StepCopies(), 1, 1.5, "1.5 s of collectives in layers of 1.0 s"),
        (2, StepCopies(), 1, -1, "-1 s of collectives"),
    ],
)
def test_wrong_steps(layers, copies, depth, collective, message):
    with pytest.raises(ValueError, match=message):
        run_layers(0, [1.0] * layers, copies, Link(1), Link(1), depth, collective)


def test_a_layer_without_a_collective():
    with pytest.raises(ValueError, match="0 collectives in a layer"):
        run_layers(0, [1.0], StepCopies(), Link(1), Link(1), 1, 1.0, collectives=0)

"""One direction of the link to the host on a virtual clock: copies share it, collectives hold it. No JAX here.

All books are kept in *link time*, the seconds during which no window held the link. In link time there are no windows:
what is on the link ends at a time that holding it cannot change, only `_on_clock` shifts. Sharing is exact and takes
O(log n) per copy by virtual service (Demers, Keshav and Shenker, SIGCOMM 1989): the service of a link with N copies
grows by B / N bytes per second, and a copy ends when it has grown by the copy's bytes since the copy joined.

Copies move in units that nothing interrupts, and yield to collectives between two of them (LayerKV; research note on
arXiv 2410.00428, PCIe contention with all-reduce): so a collective waits for u / B at most.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

from engine.errors import ConfigError

INSTANT = 1e-9  # seconds: what is no further apart happens at the same time, so that rounding decides nothing


@dataclass(eq=False, slots=True)
class Job:
    """A copy on a link. Times are seconds on the engine's clock."""

    num_bytes: int
    tag: Any  # the caller's
    submitted: float
    earliest: float  # no copy ends sooner, however idle the link is
    end: float = math.inf  # set when it has ended


class Window(NamedTuple):
    """The link is held in [start, end)."""

    start: float
    end: float
    held: float  # seconds that the windows up to this one hold the link in all


class Stretch(NamedTuple):
    """The link moves unit after unit, without a pause but for windows. In link time."""

    start: float
    end: float


class Link:
    """Copies that share a link equally: B / N bytes/s each with N under way (processor sharing, Dynamo's model).

    A copy first waits for the latency and takes no share of the link meanwhile. In a window everything stands still,
    latencies too. Whoever holds links calls `advance` or `take_ended` now and then: windows are forgotten there.

    Units of copies that share the link take turns: the one under way began when the bytes moved since the link became
    busy were a multiple of u (ours), and the last one ends when the link is idle.

    Args:
      bytes_per_second: B, of this direction.
      latency_s: seconds from a copy's submission until its first byte moves on an idle link.
      unit_bytes: u, of the units in which copies move; 0: they stop at any byte, inf: where the link would be idle, or
        begin another copy (`FifoLink`).
      yields: False: copies neither come in units nor make way, so a collective waits until all that were submitted
        before it have ended (reconstructed: the paper splits copies and holds them back so that all-reduces are not
        delayed; with neither, one waits for what was issued before it. Hardware that shares a link fairly between both
        would delay it less.)

    Raises:
      ConfigError: the bandwidth is not a positive number, or the latency or the unit is negative.
    """

    def __init__(self, bytes_per_second: float, latency_s: float = 0.0, unit_bytes: float = 0.0, yields: bool = True):
        if not 0 < bytes_per_second < math.inf:
            raise ConfigError(f"a link's bandwidth must be > 0 bytes/s, got {bytes_per_second}")
        if not 0 <= latency_s < math.inf:
            raise ConfigError(f"a link's latency must be >= 0 seconds, got {latency_s}")
        if not unit_bytes >= 0:
            raise ConfigError(f"a link's unit must be >= 0 bytes, got {unit_bytes}")
        self.bytes_per_second, self.latency_s = bytes_per_second, latency_s
        self.unit_bytes, self.yields = unit_bytes, yields
        self._delays = unit_bytes > 0 or not yields  # else nobody asks how far a copy is
        self._now = 0.0  # everything up to here has happened
        self._windows: deque[Window] = deque()  # that end after now
        self._held = 0.0  # seconds of those that do not
        self._num_jobs = 0
        self._last = 0.0  # link time at which the copies under way last changed
        self._service = 0.0  # virtual service then, in bytes
        self._sharing: list[tuple[float, int, Job]] = []  # heap: the virtual service at which each one ends
        self._settled: deque[tuple[float, Job]] = deque()  # ends, in link time, that later copies cannot change
        self._ended: list[Job] = []  # not yet taken
        self._stretches: deque[Stretch] = deque()  # that end after now, as far as is known
        self._idle = 0.0  # link time at which the last of all there were ends

    @property
    def busy(self) -> bool:
        """True while a copy has not ended."""
        return bool(self._settled or self._sharing)

    @property
    def next_completion(self) -> float | None:
        """When the next copy ends if nothing more is submitted or held; None: there is none."""
        if self._settled:
            return self._end(*self._settled[0], self._now)
        return self._end(self._first_leaves(), self._sharing[0][-1], self._now) if self._sharing else None

    @property
    def next_report(self) -> float | None:
        """When the next copy that nobody took ends or ended; None: there is none."""
        return self._ended[0].end if self._ended else self.next_completion

    def submit(self, now: float, num_bytes: int, tag: Any = None) -> Job:
        """Starts a copy.

        Raises:
          ValueError: `now` is before an earlier event, or there is nothing to copy.
        """
        if num_bytes <= 0:
            raise ValueError(f"a copy of {num_bytes} bytes")
        self.advance(now)
        job = Job(num_bytes, tag, now, now + self.latency_s + num_bytes / self.bytes_per_second)
        time = self._link_time(now)
        joins = max(self._last, time + self.latency_s)
        self._join(job, joins)
        if self._delays:
            self._occupy(time, joins, num_bytes / self.bytes_per_second)
        self._num_jobs += 1
        return job

    def turn(self, now: float) -> float:
        """When a collective that asks for the link now may `hold` it: the unit under way moves to its end, no other one
        begins. So it is at most u / B from now, and now if nothing moves. On a link that does not yield, when all
        copies that were submitted have ended.

        Raises:
          ValueError: `now` is before an earlier event.
        """
        stretches = self._stretches
        if not stretches:  # nothing has moved for a while
            return now
        self.advance(now)
        time = self._link_time(now)
        while stretches and stretches[0].end <= time + INSTANT:
            stretches.popleft()
        if not stretches:
            return now
        until, (start, end) = stretches[-1].end, stretches[0]
        if self.yields:
            unit, moved = self.unit_bytes / self.bytes_per_second, time - start - INSTANT
            if moved <= 0:
                return now
            until = min(end, start + -(-moved // unit) * unit)
        return max(now, self._on_clock(until))

    def hold(self, start: float, end: float) -> None:
        """Nothing moves in [start, end): other traffic goes first. Windows may lie ahead of everything else that is
        known; those that touch become one.

        Raises:
          ValueError: the window ends before it starts, or starts before an earlier event or an earlier window.
        """
        last = self._windows[-1] if self._windows else Window(self._now, self._now, self._held)
        if not max(self._now, last.start) <= start <= end < math.inf:
            raise ValueError(f"window [{start}, {end}) on a link with time {self._now}, last window {last[:2]}")
        if self._windows and start <= last.end:
            self._windows.pop()
            end = max(end, last.end)
            self._windows.append(Window(last.start, end, last.held + (end - last.end)))
        elif start < end:
            self._windows.append(Window(start, end, last.held + (end - start)))

    def completion(self, job: Job) -> float:
        """When a copy ends if nothing more is submitted or held: exact, O(n log n).

        Raises:
          ValueError: the copy is not on this link.
        """
        if job.end < math.inf:
            return job.end
        end, last, service = self._now, self._last, self._service
        for leaves, other in self._settled:
            end = self._end(leaves, other, end)
            if other is job:
                return end
        for i, (finish, _, other) in enumerate(sorted(self._sharing)):
            last, service = self._leaves(last, service, finish, len(self._sharing) - i), finish
            end = self._end(last, other, end)
            if other is job:
                return end
        raise ValueError(f"a copy of {job.num_bytes} bytes that is not on this link")

    def advance(self, now: float) -> None:
        """Everything up to `now` has happened.

        Raises:
          ValueError: `now` is before an earlier event.
        """
        if not now >= self._now:
            raise ValueError(f"an event at {now} on a link with time {self._now}")
        while (end := self.next_completion) is not None and end <= now:
            if not self._settled:
                self._settle_first()
            _, job = self._settled.popleft()
            job.end = end
            self._ended.append(job)
            self._pass(end)
        self._pass(now)

    def take_ended(self, now: float) -> list[Job]:
        """Copies that have ended by `now` and were not taken, in the order in which they ended, then were submitted.
        What lies behind the latest event is known already: `now` may do so."""
        if now > self._now:
            self.advance(now)
        count = bisect.bisect_right(self._ended, now, key=lambda job: job.end)
        ended, self._ended = self._ended[:count], self._ended[count:]
        return ended

    def _join(self, job: Job, at: float) -> None:
        """The copy moves bytes from link time `at` on. No later one does so earlier, because all wait for the same
        latency: what ends until then is settled."""
        while self._sharing and self._first_leaves() <= at:
            self._settle_first()
        if self._sharing:
            self._service += (at - self._last) * self.bytes_per_second / len(self._sharing)
        self._last = at
        heapq.heappush(self._sharing, (self._service + job.num_bytes, self._num_jobs, job))

    def _occupy(self, time: float, joins: float, seconds: float) -> None:
        """Notes at link time `time` that the link moves `seconds` longer for a copy that joins at `joins`. On a
        `FifoLink` that is when the one before has ended: each is a stretch of its own."""
        stretches, start = self._stretches, max(joins, self._idle)
        while stretches and stretches[0].end <= time:
            stretches.popleft()
        self._idle, idle = start + seconds, self._idle
        if stretches and joins < idle - INSTANT:
            start = stretches.pop().start
        stretches.append(Stretch(start, self._idle))

    def _settle_first(self) -> None:
        self._last = self._first_leaves()
        self._service, _, job = heapq.heappop(self._sharing)
        self._settled.append((self._last, job))

    def _first_leaves(self) -> float:
        return self._leaves(self._last, self._service, self._sharing[0][0], len(self._sharing))

    def _leaves(self, last: float, service: float, finish: float, sharing: int) -> float:
        """Link time at which virtual service reaches `finish`; from `last` on, `sharing` copies share the link."""
        return last + (finish - service) * sharing / self.bytes_per_second

    def _end(self, leaves: float, job: Job, after: float) -> float:
        """When a copy ends that leaves at a link time. Rounding never lets it end early, or out of order."""
        return max(self._on_clock(leaves), job.earliest, after)

    def _link_time(self, now: float) -> float:
        """The link time at a time that is not before an earlier event."""
        return (min(now, self._windows[0].start) if self._windows else now) - self._held

    def _on_clock(self, link_time: float) -> float:
        """The engine's time at a link time: the start of a window, not its end, when one is reached."""
        held = self._held
        for window in self._windows:
            if link_time + held <= window.start + INSTANT:
                break
            held = window.held
        return link_time + held

    def _pass(self, now: float) -> None:
        self._now = now
        while self._windows and self._windows[0].end <= now:
            self._held = self._windows.popleft().held


class FifoLink(Link):
    """Copies one after the other in the order of submission, as a `transfers.Lane` paces them; each waits for its
    latency while others move."""

    def _join(self, job: Job, at: float) -> None:
        self._last = at + job.num_bytes / self.bytes_per_second  # of the last copy: the next one joins no earlier
        self._settled.append((self._last, job))


LINKS: dict[str, type[Link]] = {"ps": Link, "fifo": FifoLink}  # --link_sharing

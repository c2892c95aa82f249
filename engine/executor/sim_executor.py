"""The simulated executor: a plan takes the time that a cost model says, on a virtual clock. No JAX here.

Steps run one after the other, as on a device's queue; one that is submitted while another runs starts when that one
ends. Requests end by length: every token is 0. Copies share a link per direction (`link.py`), and a layer waits for
what it reads (`overlap.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.clock import VirtualClock
from engine.config import EngineConfig
from engine.costmodel.roofline import ALL_REDUCES
from engine.costmodel.step_model import StepModel, StepWork
from engine.executor.link import Link
from engine.executor.overlap import STEP_START, Payload, StepCopies, run_layers
from engine.memory.moves import Copy, Move
from engine.scheduler.plan import Plan, Prefill, StepResult


@dataclass(slots=True)
class Ticket:
    """A submitted step, or `plan.repeat` of them."""

    plan: Plan
    start: float  # seconds on the clock: submitted, and the step before it ended
    ends: list[float]  # [repeat]
    passed: int = 0  # steps that have been collected


class SimExecutor:
    """Implements `Executor` and `FastForward`."""

    def __init__(
        self, cost: StepModel, config: EngineConfig, clock: VirtualClock, page_bytes: int, link_in: Link, link_out: Link
    ):
        """
        Args:
          page_bytes: of a page, all devices together; so are the links' bytes/s.
          link_in, link_out: host to device, device to host.
        """
        self.cost, self.clock, self.page_bytes = cost, clock, page_bytes
        self.depth, self.prefetch_depth = config.async_depth, config.prefetch_depth
        self._in, self._out = link_in, link_out
        self._links: tuple[Link, ...] = (link_in, link_out)
        self._free = clock.now()  # when the device has done all that was submitted
        self._ahead = np.empty(0)  # when the steps end that `repeats` looked at

    def submit(self, plan: Plan) -> Ticket:
        """Schedules the plan behind what was submitted before."""
        now = self.clock.now()
        start, begin = max(now, self._free), max(now + self.cost.host, self._free)
        if plan.repeat > 1:
            ends = self._ahead[: plan.repeat].tolist()
        elif plan.moves or plan.streams or self._copying:
            work = work_of(plan.decode_positions, plan.prefills)
            ends = [self._run_with_copies(self.cost, work, plan.all_moves, begin, (self._in, self._out))]
        else:
            ends = [begin + self.cost.step(work_of(plan.decode_positions, plan.prefills)).device]
        self._free = ends[-1]
        return Ticket(plan, start, ends)

    def _run_with_copies(
        self,
        cost: StepModel,
        work: StepWork,
        moves: Sequence[Move],
        begin: float,
        links: tuple[Link, Link],
        first_layer: int = 0,
    ) -> float:
        """Runs layers from `first_layer` on, with copies of theirs, or while earlier ones are under way. Returns when
        they end."""
        time = cost.step(work)
        fetches, sends = defaultdict(list), defaultdict(list)
        layers = [time.layer] * time.num_layers
        for move in moves:
            layer = move.layer - first_layer
            payload = Payload(len(move.pages) * self.page_bytes, move)
            seconds = cost.page_copy_seconds(payload.num_bytes)
            if not move.out:  # scattered before its layer
                fetches[layer].append(payload)
                layers[layer] += seconds
            elif move.transient:  # gathered behind its layer
                sends[layer].append(payload)
                layers[layer] += seconds
            else:  # gathered before the first layer
                sends[STEP_START].append(payload)
                begin += seconds
        collective = time.collective if cost.shares_host_link else 0.0
        copies = StepCopies(fetches, sends)
        times = run_layers(begin + time.embed, layers, copies, *links, self.prefetch_depth, collective, ALL_REDUCES)
        return times.ends[-1] + time.tail

    def collect(self, ticket: Ticket) -> StepResult:
        """Lets time pass until the ticket's last step has ended."""
        end = ticket.ends[-1]
        self.clock.wait_until(end)
        tokens = np.zeros(ticket.plan.num_sampled, np.int32)
        if ticket.plan.forced is not None:
            tokens = np.maximum(ticket.plan.forced, 0)
        return StepResult(tokens, None, ticket.start, end, copies=self._landed() if self._copying else ())

    def repeats(self, plan: Plan, limit: int, until: float) -> int:
        """See `FastForward`. A step is planned when the one `depth` + 1 before it has ended."""
        now, host, depth = self.clock.now(), self.cost.host, self.depth
        work = work_of(plan.decode_positions, plan.prefills)
        first = self.cost.step(work).device  # the shortest: contexts grow
        count = int(min(limit, (until - now) / first + depth + 2))
        device = self.cost.decode_seconds(work.num_decode, work.decode_kv, work.max_kv, count)
        begun, start = max(now, self._free), max(now + host, self._free)
        if depth == 0:  # host and device take turns: the second step is planned when the first has ended
            turns = np.empty(2 * count)
            turns[0::2], turns[1::2] = host, device
            turns[0] = start
            ends, early = np.cumsum(turns)[1::2], 1
        else:  # the second step is planned when what runs now has ended, the third when the first has
            ends, early = _overlapped(start, begun + host, host, device), 2 if begun < until else 1
        self._ahead = ends
        return min(count, early + (int(ends.searchsorted(until)) if early > depth else 0))

    def pass_steps(self, ticket: Ticket, count: int) -> tuple[float, list[float]]:
        """See `FastForward`."""
        passed, ticket.passed = ticket.passed, ticket.passed + count
        start, ends = ticket.ends[passed - 1] if passed else ticket.start, ticket.ends[passed : ticket.passed]
        self.clock.wait_until(ends[-1])
        return start, ends

    def abandon(self, moves: tuple[Move, ...]) -> tuple[Copy, ...]:
        """Nothing is begun before a step is submitted, and nothing fails then."""
        now = self.clock.now()
        return (
            *self._landed(),
            *(Copy(m.out, m.block, m.layer, False, 0, now, now, m.owners, m.transient) for m in moves),
        )

    def wait_for_copies(self) -> tuple[Copy, ...]:
        """Lets time pass until a copy has ended."""
        ends = [link.next_report for link in self._links]
        self.clock.wait_until(min(end for end in ends if end is not None))
        return self._landed()

    def drop(self, blocks: tuple[int, ...]) -> None:
        """There are no bytes to let go of."""

    def poison(self, mask: np.ndarray) -> None:
        """There are no bytes to fill."""

    @property
    def _copying(self) -> bool:
        """True while a copy has not been reported."""
        return self._in.next_report is not None or self._out.next_report is not None

    def _landed(self) -> tuple[Copy, ...]:
        """Copies that have ended by now and were not reported, in the order in which they ended."""
        now = self.clock.now()
        jobs = sorted((j for link in self._links for j in link.take_ended(now)), key=lambda job: job.end)
        return tuple(
            Copy(m.out, m.block, m.layer, True, job.num_bytes, job.submitted, job.end, m.owners, m.transient)
            for job in jobs
            for m in (job.tag,)
        )


def work_of(positions: np.ndarray, prefills: Sequence[Prefill]) -> StepWork:
    """What decode rows at `positions` [B] and prefills compute, as far as its time depends on it."""
    num = len(positions)
    kv, longest = (int(np.add.reduce(positions)) + num, int(np.maximum.reduce(positions)) + 1) if num else (0, 0)
    if not prefills:
        return StepWork(num, kv, longest, (), num)
    sampled = num + sum(p.samples for p in prefills)
    return StepWork(num, kv, longest, tuple((p.start, len(p.tokens)) for p in prefills), sampled)


def _overlapped(start: float, second: float, host: float, device: np.ndarray) -> np.ndarray:
    """When steps end that take `device` [n] seconds each. The first starts at `start`; the others when the one before
    has ended, and not before the host is ready: for the second at `second`, then `host` seconds after the last but one
    has ended."""
    device[0] += start
    ends = np.cumsum(device)
    if not np.count_nonzero(device < host) and second <= ends[0]:  # each is submitted before the device is free
        return ends
    for i in range(1, len(ends)):
        ready = second if i == 1 else ends[i - 2] + host
        ends[i] = max(ends[i - 1], ready) + device[i]
    return ends

"""The simulated executor: a plan takes the time that a cost model says, on a virtual clock. No JAX here.

Steps run one after the other, as on a device's queue; a step that is submitted while another runs starts when that one
ends. Requests end by length: every token is 0. Copies share a link per direction (`link.py`), and compute waits for the
layers that it reads (`overlap.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.clock import VirtualClock
from engine.config import EngineConfig
from engine.costmodel.step_model import StepModel, StepWork
from engine.memory.moves import Copy, Move
from engine.scheduler.plan import Plan, StepResult


@dataclass(slots=True)
class Ticket:
    """A submitted step, or `plan.repeat` of them."""

    plan: Plan
    start: float  # seconds on the clock: submitted, and the step before it ended
    ends: np.ndarray  # float64 [repeat]
    passed: int = 0  # steps that have been collected


class SimExecutor:
    """Implements `Executor` and `FastForward`."""

    def __init__(self, cost: StepModel, config: EngineConfig, clock: VirtualClock):
        self.cost, self.clock, self.depth = cost, clock, config.async_depth
        self._free = clock.now()  # when the device has done all that was submitted
        self._ahead = np.empty(0)  # when the steps end that `repeats` looked at

    def submit(self, plan: Plan) -> Ticket:
        """Schedules the plan behind what was submitted before."""
        now, start = self.clock.now(), max(self.clock.now(), self._free)
        if plan.repeat > 1:
            ends = self._ahead[: plan.repeat]
        else:
            ends = np.array([max(now + self.cost.host, self._free) + self.cost.step(work_of(plan)).device])
        self._free = float(ends[-1])
        return Ticket(plan, start, ends)

    def collect(self, ticket: Ticket) -> StepResult:
        """Lets time pass until the ticket's last step has ended."""
        end = float(ticket.ends[-1])
        self.clock.wait_until(end)
        start = ticket.start if ticket.passed == 0 else float(ticket.ends[-2])
        tokens = np.zeros(ticket.plan.num_sampled, np.int32)
        if ticket.plan.forced is not None:
            tokens = np.maximum(ticket.plan.forced, 0)
        return StepResult(tokens, None, start, end)

    def repeats(self, plan: Plan, limit: int, until: float) -> int:
        """See `FastForward`. A step is planned when the one `depth` + 1 before it has ended."""
        now, host, depth = self.clock.now(), self.cost.host, self.depth
        work = work_of(plan)
        first = self.cost.step(work).device  # the shortest: contexts grow
        count = int(min(limit, (until - now) / first + depth + 2))
        device = self.cost.decode_seconds(work.num_decode, work.decode_kv, work.max_kv, count)
        start = max(now + host, self._free)
        if depth == 0:  # host and device take turns
            turns = np.empty(2 * count)
            turns[0::2], turns[1::2] = host, device
            turns[0] = start
            ends = np.cumsum(turns)[1::2]
            planned = np.concatenate([[now], ends[:-1]])
        else:
            ends = _overlapped(start, max(now, self._free) + host, host, device)
            planned = np.concatenate([[now, max(now, self._free)], ends])[:count]
        self._ahead = ends
        return max(1, int(np.searchsorted(planned, until)))

    def pass_steps(self, ticket: Ticket, count: int) -> np.ndarray:
        """See `FastForward`."""
        ends = ticket.ends[ticket.passed : ticket.passed + count]
        ticket.passed += count
        self.clock.wait_until(float(ends[-1]))
        return ends

    def abandon(self, moves: tuple[Move, ...]) -> tuple[Copy, ...]:
        """Nothing that was begun can fail here."""
        return ()

    def wait_for_copies(self) -> tuple[Copy, ...]:
        """Lets time pass until a copy has ended."""
        raise AssertionError

    def drop(self, blocks: tuple[int, ...]) -> None:
        """There are no bytes to let go of."""

    def poison(self, mask: np.ndarray) -> None:
        """There are no bytes to fill."""


def work_of(plan: Plan) -> StepWork:
    """What a plan computes, as far as its time depends on it."""
    positions, num = plan.decode_positions, len(plan.decode_positions)
    kv, longest = (int(positions.sum()) + num, int(positions.max()) + 1) if num else (0, 0)
    return StepWork(num, kv, longest, tuple((p.start, len(p.tokens)) for p in plan.prefills), plan.num_sampled)


def _overlapped(start: float, second: float, host: float, device: np.ndarray) -> np.ndarray:
    """When steps end that take `device` [n] seconds each. The first starts at `start`; the others when the one before
    has ended, and not before the host is ready: for the second at `second`, then `host` seconds after the last but one
    has ended."""
    ends = np.cumsum(np.concatenate([[start], device]))[1:]
    if host <= device.min():  # each is submitted before the device is free
        return ends
    for i in range(1, len(ends)):
        ready = second if i == 1 else ends[i - 2] + host
        ends[i] = max(ends[i - 1], ready) + device[i]
    return ends

"""What an engine learns from outside, kept in order, and an executor that says it all once more. No JAX here.

A schedule may follow from the requests that come, from the time at which the policy is asked for a plan, and from what
the executor answers: tokens, times, copies that ended. `RecordingExecutor` keeps the answers of a real executor;
`RecordedExecutor` gives them again on a virtual clock and insists on the same calls in the same order. The rest of the
recording, requests and times of planning, is the engine's (`engine/recording.py`). This is replay identity (ours): a
policy that asks for anything else, the executor's kind or the wall clock, sooner or later plans another step.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from engine.clock import Clock, VirtualClock
from engine.executor.protocol import Executor
from engine.memory.moves import Copy, Move
from engine.scheduler.plan import Plan, StepResult

# Calls across the engine's border, and what each is given, as messages name it.
CALLS = {
    "add_request": "request",  # its arguments by name
    "abort": "request",  # its id
    "plan": "now",  # the policy's
    "submit": "plan",
    "collect": "step",  # its number
    "wait_for_copies": "nothing",
    "abandon": "moves",
    "drop": "blocks",
    "poison": "mask",
}
SHOWN = 24  # elements of an array that a message shows


@dataclass(frozen=True, slots=True)
class Event:
    """One call."""

    call: str  # of `CALLS`
    time: float  # seconds on the engine's clock: of a call to the executor when it had ended
    given: Any = None
    answer: Any = None  # an exception: it was raised


Recording = list[Event]


class Diverged(AssertionError):
    """The engine does something else than the one that was recorded: names the step, the field and both values."""


class RecordingExecutor:
    """Implements `Executor`: hands every call on to `inner`, and keeps it with its answer, a failure included."""

    def __init__(self, inner: Executor, recording: Recording, clock: Clock):
        self.inner, self._recording, self._clock = inner, recording, clock

    def submit(self, plan: Plan) -> tuple[int, Any]:
        """The ticket is the step's number and `inner`'s."""
        return plan.step, self._call("submit", plan, plan)

    def collect(self, ticket: tuple[int, Any]) -> StepResult:
        """See `Executor`."""
        step, inner = ticket
        return self._call("collect", step, inner)

    def wait_for_copies(self) -> tuple[Copy, ...]:
        """See `Executor`."""
        return self._call("wait_for_copies", None)

    def abandon(self, moves: tuple[Move, ...]) -> tuple[Copy, ...]:
        """See `Executor`."""
        return self._call("abandon", moves, moves)

    def drop(self, blocks: tuple[int, ...]) -> None:
        """See `Executor`."""
        self._call("drop", blocks, blocks)

    def poison(self, mask: np.ndarray) -> None:
        """See `Executor`."""
        self._call("poison", mask, mask)

    def _call(self, call: str, given: Any, *args: Any) -> Any:
        given = copy.deepcopy(given)  # as it is now, whatever becomes of its arrays
        try:
            answer = getattr(self.inner, call)(*args)
        except Exception as error:
            self._recording.append(Event(call, self._clock.now(), given, error))
            raise
        kept = None if call == "submit" else answer  # a ticket may hold device memory
        self._recording.append(Event(call, self._clock.now(), given, kept))
        return answer


class RecordedExecutor:
    """Implements `Executor`: a recording's answers, while the engine makes its calls. Time passes as it did.

    Raises:
      Diverged: from every method, at the first call that is another one, or has something else in it.
    """

    def __init__(self, recording: Recording, clock: VirtualClock):
        self.clock = clock
        self.failure: Exception | None = None  # raised last because the recorded executor had raised it
        self._recording, self._position = recording, 0
        self._step = 0  # submitted last
        self._diverged: Diverged | None = None

    @property
    def next(self) -> Event | None:
        """What comes next; None at the end."""
        return self._recording[self._position] if self._position < len(self._recording) else None

    def pop(self) -> Event:
        """Takes the next event, one that whoever drives the engine brings about."""
        self._position += 1
        return self._recording[self._position - 1]

    def planned(self, now: float) -> None:
        """The policy is asked for a plan at time `now`."""
        self._answer("plan", now)

    def submit(self, plan: Plan) -> int:
        """Compares the plan with the recorded one. The ticket is the step's number."""
        self._answer("submit", plan)
        self._step = plan.step
        if self.next is not None and self.next.call == "plan":  # one more step ahead: the clock is looked at first
            self.clock.wait_until(self.next.time)
        return plan.step

    def collect(self, ticket: int) -> StepResult:
        """Lets time pass until the step was collected; what it brought then."""
        return self._answer("collect", ticket)

    def wait_for_copies(self) -> tuple[Copy, ...]:
        """Lets time pass until copies had ended: those."""
        return self._answer("wait_for_copies", None)

    def abandon(self, moves: tuple[Move, ...]) -> tuple[Copy, ...]:
        """What came of the moves of a step that failed."""
        return self._answer("abandon", moves)

    def drop(self, blocks: tuple[int, ...]) -> None:
        """The same blocks."""
        self._answer("drop", blocks)

    def poison(self, mask: np.ndarray) -> None:
        """The same pages."""
        self._answer("poison", mask)

    def _answer(self, call: str, given: Any) -> Any:
        """The recorded answer, if this is the recorded call."""
        event = self.next
        if event is None or event.call != call:
            self.diverge(f"{_name(event)} comes next in the recording, the engine goes on with {call}")
        found = difference(event.given, given, CALLS[call])
        if found is not None:
            step = f"step {event.given.step}" if call == "submit" else f"{call} after step {self._step}"
            self.diverge(found, where=step)
        self._position += 1
        self.clock.wait_until(event.time)
        if isinstance(event.answer, Exception):
            self.failure = event.answer
            raise event.answer
        return event.answer

    def diverge(self, what: str, where: str = "") -> NoReturn:
        """Raises `Diverged`; once more the first one when the engine, failing, makes more calls."""
        self._diverged = self._diverged or Diverged(f"{where or f'after step {self._step}'}: {what}")
        raise self._diverged


def difference(recorded: Any, found: Any, path: str) -> str | None:
    """The first difference of two values, dataclasses and arrays inside them included, in words; None when there is
    none. Arrays differ in a bit, or in dtype. path: what to call the value."""
    if type(recorded) is not type(found):
        return _differs(path, recorded, found)
    if dataclasses.is_dataclass(recorded):
        names = [f.name for f in dataclasses.fields(recorded)]
        parts = [(getattr(recorded, name), getattr(found, name), f"{path}.{name}") for name in names]
    elif isinstance(recorded, tuple):
        if len(recorded) != len(found):
            return _differs(path, recorded, found)
        parts = [(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(recorded, found, strict=True))]
    elif isinstance(recorded, np.ndarray):
        same = recorded.dtype == found.dtype and recorded.shape == found.shape
        return None if same and recorded.tobytes() == found.tobytes() else _differs(path, recorded, found)
    else:
        return None if recorded == found else _differs(path, recorded, found)
    return next((d for part in parts if (d := difference(*part)) is not None), None)


def _differs(path: str, recorded: Any, found: Any) -> str:
    """Of arrays of one shape only the first element that differs is shown."""
    arrays = isinstance(recorded, np.ndarray) and isinstance(found, np.ndarray)
    if arrays and (recorded.shape, recorded.dtype) == (found.shape, found.dtype):
        where = next(i for i in np.ndindex(recorded.shape) if recorded[i].tobytes() != found[i].tobytes())
        path = f"{path}[{', '.join(map(str, where))}]"
        recorded, found = recorded[where].item(), found[where].item()
    return f"{path} was {_shown(recorded)}, is {_shown(found)}"


def _shown(value: Any) -> str:
    """On one line."""
    with np.printoptions(threshold=SHOWN):
        return " ".join(repr(value).split())


def _name(event: Event | None) -> str:
    """An event in words."""
    if event is None:
        return "nothing"
    return f"{event.call} of step {event.given.step}" if event.call == "submit" else event.call

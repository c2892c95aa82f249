"""What the engine asks of an executor. No JAX here."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np

from engine.memory.moves import Copy, Move
from engine.scheduler.plan import Plan, StepResult


class Executor(Protocol):
    """Carries plans out: on a device, or on a virtual clock."""

    def submit(self, plan: Plan) -> Any:
        """Starts a step and returns a ticket without waiting for results."""
        ...

    def collect(self, ticket: Any) -> StepResult:
        """Waits for a step's results. A copy in that failed is reported with its step at the latest."""
        ...

    def abandon(self, moves: tuple[Move, ...]) -> tuple[Copy, ...]:
        """A step with these moves failed before or in `submit`: forgets what it began. Returns the copies that have
        ended, and as failed the moves that were not started."""
        ...

    def wait_for_copies(self) -> tuple[Copy, ...]:
        """Waits until a copy in flight has ended."""
        ...

    def drop(self, blocks: tuple[int, ...]) -> None:
        """Lets go of host blocks that nobody will ask for."""
        ...

    def poison(self, mask: np.ndarray) -> None:
        """Fills the pages of `mask` bool [P] with NaN (tests)."""
        ...


@runtime_checkable
class FastForward(Protocol):
    """What an executor has besides when it can run `Plan.repeat` steps at once."""

    def repeats(self, plan: Plan, limit: int, until: float) -> int:
        """How many of up to `limit` steps like `plan`, a plan of decodes, would be planned before time `until` if each
        were planned by itself. At least 1: `plan` has been planned."""
        ...

    def pass_steps(self, ticket: Any, count: int) -> tuple[float, list[float]]:
        """Waits for the next `count` steps of a ticket, not the last one. When the first of them started, and when each
        ended, [count]."""
        ...

"""Steps between their submission and their account, and what is recorded of each. No JAX here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.memory.moves import Copy
from engine.metrics import StepRecord
from engine.request import Request
from engine.scheduler.plan import Plan, StepResult
from engine.scheduler.state import SchedulerState


@dataclass(slots=True)
class InFlight:
    """A submitted step, or `plan.repeat` of them. Its rows belong to these requests, whatever becomes of their slots
    before it is collected."""

    plan: Plan
    ticket: Any
    rows: list[tuple[Request, int]]  # of the sampled rows, and how often it had lost its KV then
    prefilled: list[Request]
    passed: int = 0  # steps that have been collected
    since: float | None = None  # when the last of those ended

    @property
    def left(self) -> int:
        """Steps to collect."""
        return self.plan.repeat - self.passed


def step_record(
    step: InFlight,
    result: StepResult,
    copies: tuple[Copy, ...],
    state: SchedulerState,
    page_bytes: int,
    num_finished: int,
    num_late: int,
) -> StepRecord:
    """The record of a plan whose last step was just accounted.

    Args:
      copies: that ended since the last record.
      num_finished: requests that ended with it.
      num_late: rows that came to nothing, because their request had ended or lost its KV.
    """
    plan, store = step.plan, state.store
    traffic: dict[str, Any] = {}
    for way, landed in (("out", True), ("in", False)) if copies else ():
        moved = [c for c in copies if c.ok and c.out is landed]
        traffic[f"bytes_{way}"] = sum(c.num_bytes for c in moved)
        traffic[f"seconds_{way}"] = sum(c.end - c.start for c in moved)
    return StepRecord(
        step=plan.step,
        repeat=plan.repeat,
        start=result.start,
        end=result.end,
        num_tokens=(step.passed + 1) * len(step.rows) - num_late,
        num_decode=len(plan.decode_slots),
        num_prefill_seqs=len(plan.prefills),
        prefill_tokens=plan.num_prefill_tokens,
        num_waiting=len(state.waiting),
        num_running=len(state.running),
        num_swapped=len(state.swapped),
        free_pages=store.num_free_pages,
        num_preempted=plan.num_preempted,
        num_finished=num_finished,
        num_late=num_late,
        host_bytes=store.num_host_pages * page_bytes,
        mapped_pages=store.num_mapped_pages,
        copies=copies,
        device_start=result.device_start,
        device_end=result.device_end,
        **traffic,
    )

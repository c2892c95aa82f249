"""What a policy planned, step by step, in a notation that can be worked out by hand.

A B C+32 xD     A and B decode, 32 tokens of C's prompt are prefilled, D was preempted
>D  <D          D was swapped out; D came back
-               the step only moves pages
"""

from engine.engine import Engine
from engine.request import SamplingParams
from engine.scheduler.plan import Plan
from tests.conformance.symbolic import symbolic_engine

STEPS = 200


class Trace:
    """Follows an engine from its executor's point of view: `lines` has one line per submitted plan."""

    def __init__(self, engine: Engine):
        self.engine, self.lines = engine, []
        self._running, self._swapped = set(), set()
        self._submit, engine.executor.submit = engine.executor.submit, self._traced

    def add(self, name: str, prompt: int, output: int, priority: int = 0, stop: tuple[int, ...] = ()) -> None:
        """Adds a request of so many prompt tokens, that produces `output` tokens unless a `stop` token comes."""
        params = SamplingParams(max_tokens=output, ignore_eos=True, stop_token_ids=stop)
        self.engine.add_request([1] * prompt, params, request_id=name, priority=priority)

    def run(self) -> list[str]:
        """Serves everything, in at most as many steps as any test needs; returns the lines."""
        for _ in range(STEPS):
            if not self.engine.has_work():
                return self.lines
            self.engine.step()
        raise AssertionError(f"no end after {STEPS} steps: {self.lines}")

    def _traced(self, plan: Plan):
        state = self.engine.state
        name = lambda slot: state.requests[slot].id  # noqa: E731
        words = [name(slot) for slot in plan.decode_slots]
        words += [f"{name(p.slot)}+{len(p.tokens)}" for p in plan.prefills]
        running, swapped = {r.id for r in state.requests if r}, {r.id for r in state.swapped}
        words += sorted("<" + i for i in self._swapped & running) + sorted(">" + i for i in swapped - self._swapped)
        words += sorted("x" + r.id for r in state.waiting if r.id in self._running)
        self._running, self._swapped = running, swapped
        self.lines.append(" ".join(words) or "-")
        return self._submit(plan)


def traced(**setup) -> Trace:
    """A trace over a fresh symbolic engine: of this `setup`."""
    return Trace(symbolic_engine(**setup))

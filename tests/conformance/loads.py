"""Serves a load on the symbolic engine and checks everything a policy promises. What `make conformance` fuzzes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.engine import Engine
from engine.errors import RequestError
from engine.request import SamplingParams
from tests.conformance.symbolic import MODEL, answer, symbolic_engine


@dataclass(frozen=True)
class Arrival:
    """A request of a load: `gap` steps after the one before it; aborted after `abort` further steps, if it says so."""

    prompt: int
    output: int
    gap: int = 0
    priority: int = 0
    abort: int | None = None

    def tokens(self, index: int) -> list[int]:
        """Its prompt: seeded by its place in the load."""
        return np.random.default_rng(index).integers(0, MODEL.vocab_size, self.prompt).tolist()


def run(policy: str, load: list[Arrival], **setup) -> Engine:
    """Serves `load` under `policy` on a symbolic engine of this `setup` and returns the engine.

    Raises:
      AssertionError: a wrong token, a leak, an illegal plan, or no progress.
    """
    engine = symbolic_engine(policy=policy, **setup)
    wanted, aborts, done, step = {}, {}, {}, 0

    def advance() -> None:
        nonlocal step
        for request_id in aborts.pop(step, []):
            if engine.abort(request_id):
                del wanted[request_id]
        done.update((o.request_id, o.token_ids) for o in engine.step() if o.finished)
        step += 1

    for i, arrival in enumerate(load):
        for _ in range(arrival.gap):
            advance()
        params, prompt = SamplingParams(max_tokens=arrival.output), arrival.tokens(i)
        try:
            request_id = engine.add_request(prompt, params, priority=arrival.priority)
        except RequestError:  # it can never fit
            assert not engine.store.can_ever_hold(arrival.prompt + arrival.output - 1)
            continue
        wanted[request_id] = answer(prompt, arrival.output)
        if arrival.abort is not None:
            aborts.setdefault(step + arrival.abort, []).append(request_id)
    limit = step + bound(load, setup.get("max_batched_tokens", 4096))
    while engine.has_work():
        assert step < limit, f"no end after {step} steps: {len(wanted) - len(done)} requests are not served"
        advance()
    assert {i: done.get(i) for i in wanted} == wanted, "a request's tokens depend on what ran beside it"
    assert engine.store.num_free_pages == engine.store.num_pages and engine.store.num_host_pages == 0, "pages leaked"
    assert engine.store.num_free_slots == engine.store.num_slots, "slots leaked"
    engine.state.check()
    return engine


def bound(load: list[Arrival], budget: int) -> int:
    """Steps that are enough whenever each admission yields a token: for every token, a prefill of the longest sequence
    in chunks of the budget, its way to the host and back, and one step of every other."""
    longest = max(a.prompt + a.output for a in load)
    return sum(a.output for a in load) * (-(-longest // budget) + len(load) + 4)

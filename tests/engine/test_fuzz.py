"""Ten thousand random operations on a real engine: every page comes back, nothing leaks, nothing recompiles."""

import jax
import numpy as np
import pytest

from engine.errors import RequestError
from engine.request import SamplingParams
from tests.engine.tiny import NARROW, tiny_engine


class CompileCount:
    """Counts backend compilations in this process."""

    def __init__(self):
        self.n = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, seconds: float, **_) -> None:
        self.n += event == "/jax/core/compile/backend_compile_duration"


@pytest.mark.parametrize("seed, operations", [(0, 10_000), pytest.param(1, 60_000, marks=pytest.mark.long)])
def test_random_operations_leak_nothing_and_compile_nothing(seed, operations):
    """add / step / abort at random, with sampling of all kinds, in a pool that holds about two of the longer ones."""
    engine = tiny_engine(
        NARROW, num_pages=14, max_num_seqs=4, capture_logits=False, poison=False, debug_checks=True, query_tile=16
    )
    compiles = CompileCount()
    engine.warmup()
    assert compiles.n > 10, "compilations are not seen, so their absence would mean nothing"
    compiles.n = 0
    rng = np.random.default_rng(seed)
    live, added, refused, aborted, finished, preempted = set(), 0, 0, 0, 0, 0
    for _ in range(operations):
        kind = rng.choice(["add", "step", "abort"], p=[0.1, 0.87, 0.03])
        if kind == "add" and len(live) < 12:
            prompt = rng.integers(0, 512, rng.integers(1, 250)).tolist()
            params = SamplingParams(
                temperature=float(rng.choice([0, 0, 0.7])),
                top_k=int(rng.choice([0, 5])),
                top_p=float(rng.choice([1.0, 0.9])),
                min_p=float(rng.choice([0.0, 0.1])),
                max_tokens=int(rng.integers(9, 120)),
                min_tokens=int(rng.choice([0, 0, 9])),
                logprobs=rng.choice([None, None, None, 4]),
                stop_token_ids=tuple(rng.integers(0, 512, rng.integers(0, 4)).tolist()),
            )
            try:
                live.add(engine.add_request(prompt, params))
                added += 1
            except RequestError:
                refused += 1
        elif kind == "abort" and live:
            victim = rng.choice(sorted(live))
            assert engine.abort(victim) and not engine.abort(victim)
            live.remove(victim)
            aborted += 1
        else:
            for out in engine.step():
                if out.finished:
                    live.remove(out.request_id)
                    finished += 1
                    preempted += out.metrics.num_preemptions
    while engine.has_work():
        for out in engine.step():
            finished += out.finished
    assert added == finished + aborted and min(refused, aborted, finished, preempted) > 20
    assert engine.store.num_free_pages == engine.store.num_pages
    assert engine.store.num_free_slots == engine.store.num_slots
    engine.state.check()
    assert compiles.n == 0

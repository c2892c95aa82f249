"""Protects invariant 3: a policy that leaves everybody where they are is named at once, and the engine goes on."""

import json

import pytest

from engine.errors import PolicyError
from engine.scheduler.policy import make_policy
from engine.scheduler.state import NOBODY
from engine.scheduler.vllm_v0 import VllmV0
from engine.scheduler.vllm_v1 import VllmV1
from tests.engine.pattern_engine import PARAMS, finish, pattern_engine, serving
from tests.experiments import programs

LAZY = """
from engine.scheduler.state import NOBODY
from engine.scheduler.vllm_v1 import VllmV1

class Lazy(VllmV1):
    def horizon(self, plan):
        return 1

    def plan(self, now):
        done = self.state.step >= 5
        return self.state.make_plan(NOBODY, []) if done else super().plan(now)
"""


class StopsAfterFive(VllmV1):
    """Five good steps, then none."""

    def plan(self, now):
        return self.state.make_plan(NOBODY, []) if self.state.step >= 5 else super().plan(now)


class EmptiesTheRoom(VllmV0):
    """Before its sixth step it preempts one sequence per plan, and schedules nobody meanwhile."""

    leaving = True

    def plan(self, now):
        state = self.state
        if self.leaving and state.step == 5:
            self.leaving = len(state.running) > 1
            if len(state.running):
                state.preempt(state.victim(state.running))
            return state.make_plan(NOBODY, [])
        return super().plan(now)


@pytest.mark.parametrize("async_depth", [0, 1])
def test_a_policy_that_stops_is_named_and_can_be_replaced(async_depth):
    """Two that ran are back in the queue, with nothing lost but their KV: another policy serves them to the end."""
    name = f"{__name__}:StopsAfterFive"
    engine = pattern_engine(policy=name, async_depth=async_depth)
    requests = serving(engine, 5, 9, steps=4)
    expected = rf"^policy '{name}' schedules none of 2 requests, though nothing is in flight: 0 waiting, 2 running, 0 "
    with pytest.raises(PolicyError, match=expected):
        for _ in range(4):
            engine.step()
    assert len(engine.state.waiting) == 2 and engine.store.num_free_pages == engine.store.num_pages
    with pytest.raises(PolicyError, match="2 waiting, 0 running"):
        for _ in range(2):
            engine.step()
    engine.policy = make_policy(pattern_engine().config.scheduler, engine.state, 64)
    finish(engine, *requests)


def test_the_others_of_an_engine_that_was_stuck(monkeypatch):
    """Aborting everybody ends the work; nothing is leaked."""
    monkeypatch.setattr(VllmV0, "plan", lambda self, now: self.state.make_plan(NOBODY, []))
    engine = pattern_engine()
    engine.add_request([1, 2], PARAMS, request_id="a")
    engine.step()  # one plan may be empty: it might have preempted
    engine.add_request([3, 4], PARAMS, request_id="b")
    engine.step()  # things have changed since
    with pytest.raises(PolicyError, match="2 waiting, 0 running"):
        engine.step()
    assert engine.abort("a") and engine.abort("b") and not engine.has_work()
    assert engine.store.num_free_pages == engine.store.num_pages
    engine.state.check()
    with pytest.raises(PolicyError, match="1 waiting"):
        engine.generate([[1, 2, 3]])
    assert not engine.has_work()


@pytest.mark.parametrize("async_depth", [0, 1])
def test_preempting_instead_of_scheduling_is_progress(async_depth):
    """Plan after plan without a row, each with one sequence fewer running."""
    engine = pattern_engine(policy=f"{__name__}:EmptiesTheRoom", async_depth=async_depth)
    requests = serving(engine, 5, 9, 3, steps=2)
    finish(engine, *requests)
    assert [r.num_preemptions for r in requests] == [1, 1, 1]


def test_serve_ends_with_one_line(tmp_path):
    """And keeps the steps that were made."""
    (tmp_path / "mine.py").write_text(LAZY)
    code, _, stderr = programs.run(
        "serve", "--model_spec=tiny-1m", "--executor=sim", "--device=h100", "--num_pages=64", "--policy=mine.py:Lazy",
        "--workload=burst:num=2,context=8,output=20", "--out=run", cwd=tmp_path,
    )  # fmt: skip
    assert code == 2 and stderr.splitlines()[-1].startswith("serve: policy 'mine.py:Lazy' schedules none of 2 requests")
    assert [json.loads(r)["step"] for r in (tmp_path / "run/steps.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5]

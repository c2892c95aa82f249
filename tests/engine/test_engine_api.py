"""Everybody gets their own outputs, whoever runs the steps; and a failed step costs work, never tokens."""

import numpy as np
import pytest

from engine.engine import STEP_LOG
from engine.errors import RequestError
from engine.request import SamplingParams
from tests.engine.fake import fake_engine
from tests.engine.tiny import prompts, tiny_engine


def test_generate_beside_a_queued_request():
    """`generate` waits for its own; the other's outputs come from the next `step`."""
    engine = fake_engine(num_pages=64)
    other = engine.add_request([5, 6], SamplingParams(max_tokens=2))
    (out,) = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=5))
    assert len(out.token_ids) == 5 and out.finished and out.finish_reason == "length"
    assert engine.has_work(), "an output has not been handed out"
    outputs = engine.step()
    assert [(o.request_id, len(o.new_token_ids), o.finished) for o in outputs] == [(other, 1, False), (other, 1, True)]
    assert not engine.has_work()


def test_the_step_log_is_bounded_and_unfinished_requests_are_known():
    """A session that nobody watches keeps the latest records only."""
    engine = fake_engine(num_pages=1024)
    engine.add_request([1, 2, 3], SamplingParams(max_tokens=STEP_LOG + 10), request_id="long")
    for _ in range(STEP_LOG + 5):
        engine.step()
    assert [r.step for r in engine.step_log] == list(range(6, STEP_LOG + 6))
    engine.add_request([4], request_id="queued")
    left = engine.unfinished()
    assert left.keys() == {"long", "queued"}
    assert (left["long"].num_output_tokens, left["long"].ttft_s) == (STEP_LOG + 5, 1.0)
    assert left["queued"].queue_s is left["long"].e2e_s is None
    engine.abort("queued")
    assert engine.unfinished().keys() == {"long"}


def test_streams_interleave_with_each_other_and_with_generate():
    """One new token per item, in both streams, and a `generate` in between."""
    engine = fake_engine(num_pages=64)
    p = SamplingParams(max_tokens=6)
    lengths = []
    for a, b in zip(engine.stream([1], p), engine.stream([2], p), strict=True):
        lengths.append((len(a.new_token_ids), len(b.new_token_ids)))
        if len(lengths) == 3:
            assert len(engine.generate([[3]], p)[0].token_ids) == 6
    assert lengths == [(1, 1)] * 6 and not engine.has_work()


def test_a_stream_ends_when_its_request_is_aborted_and_aborts_when_it_is_left():
    """Neither hangs, neither leaks."""
    engine = fake_engine(num_pages=64)
    assert len([engine.abort(o.request_id) for o in engine.stream([1, 2, 3])]) == 1
    for _ in engine.stream([1, 2, 3]):
        break
    assert not engine.has_work() and engine.store.num_free_pages == engine.store.num_pages


def test_generate_returns_what_an_aborted_request_had():
    """Its output says so."""
    engine = fake_engine(num_pages=64)
    engine.executor.collect = abort_at(engine, engine.executor.collect, step=3)
    (out,) = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=9))
    assert out.finish_reason == "abort" and out.finished and len(out.token_ids) == 3


def abort_at(engine, collect, step):
    """Aborts everything once the given step has been accounted for: at the start of the next plan."""
    plan = engine.policy.plan

    def planned(now):
        if len(engine.executor.plans) == step:
            for request_id in list(engine._live):
                engine.abort(request_id)
        return plan(now)

    engine.policy.plan = planned
    return collect


def test_bad_arguments_leave_nothing_behind():
    """A ragged prompt, parameters of the wrong type."""
    engine = fake_engine(num_pages=64)
    with pytest.raises(RequestError, match="one flat list"):
        engine.generate([[1, 2], [[1], [2, 3]]])
    with pytest.raises(RequestError, match="params must be SamplingParams, got dict"):
        engine.add_request([1], {"max_tokens": 3})
    assert not engine.has_work()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["submit", "collect", "_account"])
def test_a_step_that_fails_changes_no_token(where, error):
    """Whatever part of a step fails, going on gives the tokens of an undisturbed run, bit for bit (DESIGN, 5)."""
    engine = tiny_engine(num_pages=24, deterministic=True)
    prompt_list = prompts([20, 40, 33])
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    expected = engine.generate(prompt_list, params)
    owner = engine if where == "_account" else engine.executor
    original, calls = getattr(owner, where), []

    def failing(*args):
        calls.append(1)
        if len(calls) in (1, 4, 5, 9):
            raise error("injected")
        return original(*args)

    setattr(owner, where, failing)
    ids = [engine.add_request(p, params) for p in prompt_list]
    done, failures = {}, 0
    while engine.has_work():
        try:
            done.update((o.request_id, o) for o in engine.step() if o.finished)
        except error:
            failures += 1
            engine.state.check()
    assert failures == 4
    for request_id, want in zip(ids, expected, strict=True):
        assert done[request_id].token_ids == want.token_ids
        assert np.array_equal(done[request_id].logits, want.logits)
    assert engine.store.num_free_pages == engine.store.num_pages

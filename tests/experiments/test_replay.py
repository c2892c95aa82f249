"""Protects what latencies mean: open loop, t0 = scheduled arrival, queue against prefill; by hand on virtual time."""

import signal

import pytest

from experiments.replay import Observer, StopFlag, replay
from experiments.workloads import WorkloadRequest
from tests.experiments.timed_engine import timed_engine


class Log(Observer):
    def __init__(self, stop=None, after=None):
        self.outputs, self.refusals, self.steps = {}, {}, []
        self._stop, self._after = stop, after

    def on_finished(self, request, output):
        self.outputs[request.id] = output

    def on_refused(self, request, error):
        self.refusals[request.id] = str(error)

    def on_step(self, record, progress):
        self.steps.append(record)
        if len(self.steps) == self._after:
            self._stop(signal.SIGINT, None)


def run(requests, log=None, stop=None, **engine):
    engine = timed_engine(**engine)
    log, stop = log or Log(), stop or StopFlag()
    requests = [WorkloadRequest(*r) for r in requests]
    return replay(engine, requests, log, stop), log


def test_two_requests_by_hand():
    # a: due 0.5, prefill 100 tokens = 1 s, then 2 decode steps of 0.25 s -> first token 1.5, last 2.0
    # b: due 0.6, learned of at 1.5 when a's prefill ends, prefilled at once (0.5 s) before a's decodes.
    progress, log = run([("a", 0.5, 100, 3), ("b", 0.6, 50, 1)], token_s=0.01, decode_s=0.25)
    a, b = log.outputs["a"].metrics, log.outputs["b"].metrics
    assert (a.injection_lag_s, a.queue_s, a.prefill_s) == pytest.approx((0.0, 0.0, 1.0))
    assert (b.injection_lag_s, b.queue_s, b.prefill_s) == pytest.approx((0.9, 0.9, 0.5))
    assert b.e2e_s == pytest.approx(1.4) and b.tpot_s is None
    assert a.itl_s == pytest.approx((0.75, 0.25)) and a.e2e_s == pytest.approx(2.0)
    assert progress.elapsed == pytest.approx(2.5)
    assert (progress.num_arrived, progress.num_in_flight, progress.num_output_tokens) == (2, 0, 4)
    assert progress.stopped_by is None


def test_arrivals_do_not_wait_for_the_engine():
    # Every request takes 1 s alone and one arrives each 0.1 s: the queue grows, arrivals stay on schedule.
    progress, log = run([(str(i), 0.1 * i, 100, 1) for i in range(20)], token_s=0.01, max_batched_tokens=100)
    ttfts = [log.outputs[str(i)].metrics.ttft_s for i in range(20)]
    assert ttfts == sorted(ttfts) and ttfts[-1] > 15
    assert progress.elapsed == pytest.approx(20.0)


def test_impossible_requests_are_refused_and_the_run_goes_on():
    progress, log = run([("long", 0.0, 2000, 4), ("ok", 0.1, 20, 2)])
    assert log.refusals.keys() == {"long"} and "2000 tokens" in log.refusals["long"]
    assert log.outputs.keys() == {"ok"}
    assert (progress.num_arrived, progress.num_refused, progress.num_in_flight) == (2, 1, 0)


def test_a_small_pool_preempts_and_the_counts_agree():
    # 12 pages per layer; four prompts of 2 pages each grow to 5 pages: they cannot all stay.
    progress, log = run([(str(i), 0.0, 31, 40) for i in range(4)], num_pages=24)
    assert len(log.outputs) == 4 and progress.num_preempted > 0
    assert progress.num_preempted == sum(o.metrics.num_preemptions for o in log.outputs.values())
    assert all(o.metrics.num_output_tokens == 40 for o in log.outputs.values())


def test_a_signal_ends_the_run_between_two_steps():
    stop = StopFlag()
    requests = [("a", 0.0, 10, 2), ("b", 0.0, 10, 50), ("c", 1000.0, 10, 5)]
    progress, log = run(requests, Log(stop, after=4), stop)
    assert progress.stopped_by == "SIGINT" and len(log.steps) == 4
    assert (progress.num_arrived, len(progress.completed), progress.num_in_flight) == (2, 1, 1)
    with pytest.raises(KeyboardInterrupt):
        stop(signal.SIGINT, None)


def test_priorities_reach_the_engine():
    """Three requests of a burst: their first tokens come in the order of their priorities."""
    engine = timed_engine()
    engine.state.waiting.order = "priority"
    requests = [WorkloadRequest(str(i), 0.0, 10, 1, priority=p) for i, p in enumerate((2, 0, 1))]
    log = Log()
    replay(engine, requests, log, StopFlag())
    assert [*log.outputs] == ["1", "2", "0"]

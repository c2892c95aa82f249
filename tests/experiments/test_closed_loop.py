"""Protects the closed loop: a turn is due its think time after the former turn's end; by hand on virtual time."""

import pytest

from experiments.replay import Observer, StopFlag, replay
from experiments.workloads import WorkloadRequest, build
from tests.experiments.timed_engine import timed_engine


class Log(Observer):
    def __init__(self):
        self.finished, self.refused = {}, {}

    def on_finished(self, request, output):
        self.finished[request.id] = (request, output.metrics)

    def on_refused(self, request, error):
        self.refused[request.id] = request


def run(requests, observer=None, **engine):
    engine = timed_engine(**engine)
    log = observer(engine) if observer else Log()
    return replay(engine, requests, log, StopFlag()), log


def turn(name, arrival, prompt, output, session, number, think=None):
    return WorkloadRequest(name, arrival, prompt, output, session=session, turn=number, think_s=think)


def test_a_session_by_hand():
    # a0: due 1.0, prefill of 100 tokens 1 s, one decode step 0.25 s: ends 2.25. a1: due 2.25 + 0.5 = 2.75, prefill 2 s:
    # ends 4.75. a2: due 4.75 + 3 = 7.75, ends 7.75 + 2.5 + 0.25. The recorded arrivals of later turns do not count.
    requests = [
        turn("a0", 1.0, 100, 2, "a", 0),
        turn("a1", 1.1, 200, 1, "a", 1, 0.5),
        turn("a2", 1.2, 250, 2, "a", 2, 3.0),
    ]
    progress, log = run(requests, token_s=0.01, decode_s=0.25)
    due = {name: request.arrival_s for name, (request, _) in log.finished.items()}
    assert due == pytest.approx({"a0": 1.0, "a1": 2.75, "a2": 7.75})
    metrics = [log.finished[name][1] for name in ("a0", "a1", "a2")]
    assert [m.arrival - progress.start for m in metrics] == pytest.approx([1.0, 2.75, 7.75])
    assert [m.queue_s for m in metrics] == pytest.approx([0.0] * 3)
    assert [m.e2e_s for m in metrics] == pytest.approx([1.25, 2.0, 2.75])
    assert progress.elapsed == pytest.approx(10.5) and progress.num_dropped == 0


def test_sessions_do_not_wait_for_each_other():
    # b0 is due 2.5, while the think time of a runs (a0 ends 2.0, a1 is due 5.0): served at once. c is open loop.
    requests = [
        turn("a0", 1.0, 100, 1, "a", 0),
        turn("a1", 1.0, 150, 1, "a", 1, 3.0),
        turn("b0", 2.5, 100, 1, "b", 0),
        WorkloadRequest("c", 4.8, 100, 1),
    ]
    _, log = run(requests, token_s=0.01)
    ends = {name: r.arrival_s + m.e2e_s for name, (r, m) in log.finished.items()}
    # c runs from 4.8 to 5.8: a1, due 5.0, is learned of then and waits 0.8 s, which counts.
    assert ends == pytest.approx({"a0": 2.0, "b0": 3.5, "c": 5.8, "a1": 7.3})
    assert log.finished["a1"][1].injection_lag_s == pytest.approx(0.8)


def test_open_loop_turns_come_at_their_times():
    requests = [turn("a0", 0.0, 100, 1, "a", 0), turn("a1", 0.25, 200, 1, "a", 1)]
    _, log = run(requests, token_s=0.01)
    assert log.finished["a1"][0].arrival_s == 0.25 and log.finished["a1"][1].queue_s == pytest.approx(0.75)


def test_a_refused_turn_ends_its_session():
    prompts = (10, 5000, 20, 30)  # the context holds 1024
    requests = [turn(f"a{i}", 0.1 * i, prompt, 1, "a", i, 1.0) for i, prompt in enumerate(prompts)]
    requests += [turn(f"b{i}", 0.1 * i, 10 + 10 * i, 1, "b", i, 1.0) for i in range(2)]
    progress, log = run(requests)
    assert log.finished.keys() == {"a0", "b0", "b1"} and log.refused.keys() == {"a1"}
    assert (progress.num_arrived, progress.num_refused, progress.num_dropped) == (4, 1, 2)
    assert progress.num_arrived + progress.num_dropped == progress.num_requests and progress.num_in_flight == 0


def test_an_aborted_turn_ends_its_session():
    class Aborting(Log):
        def __init__(self, engine):
            super().__init__()
            self._engine = engine

        def on_step(self, record, progress):
            self._engine.abort("a0")

    requests = [turn("a0", 0.0, 10, 9, "a", 0), turn("a1", 0.1, 30, 1, "a", 1, 1.0), turn("b0", 0.0, 10, 5, "b", 0)]
    progress, log = run(requests, Aborting)
    assert log.finished.keys() == {"b0"} and (progress.num_arrived, progress.num_dropped) == (2, 1)


def test_a_session_that_lost_its_first_turns_begins_with_what_is_left():
    requests = build("synthetic:turns=3,arrivals=fixed,think=1.5,loop=closed,prompt=fixed:10,num=6,start=1")
    assert [(r.session, r.turn) for r in requests[:3]] == [("1", 0), ("0", 1), ("2", 0)]
    assert requests[1].think_s == 1.5 and requests[1].arrival_s == 0.5
    _, log = run(requests, token_s=1e-4, decode_s=1e-3)
    assert len(log.finished) == 6 and log.finished[requests[1].id][0].arrival_s == 0.5

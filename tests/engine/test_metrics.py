"""Protects the meaning of every latency: hand-computed requests, TTFT = queue + prefill."""

import dataclasses

import numpy as np

from engine.metrics import RequestMetrics
from engine.request import Request, SamplingParams


def make_request(
    arrival=10.0, injected=10.25, scheduled=12.0, times=(13.0, 13.5, 15.5), finished=15.5, preempted=0, swapped=0
):
    return Request(
        id="r",
        prompt=np.arange(7, dtype=np.int32),
        params=SamplingParams(),
        arrival=arrival,
        output=list(range(len(times))),
        token_times=list(times),
        injected=injected,
        scheduled=scheduled,
        finished=finished,
        num_preemptions=preempted,
        num_swaps=swapped,
    )


def test_one_request_by_hand():
    m = RequestMetrics.from_request(make_request(preempted=2, swapped=1))
    assert dataclasses.asdict(m) == {
        "num_prompt_tokens": 7,
        "num_output_tokens": 3,
        "arrival": 10.0,
        "injection_lag_s": 0.25,
        "queue_s": 2.0,
        "prefill_s": 1.0,
        "ttft_s": 3.0,
        "ttst_s": 0.5,
        "tpot_s": 1.25,
        "itl_s": (0.5, 2.0),
        "e2e_s": 5.5,
        "max_gap_s": 2.0,
        "num_preemptions": 2,
        "num_swaps": 1,
    }


def test_single_token_has_no_tpot():
    m = RequestMetrics.from_request(make_request(times=(13.0,), finished=13.0))
    assert m.tpot_s is m.ttst_s is None and m.itl_s == () and m.max_gap_s is None
    assert m.ttft_s == m.e2e_s == 3.0


def test_aborted_while_waiting_has_no_ttft():
    m = RequestMetrics.from_request(make_request(scheduled=None, times=(), finished=11.0))
    assert m.queue_s is m.prefill_s is m.ttft_s is m.tpot_s is None
    assert m.e2e_s == 1.0


def test_preempted_before_its_first_token_keeps_the_first_schedule():
    m = RequestMetrics.from_request(make_request(scheduled=10.5, times=(14.5, 15.0), finished=15.0, preempted=1))
    assert (m.queue_s, m.prefill_s) == (0.5, 4.0)

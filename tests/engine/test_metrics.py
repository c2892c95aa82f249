"""Protects the meaning of every latency: hand-computed requests, TTFT = queue + prefill, vLLM's formulas."""

import dataclasses
import json

import numpy as np
import pytest

from engine.errors import ConfigError
from engine.metrics import RequestMetrics, Slo, summarise
from engine.request import Request, SamplingParams


def make_request(arrival=10.0, injected=10.25, scheduled=12.0, times=(13.0, 13.5, 15.5), finished=15.5, preempted=0):
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
    )


def test_one_request_by_hand():
    m = RequestMetrics.from_request(make_request(preempted=2))
    assert dataclasses.asdict(m) == {
        "num_prompt_tokens": 7,
        "num_output_tokens": 3,
        "arrival": 10.0,
        "injection_lag_s": 0.25,
        "queue_s": 2.0,
        "prefill_s": 1.0,
        "ttft_s": 3.0,
        "tpot_s": 1.25,
        "itl_s": (0.5, 2.0),
        "e2e_s": 5.5,
        "max_gap_s": 2.0,
        "num_preemptions": 2,
    }


def test_single_token_has_no_tpot():
    m = RequestMetrics.from_request(make_request(times=(13.0,), finished=13.0))
    assert m.tpot_s is None and m.itl_s == () and m.max_gap_s is None
    assert m.ttft_s == m.e2e_s == 3.0


def test_aborted_while_waiting_has_no_ttft():
    m = RequestMetrics.from_request(make_request(scheduled=None, times=(), finished=11.0))
    assert m.queue_s is m.prefill_s is m.ttft_s is m.tpot_s is None
    assert m.e2e_s == 1.0


def test_preempted_before_its_first_token_keeps_the_first_schedule():
    m = RequestMetrics.from_request(make_request(scheduled=10.5, times=(14.5, 15.0), finished=15.0, preempted=1))
    assert (m.queue_s, m.prefill_s) == (0.5, 4.0)


def test_summary_by_hand():
    a = RequestMetrics.from_request(make_request())  # ttft 3, tpot 1.25, gaps .5 2, e2e 5.5
    b = RequestMetrics.from_request(
        make_request(arrival=14.0, injected=14.0, scheduled=14.0, times=(15.0, 15.25), finished=15.25, preempted=1)
    )  # ttft 1, tpot .25, gap .25, e2e 1.25
    s = summarise([a, b], duration=10.0, failed=1)
    assert (s["completed"], s["failed"], s["total_input_tokens"], s["total_output_tokens"]) == (2, 1, 14, 5)
    assert (s["request_throughput"], s["output_throughput"], s["total_token_throughput"]) == (0.2, 0.5, 1.9)
    assert s["total_preemptions"] == s["preempted_requests"] == 1
    assert (s["mean_ttft_ms"], s["median_ttft_ms"], s["std_ttft_ms"]) == (2000.0, 2000.0, 1000.0)
    assert s["mean_queue_ms"] + s["mean_prefill_ms"] == s["mean_ttft_ms"]
    assert s["mean_tpot_ms"] == 750.0
    assert s["mean_itl_ms"] == pytest.approx((500 + 2000 + 250) / 3)
    assert s["median_itl_ms"] == 500.0
    assert s["p90_e2el_ms"] == pytest.approx(1250 + 0.9 * 4250)
    assert s["max_max_gap_ms"] == 2000.0
    assert s["max_injection_lag_ms"] == 250.0


def test_one_token_answers_stay_out_of_tpot_but_in_ttft():
    one = RequestMetrics.from_request(make_request(times=(13.0,), finished=13.0))
    s = summarise([one], duration=5.0)
    assert s["mean_tpot_ms"] is None and s["mean_itl_ms"] is None and s["mean_ttft_ms"] == 3000.0


def test_empty_run_is_valid_json():
    s = summarise([], duration=0.0, slo=Slo(ttft_ms=1.0))
    assert s["completed"] == 0 and s["request_throughput"] is None and s["p99_ttft_ms"] is None
    assert json.loads(json.dumps(s, allow_nan=False)) == s


def test_goodput_counts_failures_and_the_drain():
    a = RequestMetrics.from_request(make_request())  # arrives 10, done 15.5: after the last arrival
    b = RequestMetrics.from_request(
        make_request(arrival=11.0, injected=11.0, scheduled=11.0, times=(12.0,), finished=12.0)
    )
    c = RequestMetrics.from_request(
        make_request(arrival=14.0, injected=14.0, scheduled=14.0, times=(15.0, 15.25), finished=15.25)
    )
    s = summarise([a, b, c], duration=10.0, failed=2, slo=Slo.parse("ttft:1000 tpot:250"))
    assert s["request_goodput"] == 0.2  # b (one token: TPOT 0) and c, exactly on both limits
    assert s["slo_attainment"] == 2 / 5
    assert s["request_goodput_without_drain"] == 1 / 4  # only b is done by t = 14; arrivals span 10..14
    assert s["slo"] == {"ttft_ms": 1000.0, "tpot_ms": 250.0, "e2el_ms": None}


@pytest.mark.parametrize("text", ["", "ttft", "ttft:", "ttft:0", "ttft:-3", "itl:5", "ttft:nan", "tpot:1;e2el:2"])
def test_bad_slo_is_refused(text):
    with pytest.raises(ConfigError, match="goodput"):
        Slo.parse(text)

"""Protects a run's figures: vLLM's formulas, attainment over what was sent, windows without warm-up and drain."""

import json

import pytest

from engine.errors import ConfigError
from engine.metrics import RequestMetrics, StepRecord
from engine.summary import Outcomes, Slo, Window, summarise
from tests.engine.test_metrics import make_request


def metrics(*args, **kwargs):
    return RequestMetrics.from_request(make_request(*args, **kwargs))


def short(arrival, ttft=1.0, gaps=()):
    """A request scheduled when it is due, with its first token after `ttft`."""
    times = [arrival + ttft]
    for gap in gaps:
        times.append(times[-1] + gap)
    return metrics(arrival=arrival, injected=arrival, scheduled=arrival, times=times, finished=times[-1])


def step(end, **fields):
    counts = dict.fromkeys(
        ("step", "num_decode", "num_prefill_seqs", "prefill_tokens", "num_waiting", "num_running", "free_pages",
         "num_preempted", "num_finished"), 0
    )  # fmt: skip
    return StepRecord(start=end - 0.5, end=end, **counts, **fields)


def test_summary_by_hand():
    a = metrics()  # due 10, ttft 3, tpot 1.25, gaps .5 2, e2e 5.5
    b = metrics(
        arrival=14.0, injected=14.0, scheduled=14.0, times=(15.0, 15.25), finished=15.25, preempted=3, swapped=1
    )
    s = summarise(Outcomes([a, b], failed=[11.0]), Window(10.0, 20.0))
    assert (s["duration"], s["sent"], s["completed"], s["failed"], s["unfinished"]) == (10.0, 3, 2, 1, 0)
    assert (s["total_input_tokens"], s["total_output_tokens"]) == (14, 5)
    assert (s["request_throughput"], s["output_throughput"], s["total_token_throughput"]) == (0.2, 0.5, 1.9)
    assert (s["total_preemptions"], s["preempted_requests"]) == (3, 1)
    assert (s["swapped_preemptions"], s["recomputed_preemptions"]) == (1, 2)
    assert (s["mean_ttft_ms"], s["median_ttft_ms"], s["std_ttft_ms"]) == (2000.0, 2000.0, 1000.0)
    assert s["mean_queue_ms"] + s["mean_prefill_ms"] == s["mean_ttft_ms"]
    assert s["mean_ttst_ms"] == 375.0 and s["max_ttst_ms"] == 500.0
    assert s["mean_tpot_ms"] == 750.0
    assert s["mean_itl_ms"] == pytest.approx((500 + 2000 + 250) / 3)
    assert s["median_itl_ms"] == 500.0
    assert s["p90_e2el_ms"] == pytest.approx(1250 + 0.9 * 4250)
    assert s["max_max_gap_ms"] == 2000.0
    assert s["max_injection_lag_ms"] == 250.0


def test_one_token_answers_stay_out_of_tpot_but_in_ttft():
    s = summarise(Outcomes([metrics(times=(13.0,), finished=13.0)]), Window(10.0, 15.0))
    assert s["mean_tpot_ms"] is s["mean_itl_ms"] is s["mean_ttst_ms"] is None and s["mean_ttft_ms"] == 3000.0


def test_empty_run_is_valid_json():
    run = Outcomes([])
    s = summarise(run, run.arrivals(), Slo(ttft_ms=1.0))
    assert s["completed"] == 0 and s["request_throughput"] is None and s["p99_ttft_ms"] is None
    assert s["slo_attainment"] is None
    assert json.loads(json.dumps(s, allow_nan=False)) == s


def test_attainment_counts_everything_that_was_sent():
    good, one_token, late = short(0.0, gaps=(0.25,)), short(1.0), short(2.0, ttft=3.0)
    run = Outcomes([good, one_token, late], failed=[0.5, 1.5], unfinished=[2.0])
    s = summarise(run, Window(0.0, 10.0), Slo.parse("ttft:1000 tpot:250"))
    assert s["slo_attainment"] == 2 / 6  # exactly on both limits; one token: TPOT 0
    assert s["request_goodput"] == 0.2
    assert s["slo"] == {"ttft_ms": 1000.0, "tpot_ms": 250.0, "e2el_ms": None}


def test_a_window_leaves_warm_up_and_drain_out():
    #                due  tokens at                in the window 10..20
    warm = short(8.0, ttft=3.0, gaps=(1.0,))  #    11 12     tokens and its end, but no latency
    inside = short(12.0, gaps=(0.5, 0.5))  #       13 13.5 14
    drained = short(19.0, gaps=(5.0, 5.0))  #      20 25 30  its latency, and the first of its tokens
    after = short(21.0)
    run = Outcomes([warm, inside, drained, after], failed=[9.0, 15.0], unfinished=[18.0, 25.0])
    s = summarise(run, Window(10.0, 20.0), Slo.parse("e2el:2000"))
    assert (s["sent"], s["completed"], s["failed"], s["unfinished"]) == (4, 2, 1, 1)
    assert s["mean_e2el_ms"] == pytest.approx((2000 + 11000) / 2)
    assert s["request_throughput"] == 2 / 10  # warm and inside
    assert s["output_throughput"] == (2 + 3 + 1) / 10
    assert s["total_token_throughput"] == (3 * 7 + 6) / 10
    assert s["slo_attainment"] == 1 / 4 and s["request_goodput"] == 1 / 10


def test_the_default_window_spans_the_arrivals_of_all_that_were_sent():
    assert Outcomes([short(5.0)], failed=[3.0], unfinished=[9.0]).arrivals() == Window(3.0, 9.0)


def test_link_and_host_memory_of_the_windows_steps():
    steps = [
        step(1.0, bytes_out=10**9, seconds_out=1.0, host_bytes=10**9),  # before the window
        step(2.0, bytes_out=2 * 10**9, seconds_out=0.5, host_bytes=3 * 10**9),
        step(3.0, bytes_in=10**9, seconds_in=0.25, host_bytes=2 * 10**9),
    ]
    s = summarise(Outcomes([], steps=steps), Window(1.5, 4.0))
    assert (s["link_bytes_out"], s["link_bytes_in"], s["peak_host_bytes"]) == (2 * 10**9, 10**9, 3 * 10**9)
    assert (s["link_seconds_out"], s["link_seconds_in"]) == (0.5, 0.25)
    assert (s["link_gbs_out"], s["link_gbs_in"]) == (4.0, 4.0)
    idle = summarise(Outcomes([]), Window(0.0, 1.0))
    assert (idle["link_bytes_in"], idle["link_gbs_in"], idle["peak_host_bytes"]) == (0, None, 0)


@pytest.mark.parametrize("text", ["", "ttft", "ttft:", "ttft:0", "ttft:-3", "itl:5", "ttft:nan", "tpot:1;e2el:2"])
def test_bad_slo_is_refused(text):
    with pytest.raises(ConfigError, match="goodput"):
        Slo.parse(text)

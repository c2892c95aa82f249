"""LayerKV's figure 2 and table 1, and the forecast: verdicts on values made by hand; the counting policy on a run."""

import dataclasses

import pytest

from engine.metrics import RequestMetrics, StepRecord
from experiments.figures.base import Table
from experiments.figures.layerkv import fig2, forecast, tab1
from experiments.figures.layerkv.fig2 import DECODERS, LONG, REQUESTS, SHORT, Trace
from experiments.figures.layerkv.setting import LAYERKV, LLAMA2_7B, POLICIES, VLLM
from experiments.figures.layerkv.watched import AHEAD, LATE, WAITED, watch
from experiments.points import Point, run_point
from experiments.seeded import VALUES


def metrics(arrival: float, queue: float, prefill: float, gaps: tuple[float, ...]) -> RequestMetrics:
    times = arrival, 0.0, queue, prefill, queue + prefill, gaps[0], sum(gaps) / len(gaps), gaps
    return RequestMetrics(8, len(gaps) + 1, *times, queue + prefill + sum(gaps), max(gaps), 0)


def trace(queue: float, short_queue: float = 0.1) -> Trace:
    """Decoders that end at 10, 11 and 12 s; steps of 0.1 s; the long prompt comes at 3.5 s."""
    found = {name: metrics(0.0, 0.0, 1.0, (1.0, 8.0 + i)) for i, name in enumerate(DECODERS)}
    found |= {SHORT: metrics(2.5, short_queue, 0.1, (1.0,)), LONG: metrics(3.5, queue, 0.5, (1.0,))}
    steps = [StepRecord(i, (i + 0.5) / 10, (i + 1.5) / 10, 3, 0, 0, 0, 3, 0, 0, 0) for i in range(150)]
    return Trace(found, steps)


def test_traces_by_hand():
    """Of steps that begin at 3.55, 3.65, ... s, two begin before 3.7 s."""
    found = trace(0.2)
    assert found.begins(LONG) == 3.7 and found.steps_before(LONG) == 2 and found.first_release() == 10.0
    assert found.tokens("B").tolist() == [1.0, 2.0, 11.0]
    found.steps[36] = dataclasses.replace(found.steps[36], repeat=7)
    assert found.steps_before(LONG) == 8


def test_figure_2():
    passed = lambda plain, layered: [v.passed for v in fig2.verdicts({VLLM: plain, LAYERKV: layered})]  # noqa: E731
    assert passed(trace(6.6), trace(0.1)) == [True, True, True]
    assert passed(trace(6.4), trace(0.1)) == [False, True, True]  # before A has ended
    assert passed(trace(6.6), trace(0.2)) == [True, False, True]
    assert passed(trace(6.6), trace(0.1, 0.2)) == [True, True, False]


def test_the_trace_of_figure_2_is_about_room():
    """The long prompt does not fit beside three decoders and their outputs, and fits when one of them has left."""
    long, decoders = REQUESTS[-1].prompt_len, [r.prompt_len for r in REQUESTS[:3]]
    room = fig2.POOL / 32 * 16
    assert sum(decoders) + REQUESTS[3].prompt_len + long > room > sum(decoders[1:]) + 1000 + long


def sizes(**changed) -> Table:
    """Table 1, as by hand."""
    rows = []
    for setup in tab1.SETUPS:
        weights, kv, _ = tab1.HAND[setup]
        for context, tokens in zip(tab1.CONTEXTS, (54_000, 51_000), strict=True):
            tokens = changed.get(f"tokens_{context}", tokens)
            ours = [weights * changed.get("weights", 1.0), kv + changed.get("kv", 0), 1.0, tokens, tokens - 100]
            rows.append([setup.name, context, *ours, weights, kv, tokens * changed.get("pool", 1.0)])
    return Table(tab1.HEADER, rows)


@pytest.mark.parametrize(
    "changed, missed",
    [
        ({}, set()),
        ({"kv": 1}, {0}),
        ({"weights": 1.02}, {1}),
        ({"pool": 1.03}, {2}),
        ({"tokens_2048": 52_000}, {4}),
        ({"tokens_16384": 54_000}, {5}),
    ],
)
def test_table_1(changed, missed):
    fewest = {setup: tab1.HAND[setup][2] for setup in tab1.SETUPS}
    found = tab1.verdicts(sizes(**changed), fewest)
    assert {i for i, v in enumerate(found) if not v.passed} == missed
    assert not tab1.verdicts(sizes(), fewest | {LLAMA2_7B: 2})[3].passed


def cells(**changed):
    """Two seeds of every load and mode."""

    def cell(mode):
        own = {"total_preemptions": [0, 0], "mean_queue_ms": [100.0, 200.0], "p99_itl_ms": [50.0, 60.0]}
        if mode == forecast.OFF:
            own["total_preemptions"] = [3, 4]
        if mode == forecast.REACTIVE:
            own |= {"mean_queue_ms": [150.0, 210.0], "p99_itl_ms": [51.0, 61.0]}
        return {name: [1.0, 1.0] for name in VALUES} | own | changed.get(mode, {})

    return {(load, mode): cell(mode) for load in forecast.LOADS for mode in forecast.MODES}


def counts(proactive=(1, 2), reactive=(10, 20)):
    late = {forecast.PROACTIVE: proactive, forecast.REACTIVE: reactive, forecast.OFF: (0, 0)}
    return {
        (load, mode): {LATE: list(late[mode]), WAITED: list(late[mode]), AHEAD: [5, 5]}
        for load in forecast.LOADS
        for mode in forecast.MODES
    }


@pytest.mark.parametrize(
    "changed, counted, missed",
    [
        ({}, counts(), set()),
        ({}, counts(proactive=(10, 21)), {0, 1}),
        ({}, counts(proactive=(1, 21)), {0, 1}),  # on the mean fewer, but not surely
        ({"proactive": {"total_preemptions": [0, 1]}}, counts(), {2}),
        ({"off": {"total_preemptions": [0, 0]}}, counts(), {3}),
        ({"proactive": {"mean_queue_ms": [149.0, 220.0]}}, counts(), {4}),
        ({"proactive": {"p99_itl_ms": [52.0, 62.0]}}, counts(), {5}),
    ],
)
def test_forecast(changed, counted, missed):
    found = forecast.verdicts(cells(**changed), counted)
    assert {i for i, v in enumerate(found) if not v.passed} == missed


def test_nothing_that_leaves_is_nothing_to_judge():
    found = forecast.verdicts(cells(), counts((0, 0), (0, 0)))
    assert [v.passed for v in found[:2]] == [None, None]


def small(policy: str, settings: str = "") -> Point:
    """A pool that is soon full: 24 requests of 64 + 100 tokens in 40 pages of each of 4 layers."""
    engine = f"{policy},device=l20,host_bytes=1GiB,num_pages=160,max_context=256{settings}"
    return Point("tiny-1m", engine, "synthetic:num=24,rate=1000,prompt=fixed:64,output=fixed:100")


@pytest.mark.parametrize("settings", ["", ",layerkv_forecast=false"])
def test_counting_changes_nothing(settings):
    plain = run_point(small(POLICIES[LAYERKV], settings))
    watched = watch(small(forecast.WATCHED, settings))
    assert {name: watched[name] for name in plain} == plain
    left = watched[LATE] + watched[AHEAD]
    assert left > 0 and (watched[AHEAD] > 0) == (not settings)
    page = 16 * 2 * 2 * 32 * 4  # K and V of two heads of 32 in 16 tokens, 4 bytes
    assert left * page <= plain["link_bytes_out"]  # besides what leaves behind its own prefill


def test_the_watched_points_are_those_of_the_figure():
    point = forecast.point("a tenth of the link", forecast.OFF)
    assert point.config.scheduler.policy == "layerkv" and not point.config.scheduler.layerkv.layerwise
    assert point.config.link_gbs == 2.5
    assert forecast.WATCHED not in point.engine and point.engine.count(POLICIES[LAYERKV]) == 1
    knobs = [forecast.point("full link", mode).config.scheduler.layerkv for mode in forecast.MODES]
    assert [(k.forecast, k.layerwise) for k in knobs] == [(True, True), (False, True), (False, False)]

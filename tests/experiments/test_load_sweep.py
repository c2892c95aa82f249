"""Policies over the load: ratios are paired by repeat, and every gate is judged as issue 5 writes it."""

import numpy as np
import pytest

from experiments.load_sweep import FIGURES, HEADER, Cell, Sweep, gates


def run(**given):
    """A summary: TTFT 100 ms, of which 20 is queueing, unless said otherwise."""
    plain = dict.fromkeys(FIGURES, 1.0) | {"mean_ttft_ms": 100.0, "mean_queue_ms": 20.0, "mean_tpot_ms": 10.0}
    return plain | {"output_throughput": 50.0, "slo_attainment": 1.0} | given


def sweep(ours, theirs, policy="ours"):
    """One repeat of each: summaries by load."""
    cells = [Cell(load, "paged", [theirs[load]]) for load in theirs]
    return Sweep([*cells, *(Cell(load, policy, [ours[load]]) for load in ours)])


def judged(ours, theirs, slo=20.0):
    return {g.name: g for g in gates(sweep(ours, theirs), "ours", slo)}


def test_ratios_are_paired_by_repeat():
    """0.5 and 0.1 of what the baseline took in the same repeat: 0.3, not the 0.15 of the means."""
    first = Cell(1.0, "paged", [run(mean_ttft_ms=100.0), run(mean_ttft_ms=1000.0)])
    cell = Cell(1.0, "ours", [run(mean_ttft_ms=50.0), run(mean_ttft_ms=100.0)])
    ratio = cell.ratio("mean_ttft_ms", first)
    assert ratio.mean == pytest.approx(0.3) and (ratio.low, ratio.high) == pytest.approx((0.1, 0.5))
    assert cell.mean("mean_ttft_ms") == 75.0 and cell.spread("mean_ttft_ms")[1:] == pytest.approx((50, 100))


def test_a_figure_that_no_request_has_counts_as_nothing():
    assert Cell(1.0, "a", [run(mean_ttst_ms=None), run(mean_ttst_ms=4.0)]).mean("mean_ttst_ms") == 2.0


def test_the_knee_is_where_half_of_the_baselines_ttft_is_queueing():
    theirs = {0.5: run(mean_queue_ms=49.0), 1.0: run(mean_queue_ms=50.0), 2.0: run(mean_queue_ms=90.0)}
    ours = dict.fromkeys(theirs, run(mean_queue_ms=99.0))
    assert [sweep(ours, theirs).below_knee(load) for load in theirs] == [True, False, False]


def test_all_gates_pass_at_their_limits():
    """TTFT 1.1x below the knee and a fifth above; throughput 0.95x; TPOT at the objective, which 95% meet."""
    theirs = {0.5: run(), 1.5: run(mean_ttft_ms=1000.0, mean_queue_ms=900.0)}
    ours = {
        0.5: run(mean_ttft_ms=110.0, output_throughput=47.5),
        1.5: run(mean_ttft_ms=200.0, mean_tpot_ms=20.0, slo_attainment=0.95),
    }
    found = judged(ours, theirs)
    assert all(g.passed for g in found.values()), found
    assert (
        "5.0x at 1.5" in found["mean TTFT"].reached
        and "1.10 at 0.5, of 1 loads" in found["mean TTFT below the knee"].reached
    )


@pytest.mark.parametrize(
    "gate, load, change",
    [
        ("mean TTFT", 1.5, {"mean_ttft_ms": 201.0}),
        ("mean TTFT below the knee", 0.5, {"mean_ttft_ms": 111.0}),
        ("throughput", 1.5, {"output_throughput": 47.0}),
        ("mean TPOT", 0.5, {"mean_tpot_ms": 20.1}),
        ("TPOT objective", 1.5, {"slo_attainment": 0.94}),
    ],
)
def test_each_gate_is_missed_by_its_own_figure(gate, load, change):
    theirs = {0.5: run(), 1.5: run(mean_ttft_ms=1000.0, mean_queue_ms=900.0)}
    ours = {0.5: run(), 1.5: run(mean_ttft_ms=190.0)}
    ours[load] |= change
    assert [name for name, g in judged(ours, theirs).items() if g.passed is False] == [gate]


def test_what_cannot_be_judged_says_so():
    """No load below the knee, and none up to 1.5 times capacity; the mean TPOT counts at every load."""
    theirs = {2.0: run(mean_ttft_ms=1000.0, mean_queue_ms=900.0)}
    found = judged({2.0: run(slo_attainment=0.1, mean_tpot_ms=30.0)}, theirs)
    assert [found[n].passed for n in ("mean TTFT below the knee", "TPOT objective", "mean TPOT")] == [None, None, False]


def test_a_row_per_load_and_policy():
    theirs, ours = {1.0: run(), 0.5: run()}, {1.0: run(mean_ttft_ms=50.0, link_bytes_out=3 * 2**20), 0.5: run()}
    rows = sweep(ours, theirs).rows()
    assert [row[:2] for row in rows] == [[0.5, "paged"], [0.5, "ours"], [1.0, "paged"], [1.0, "ours"]]
    assert all(len(row) == 2 + len(HEADER) for row in rows)
    named = dict(zip(HEADER, rows[3][2:], strict=True))
    assert named["TTFT ms"] == 50.0 and named["over paged"] == "0.50" and named["out MiB"] == 3.0
    assert np.isclose(named["host MiB"], 2**-20)

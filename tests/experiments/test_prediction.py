"""Figures of predicted against real runs, by hand."""

import numpy as np
import pytest

from engine.costmodel.step_model import StepTime, StepWork
from engine.executor.packing import Packer
from experiments.prediction import (
    Cell,
    Step,
    gates,
    policy_ratios,
    predicted_seconds,
    repeat_errors,
    step_errors,
    winners,
    within,
)

PACKER = Packer(num_slots=4, tile=8, max_tiles=2, deterministic=False)


class PerRow:
    """A step takes a second for each decode row and each prompt token, and the host 10 before it."""

    def step(self, work: StepWork) -> StepTime:
        tokens = work.num_decode + sum(new for _, new in work.prefills)
        return StepTime(host=10.0, embed=0.0, layer=float(tokens), collective=0.0, tail=0.0, num_layers=1)


def decode(rows: int, start: float, seconds: float) -> Step:
    return Step(StepWork(rows, rows, 1, (), rows), start, start + seconds)


def cell(workload: str, policy: str, real: list[tuple], simulated: tuple, last_arrival: float = 10.0) -> Cell:
    """`real` and `simulated`: (throughput, TTFT, TPOT); a run takes 20 s."""
    names = ("output_throughput", "mean_ttft_ms", "mean_tpot_ms")
    summaries = [dict(zip(names, of, strict=True)) | {"duration": 20.0} for of in (*real, simulated)]
    return Cell(workload, policy, summaries[:-1], [], summaries[-1], last_arrival)


def test_steps_after_a_gap_wait_for_the_host():
    steps = [decode(1, 0, 12.0), decode(2, 12.0, 4.0), decode(2, 20.0, 10.0)]
    assert predicted_seconds(steps, PerRow()).tolist() == [11, 2, 12]
    assert step_errors(steps, PerRow()) == pytest.approx([11 / 12 - 1, 2 / 4 - 1, 12 / 10 - 1])


def test_repeats_compare_steps_of_the_same_buckets():
    """Three rows and four share a bucket, one row has its own, which the other run never used."""
    one = [decode(3, 0, 4.0), decode(4, 4, 5.0), decode(1, 9, 1.0)]
    other = [decode(4, 0, 10.0), decode(3, 10, 8.0)]
    errors = repeat_errors([one, other], PerRow(), PACKER)
    assert sorted(errors) == pytest.approx(sorted([8 / 4 - 1, 10 / 5 - 1, 5 / 10 - 1, 4 / 8 - 1]))


def test_repeats_take_the_nearest_step():
    """Prompts of 9 and 15 tokens are two tiles each; 10 is nearer to 9, 14 to 15."""
    runs = [[Step(StepWork(prefills=((0, n),)), 0, s) for n, s in of] for of in (((9, 1), (15, 2)), ((10, 4), (14, 8)))]
    errors = repeat_errors(runs, PerRow(), PACKER)
    assert sorted(errors) == pytest.approx(sorted([4 / 1 - 1, 8 / 2 - 1, 1 / 4 - 1, 2 / 8 - 1]))


def test_equal_runs_have_no_noise():
    run = [decode(n, i, 0.5) for i, n in enumerate((1, 2, 3, 4, 4))]
    assert repeat_errors([run, run], PerRow(), PACKER).tolist() == [0] * 10


def test_load_is_how_much_longer_than_the_arrivals_a_run_takes():
    loads = [cell("w", "p", [(1, 1, 1)], (1, 1, 1), last) for last in (10.0, 19.0, 0.0)]
    assert [(c.load, c.overloaded) for c in loads] == [(2.0, True), (20 / 19, False), (None, True)]


def test_a_ratio_is_that_of_the_median_run():
    c = cell("w", "p", [(90, 1, 1), (100, 1, 1), (500, 1, 1)], (110, 1, 1))
    assert c.ratio("output_throughput") == pytest.approx(1.1)


def test_policy_ratios_are_relative_to_the_first_policy():
    """Predicted b / a against measured b / a; below 1.5 times capacity TTFTs are chance and left out."""
    cells = [cell("w", "a", [(100, 10, 1)], (110, 10, 1)), cell("w", "b", [(200, 20, 1)], (110, 30, 2))]
    found = {(policy, metric): ratio for _, policy, metric, ratio in policy_ratios(cells)}
    assert found == pytest.approx({
        ("b", "output_throughput"): 0.5, ("b", "mean_ttft_ms"): 1.5, ("b", "mean_tpot_ms"): 2.0,
    })  # fmt: skip
    calm = [cell("w", p, [(1, 1, 1)], (1, 1, 1), 19.0) for p in "ab"]
    assert [metric for *_, metric, _ in policy_ratios(calm)] == ["output_throughput", "mean_tpot_ms"]


def test_winners_are_judged_where_real_runs_do_not_overlap():
    """Throughput is clear and foreseen, TTFT clear and missed, TPOT overlaps."""
    a = cell("w", "a", [(100, 10, 1), (110, 11, 3)], (100, 20, 1))
    b = cell("w", "b", [(120, 12, 2), (130, 13, 2)], (105, 10, 9))
    assert winners([a, b]) == (1, 2)
    assert winners([a, cell("other", "b", [(120, 12, 2)], (1, 1, 1))]) == (0, 0)


def test_gates():
    """Every cell must be within a limit; nothing to judge is neither passed nor missed."""
    cells = [cell("w", "a", [(100, 10, 1)], (105, 12, 1)), cell("w", "b", [(100, 10, 1)], (111, 13, 1))]
    found = {g.name: g for g in gates(cells, np.array([0.1, -0.19]), np.array([0.3]))}
    assert {name: g.passed for name, g in found.items()} == {
        "step MAPE": True,
        "throughput": False,
        "TTFT at >= 1.5x capacity": False,
        "policy ratios": True,
        "same winner": None,
    }
    assert found["step MAPE"].reached == "14.5% (repeat runs: 30.0%)"
    assert found["throughput"].reached == "mean 8.0%, largest 11.0%, met by 1 of 2"
    assert within("x", [], 0.1).passed is None

"""What copies cost a step: overlap as DESIGN.md defines it, and a gate that judges only what can hide."""

import json

import pytest

from experiments.bench_overlap import Run, Side, figures, judge
from tests.experiments import programs

ALONE = {"alone_out": 0.2, "alone_in": 0.1}


def test_overlap_is_the_share_of_the_copy_that_the_step_does_not_wait_for():
    """Prefills of 1.00 and 2.00 s take 0.05 s longer, of copies of 0.2 s: three quarters hide. Decode steps of 10 ms
    take 85 ms longer, of 100: 15% hide. What was landed counts over the prefill without copies."""
    plain = [Run(1.0, 1.0, 0.01), Run(2.0, 2.0, 0.01)]
    runs = [Run(1.05, 1.1, 0.095), Run(2.05, 2.4, 0.095)]
    found = figures(Side(8, 0.1, 4, **ALONE), runs, plain)
    assert found["prefill"] == pytest.approx((1.05 + 1.025) / 2) and found["decode"] == pytest.approx(9.5)
    assert found["prefill_overlap"] == pytest.approx(0.75) and found["decode_overlap"] == pytest.approx(0.15)
    assert found["landed"] == pytest.approx((1.1 + 1.2) / 2)


def test_a_side_without_decode_steps_has_no_figures_of_them():
    found = figures(Side(8, 0.9, 1, **ALONE), [Run(1.0, 1.0, float("nan"))], [Run(1.0, 1.0, 0.01)])
    assert found == {"prefill": 1.0, "prefill_overlap": 1.0, "landed": 1.0}


@pytest.mark.parametrize("slow, passed", [(1.05, True), (1.06, False)])
def test_the_gate_judges_copies_that_take_no_longer_than_the_prefill(slow, passed):
    sides = {Side(8, 0.1, 4, alone_out=0.9): {"prefill": slow}, Side(8, 2.0, 1, alone_out=2.0): {"prefill": 3.0}}
    assert judge(sides, prefill=1.0).passed is passed
    assert judge(sides, prefill=0.5).passed is None, "no copy can hide under so short a prefill"


def test_it_runs_and_measures_every_side():
    """A real engine of four layers: all of them parked at both links, and two."""
    size = ("--model=tiny-1m", "--prompt=96", "--new_tokens=4", "--rounds=2", "--patience=0", "--streamed=2")
    code, stdout, stderr = programs.run("bench_overlap", *size)
    assert code == 0, stderr
    line = json.loads(stdout.splitlines()[-1])
    assert line["bench"] == "overlap" and line["rounds"] == 2 and line["aa_prefill"] > 0 < line["aa_decode"]
    assert [*line["sides"]] == ["4 parked, link 0.107", "4 parked, link 0.9", "2 parked, link 0.107"]
    assert all(side["landed"] > 0 and side["prefill"] > 0 for side in line["sides"].values())
    code, _, stderr = programs.run("bench_overlap", *size, "--streamed=4")
    assert code == 2 and "--streamed from 1 to 3, the layers but one" in stderr and stderr.count("\n") == 1

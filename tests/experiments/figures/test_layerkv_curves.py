"""What figures 6 to 9 of LayerKV share: ratios by hand, and verdicts that fail when they should."""

import pytest

from experiments.figures.base import Estimate
from experiments.figures.layerkv import curves
from experiments.figures.layerkv.curves import HEADER, Place
from experiments.figures.layerkv.setting import LAYERKV, NO_RULE, VLLM
from tests.experiments.figures.layerkv_cells import cell


def place(where="here", rate=1.0, first=None, **cells) -> Place:
    """At a capacity of 1 request/s."""
    names = {"layerkv": LAYERKV, "no_rule": NO_RULE}
    policies = {VLLM: first or cell()} | {names[name]: value for name, value in cells.items()}
    return Place(where, ("7B",), rate, policies, cell(request_throughput=1.0), cell(50.0))


def test_ratios_are_paired_by_seed():
    """4 / 1 and 3 / 3, not 7 / 4."""
    here = place(first=cell([4.0, 3.0], slo_attainment=[0.5, 0.7]), layerkv=cell([1.0, 3.0], slo_attainment=[0.9, 0.6]))
    assert here.lower_by() == Estimate(2.5, 1.0, 4.0)
    assert here.relative("mean_ttft_ms").mean == pytest.approx((1 / 4 + 3 / 3) / 2)
    fewer = here.fewer_violations()
    assert (fewer.mean, fewer.low, fewer.high) == (pytest.approx(0.15), pytest.approx(-0.1), pytest.approx(0.4))
    assert curves.violations(here.cells[LAYERKV]).mean == pytest.approx(0.25)


def test_a_row_has_what_the_header_says():
    here = place(rate=1.5, first=cell(3000.0), layerkv=cell(1000.0, output_throughput=[90.0, 80.0], mean_tpot_ms=40.0))
    first, ours = (dict(zip(("model", *HEADER), row, strict=True)) for row in here.rows())
    assert first["model"] == "7B" and first["policy"] == VLLM and first["lower by"] == first["tok/s ratio"] == 1
    assert ours["lower by"] == ours["p99 lower by low"] == 3 and ours["tpot ms"] == 40
    assert [ours[f"tok/s ratio{end}"] for end in (" low", "", " high")] == pytest.approx([0.8, 0.85, 0.9])
    assert (ours["load"], ours["state"], ours["alone ms"], ours["requests"]) == (1.5, "overloaded", 50, 100)
    assert place(rate=0.99).rows()[0][-2] == "stable"


def test_only_places_below_the_knee_must_be_equal():
    calm, stormy = place("calm", 0.9, layerkv=cell(1090.0)), place("stormy", 0.95, layerkv=cell(9.0))
    judge = lambda *places: curves.equal_below_knee(places, "mean_ttft_ms", "TTFT")  # noqa: E731
    assert judge(calm, stormy).passed and judge(stormy).passed is None
    verdict = judge(calm, place("worse", 0.5, layerkv=cell([1000.0, 1110.0])))
    assert verdict.passed is False and verdict.reached.endswith("outside at worse")
    assert judge(place(rate=0.5, layerkv=cell(890.0))).passed is False


def test_throughput_is_judged_everywhere():
    fine, slow = (place(name, layerkv=cell(output_throughput=rate)) for name, rate in (("a", 96.0), ("b", 94.9)))
    assert curves.throughput([fine], 0.95).passed and not curves.throughput([fine, slow], 0.95).passed
    assert not curves.throughput([fine], 0.97).passed


def test_tpot_counts_where_half_are_served():
    lost = place("lost", layerkv=cell(mean_tpot_ms=900.0, slo_attainment=0.5))
    served = place("served", layerkv=cell(mean_tpot_ms=150.0, slo_attainment=0.51))
    assert curves.tpot_where_served([lost], 200).passed is None
    assert curves.tpot_where_served([lost, served], 200).passed
    slow = place("slow", layerkv=cell(mean_tpot_ms=[150.0, 210.0]))
    assert curves.tpot_where_served([served, slow], 200).passed is False


def test_without_the_rule_it_has_to_be_worse_somewhere():
    """And surely: with an interval that does not reach 0."""
    equal = place("equal", first=cell(slo_attainment=0.5), no_rule=cell(slo_attainment=0.5))
    perhaps = place("perhaps", first=cell(slo_attainment=0.5), no_rule=cell(slo_attainment=[0.3, 0.5]))
    worse = place("worse", first=cell(slo_attainment=0.5), no_rule=cell(slo_attainment=[0.3, 0.4]))
    assert curves.more_than_vllm_somewhere([equal, perhaps], NO_RULE).passed is False
    verdict = curves.more_than_vllm_somewhere([equal, perhaps, worse], NO_RULE)
    assert verdict.passed and verdict.reached == "more at 1 of 3; most +0.15 (worse)"

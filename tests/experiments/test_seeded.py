"""What seeds say of a cell, by hand; gates of issue 5 on summaries made by hand."""

import pytest

from experiments import seeded
from experiments.layerkv_gates import Place, gates
from experiments.seeded import Cell, figures, losses, lower_by, mean, throughput_ratio, violations


def cell(ttft=1000.0, queue=0.0, rate=10.0, attainment=1.0, **rest) -> Cell:
    """One value per seed; a number stands for one seed."""

    def seeds(value):
        return value if isinstance(value, list) else [value]

    values = {"mean_ttft_ms": ttft, "mean_queue_ms": queue, "output_throughput": rate, "slo_attainment": attainment}
    return {name: [100.0] for name in seeded.VALUES} | {name: seeds(value) for name, value in (values | rest).items()}


def place(model="7B", context=2048, rate=1.0, load=1.0, **cells: Cell) -> Place:
    policies = {name.replace("no_rule", "layerkv, no SLO rule"): value for name, value in cells.items()}
    return Place(model, context, rate, load, 300.0, True, {"vllm_v0": cell(), "layerkv": cell()} | policies)


def judged(*places: Place) -> dict:
    return {gate.name: gate for gate in gates(places, "7B")}


def test_ratios_are_paired_by_seed():
    """Means of 4 / 1 and 3 / 3, not 7 / 4; tokens/s 5 / 10 and 8 / 8."""
    ours, first = cell([1.0, 3.0], rate=[5.0, 8.0]), cell([4.0, 3.0], rate=[10.0, 8.0])
    ratio, low, high = lower_by(ours, first)
    assert ratio == pytest.approx(2.5) and (low, high) == (1.0, 4.0)
    assert throughput_ratio(ours, first) == pytest.approx(0.75)
    assert mean(cell(mean_ttst_ms=[None, 3.0]), "mean_ttst_ms") == 1.5
    assert violations(cell(attainment=[0.5, 1.0])) == pytest.approx(0.25)


def test_losses_are_those_that_can_be_noticed():
    """2% more is none; violations count whatever their size."""
    first = cell()
    assert losses(cell(1019.0, p99_itl_ms=[101.0], rate=9.81), first) == []
    worse = cell(1021.0, p99_itl_ms=[103.0], rate=9.79, attainment=0.999)
    assert losses(worse, first) == ["TTFT", "P99 ITL", "tok/s", "violations"]
    assert losses(cell(attainment=None), cell(attainment=None)) == []


def test_a_row_has_what_the_header_says():
    row = dict(zip(seeded.HEADER, figures(cell([500.0, 250.0], rate=[9.0, 9.0]), cell([1000.0] * 2)), strict=True))
    assert row["TTFT ms"] == 375 and row["lower by"] == "3.00x (2.00 to 4.00)" and row["tok/s ratio"] == "0.900"
    assert row["violations"] == "0.0%" and row["E2E s"] == pytest.approx(0.1)
    assert figures(cell(attainment=None), cell())[seeded.HEADER.index("violations")] is None


def test_the_papers_point():
    found = judged(place(vllm_v0=cell(40_000.0), layerkv=cell(500.0)), place(context=4096, layerkv=cell(9e9)))
    assert found["TTFT of vllm_v0 at 2048 tokens, 1/s"].passed and found["TTFT of layerkv at 2048 tokens, 1/s"].passed
    found = judged(place(vllm_v0=cell(53_000.0), layerkv=cell([900.0, 800.0])))
    assert [found[f"TTFT of {p} at 2048 tokens, 1/s"].passed for p in ("vllm_v0", "layerkv")] == [False, False]
    assert found["TTFT of layerkv at 2048 tokens, 1/s"].reached == "0.85 s"
    assert judged(place(model="34B"))["TTFT of layerkv at 2048 tokens, 1/s"].passed is None


def test_only_calm_places_are_below_the_knee():
    calm, stormy = place(load=0.9, layerkv=cell(1090.0)), place(load=0.95, layerkv=cell(9000.0))
    assert calm.calm and not stormy.calm
    assert judged(calm, stormy)["TTFT below the knee"].passed
    worse = place(load=0.5, context=512, layerkv=cell(1110.0))
    gate = judged(calm, worse)["TTFT below the knee"]
    assert gate.passed is False and gate.reached == "1.09 to 1.11 at 2 places, most at 7B at 512, 1/s"
    assert judged(stormy)["TTFT below the knee"].passed is None


@pytest.mark.parametrize(
    "rates, passed", [((10.0, 9.5), True), ((10.0, 9.4), False), ((9.6, 9.6), False), ((9.6, 10.0), True)]
)
def test_throughput_everywhere_and_on_the_mean(rates, passed):
    assert judged(*(place(layerkv=cell(rate=rate)) for rate in rates))["output tok/s"].passed is passed


def test_violations_up_to_one_and_a_half_times_capacity():
    better = place(vllm_v0=cell(attainment=0.4), layerkv=cell(attainment=0.6))
    gates_of_better = judged(better)
    assert gates_of_better["SLO violations"].passed
    assert gates_of_better["largest gap of violations"].reached.startswith("20.0 points: 60.0% to 40.0%, 33% fewer")
    worse = place(load=1.5, context=512, vllm_v0=cell(attainment=0.9), layerkv=cell(attainment=0.88))
    gate = judged(better, worse)["SLO violations"]
    assert gate.passed is False and gate.reached == "more at 1 of 2 places, by 2.0 points at 7B at 512, 1/s"
    beyond = place(load=1.51, vllm_v0=cell(attainment=1.0), layerkv=cell(attainment=0.0))
    assert judged(better, beyond)["SLO violations"].passed and not judged(beyond)["SLO violations"].passed
    narrow = place(vllm_v0=cell(attainment=0.5), layerkv=cell(attainment=0.64))
    assert judged(narrow, beyond)["largest gap of violations"].passed is False


def test_without_the_rule_it_is_worse_somewhere():
    fine = place(vllm_v0=cell(attainment=0.5), no_rule=cell(attainment=0.5))
    worse = place(vllm_v0=cell(attainment=0.5), no_rule=cell(attainment=0.2))
    assert judged(fine)["without the SLO rule"].passed is False
    assert judged(fine, worse)["without the SLO rule"].reached.startswith("more at 1 of 2 places, by 30.0 points")
    assert judged(place())["without the SLO rule"].passed is None

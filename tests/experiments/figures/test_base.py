"""What verdicts rest on, by hand: intervals, bands, kinds of evidence, the table, and which figures there are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EXECUTORS
from engine.errors import ConfigError
from experiments import figures
from experiments.figures.base import (
    FITTED,
    KINDS,
    MEASURED,
    PREDICTED,
    Band,
    Estimate,
    Figure,
    Table,
    Verdict,
    verdict_table,
)

NUMBERS = st.floats(-1e6, 1e6)


def test_an_estimate_is_a_mean_with_an_interval():
    """Of two values the mean of two draws is 0 or 2 with probability 1/4 each: the interval is all of it."""
    assert Estimate.of([3.0]) == Estimate.of([3.0] * 4) == Estimate(3.0, 3.0, 3.0)
    assert Estimate.of([0.0, 2.0]) == Estimate(1.0, 0.0, 2.0)
    assert Estimate.of([0.0, 2.0]).over(4.0) == Estimate(0.25, 0.0, 0.5)
    assert Estimate(3.0, 3.0, 3.0).words(" ms") == "3 ms" and Estimate(1.0, 0.0, 2.0).words("x") == "1x (0 to 2)"


@given(st.lists(NUMBERS, min_size=1, max_size=5))
def test_an_interval_is_one_of_means(values):
    found = Estimate.of(values)
    slack = 1e-9 * max(map(abs, values))
    assert min(values) - slack <= found.low <= found.high <= max(values) + slack


@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS)
def test_a_band_holds_a_number_or_all_of_an_interval(a, b, x, y):
    """Ends included; an interval lies in it exactly when all of its numbers do, whatever its mean."""
    band, (low, high) = Band(*sorted((a, b))), sorted((x, y))
    assert band.holds(band.low) and band.holds(band.high)
    assert band.holds(low) == (min(a, b) <= low <= max(a, b))
    for mean in (low, high, (low + high) / 2):
        assert band.holds(Estimate(mean, low, high)) == (band.holds(low) and band.holds(high))


def test_a_band_may_be_open():
    assert Band(2).holds(2.0) and Band(2).holds(1e99) and not Band(2).holds(1.99) and Band(high=2).holds(-1e99)
    assert [band.words("x") for band in (Band(0.5, 2), Band(2), Band(high=0.3))] == ["0.5 to 2x", ">= 2x", "<= 0.3x"]
    assert not Band(0).holds(float("nan")) and not Band(high=0).holds(float("nan"))


def test_a_verdict_looks_at_the_interval_not_at_the_mean():
    inside, outside = Estimate(1.5, 1.2, 1.9), Estimate(1.5, 1.2, 2.1)
    found = [Verdict.within("n", PREDICTED, Band(1, 2), e, "x", "why") for e in (inside, outside)]
    assert [v.passed for v in found] == [True, False] and found[1].reached == "1.5x (1.2 to 2.1)"
    assert found[0] == Verdict("n", PREDICTED, "1 to 2x", "1.5x (1.2 to 1.9)", True, "why")
    assert not Verdict.within("n", FITTED, Band(1, 2), 2.5).passed


def test_a_verdict_on_many_says_where_it_is_missed():
    numbers = {"512": 1.0, "1K": Estimate(1.5, 1.0, 2.1), "2K": 0.4, "4K": 1.9}
    found = Verdict.every("n", PREDICTED, Band(0.5, 2), numbers, "x")
    assert not found.passed and found.reached == "0.4 (2K) to 1.9x (4K); outside at 1K, 2K"
    del numbers["1K"], numbers["2K"]
    found = Verdict.every("n", PREDICTED, Band(0.5, 2), numbers, "x")
    assert found.passed and found.reached == "1 (512) to 1.9x (4K)"
    assert Verdict.every("n", PREDICTED, Band(9), {str(i): i for i in range(7)}).reached.endswith(
        "outside at 0, 1, 2, 3, ..."
    )
    assert Verdict.every("n", PREDICTED, Band(9), {}).passed is None


def test_only_what_is_predicted_or_measured_counts():
    assert {kind for kind in KINDS if Verdict("n", kind, "", "", True).counts} == {PREDICTED, MEASURED}
    with pytest.raises(AssertionError, match="verdict 'n' has kind 'guessed'; known: arithmetic, fitted"):
        Verdict("n", "guessed", "", "", True)


def test_a_table_is_the_same_bytes_and_can_be_asked():
    table = Table(("context", "policy", "ms"), [[1, "a", 1 / 3], [1, "b", None], [2, "a", 12345678.0]])
    assert table.csv() == "context,policy,ms\n1,a,0.33333\n1,b,\n2,a,12346000.0\n"
    assert table.column("ms", policy="a") == [1 / 3, 12345678.0] and table.column("policy", context=1, ms=None) == ["b"]
    with pytest.raises(KeyError):
        table.column("ms", polciy="a")


def test_what_was_missed_is_explained():
    """What passed, or could not be judged, is not, though its figure had an explanation ready."""
    found = [Verdict(str(i), PREDICTED, ">= 1", "0", passed, why) for i, (passed, why) in enumerate(
        [(True, "a"), (False, "the load is 0.9"), (None, "b"), (False, "")]
    )]  # fmt: skip
    *table, first, second = verdict_table(found).splitlines()
    assert first == "missed: 1: the load is 0.9" and second == "missed: 3: no explanation was found"
    assert [line.split()[-1] for line in table[2:]] == ["passed", "missed", "-", "missed"]


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_says_what_it_is_and_has_points_that_exist(name):
    """Points check their settings when they are made."""
    figure = figures.find(name)
    assert isinstance(figure, Figure) and figure.title and figure.source and figure.about.endswith(".")
    assert figure.executors and {*figure.executors} <= {*EXECUTORS}
    for executor in figure.executors:
        points = figure.points(executor)
        assert all(point.requests() for point in {p.workload: p for p in points.values()}.values())


@pytest.mark.parametrize(
    "name, message",
    [
        ("layerkv/fig99", r"^figure 'layerkv/fig99' is unknown; known: layerkv/fig1.*, or package.module:Name or path"),
        ("no/such/file.py:Mine", "figure 'no/such/file.py:Mine': there is no file no/such/file.py"),
        (
            "experiments.figures.base:Band",
            "experiments.figures.base:Band is not a subclass of experiments.figures.base.Fi",
        ),
        ("experiments.figures.base:Bend", "experiments.figures.base has no Bend; it has"),
    ],
)
def test_what_is_no_figure_is_one_line(name, message):
    with pytest.raises(ConfigError, match=message) as e:
        figures.find(name)
    assert "\n" not in str(e.value)

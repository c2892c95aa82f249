"""Objectives judged on metrics made by hand."""

import json

import pytest

from engine.errors import ConfigError
from engine.metrics import RequestMetrics
from experiments.objectives import ALL, FILE, LIMITS, PAPER, SETS, Objectives, objectives

HERE = Objectives((3000.0, 200.0, 1000.0, 3000.0), (0.5, 1, 2), (0.9, 0.99))


def request(ttft: float, *gaps: float) -> RequestMetrics:
    """Seconds to the first token, and between tokens."""
    tpot = sum(gaps) / len(gaps) if gaps else None
    return RequestMetrics(
        8, 1 + len(gaps), 0.0, 0.0, 0.0, ttft, ttft, gaps[0] if gaps else None, tpot, tuple(gaps), ttft + sum(gaps),
        max(gaps, default=None), 0,
    )  # fmt: skip


def of(m: RequestMetrics, scale="1") -> set[str]:
    """The sets of objectives that one request keeps to."""
    return {name for name, share in HERE.shares([m], 1)[scale].items() if share == 1.0}


def test_each_limit_counts_in_its_sets():
    """99 gaps of 0.1 s and one longer: TPOT hardly moves, and P99 lies on the 99th gap of 100, but for 0.01 of the way
    to the longest one."""
    assert of(request(2.9, *[0.1] * 100)) == set(SETS)
    assert of(request(3.1, *[0.1] * 100)) == {"TPOT", "P99 ITL", "max gap"}
    assert of(request(2.9, *[0.21] * 100)) == {"TTFT", "P99 ITL", "max gap"}
    assert of(request(2.9, *[0.1] * 99, 3.5)) == set(SETS) - {"max gap", ALL}
    assert of(request(2.9, *[0.1] * 97, *[1.2] * 3)) == set(SETS) - {"P99 ITL", ALL}


def test_limits_are_included_and_scaled():
    at = request(3.0, 0.2, 0.2)
    assert of(at) == set(SETS) and of(at, "0.5") == {"P99 ITL", "max gap"} and of(at, "2") == set(SETS)
    slow = request(1.4, 0.05, 1.6, 0.05)
    assert of(slow, "0.5") == {"TTFT"} and of(slow) == {"TTFT", "max gap"}
    assert of(slow, "2") == {"TTFT", "P99 ITL", "max gap"}


def test_one_token_has_no_gaps():
    assert of(request(0.1)) == set(SETS)


def test_shares_are_of_what_was_sent():
    """Two of four complete, one in time; those that never came back keep to nothing."""
    shares = HERE.shares([request(1.0, 0.1), request(9.0, 0.1)], 4)
    assert shares["1"][PAPER] == 0.25 and shares["1"]["TPOT"] == 0.5 and shares["2"][ALL] == 0.25
    assert set(shares) == {"0.5", "1", "2"}
    assert HERE.shares([], 3)["1"] == dict.fromkeys(SETS, 0.0)


def test_the_file_says_where_each_limit_is_from():
    raw = json.loads(FILE.read_bytes())
    assert all(raw[name]["value"] > 0 and raw[name]["source"] for name in LIMITS)
    assert objectives().limits[:2] == (3000, 200), "those of the paper"
    assert objectives().scales == (0.5, 1, 2, 4) and objectives().levels == (0.9, 0.99) and objectives().tpot_s == 0.2


@pytest.mark.parametrize(
    "change", [{"limits": (1.0, 2.0)}, {"limits": (0.0, 1, 1, 1)}, {"scales": (0.0,)}, {"levels": (1.1,)}]
)
def test_what_makes_no_sense_is_refused(change):
    with pytest.raises(ConfigError, match="objectives: "):
        Objectives(**({"limits": HERE.limits, "scales": HERE.scales, "levels": HERE.levels} | change))

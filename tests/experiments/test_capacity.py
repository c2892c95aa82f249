"""Capacities of curves made by hand, and of a small model; what is kept, shared and written."""

import dataclasses
import json
from functools import cache

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from engine import Engine
from engine.errors import ConfigError
from experiments import capacity, capacity_runs, outcomes
from experiments.bisection import STEP, rate_at
from experiments.capacity import Grid, Study
from experiments.capacity_places import FIXED, TUNED_ON, Family, Place, Site, look
from experiments.capacity_runs import Ask, Bench, tuning_ask
from experiments.capacity_tables import best, picked, ratio
from experiments.judged import judge
from experiments.objectives import ALL, PAPER, SETS, objectives
from experiments.points import Point
from experiments.replay import StopFlag
from experiments.tuning import LAYERKV, PARK, POLICIES, SJF, V0

SITE = Site(Place(FIXED), 32 * 400, 21, 256, 1.0)
LIMITS = {"vllm_v0": 0.8, "vllm_v1": 0.9, "chunked": 0.95, "paged_park": 1.2, "layerkv": 1.5}  # requests/s, made up


def limit_of(point) -> float:
    """What a policy can do: more with swap, half when its sequences are limited, more when told wider objectives."""
    scheduler = point.config.scheduler
    rate = LIMITS[scheduler.policy] * (1.02 if scheduler.preemption == "swap" else 1.0)
    rate *= 0.5 if scheduler.max_num_seqs < 30 else 1.0
    return rate * (scheduler.layerkv.tpot_slo / 0.2) ** 0.5


@cache
def limit_of_engine(engine: str) -> float:
    """Settings are read once."""
    return limit_of(Point("llama2-7b", engine, "burst"))


class FakeBench(Bench):
    """Attainment falls from 1 at the limit by 1 point for each percent of load beyond it, twice as fast for all four;
    the second seed has 1% less. LayerKV wants 20 GB of host tier, paged_park 90."""

    def __init__(self):
        super().__init__(None)
        self.points = []

    def _run(self, points):
        self.points += points
        self.num_runs += len(points)
        return [self._fake(point) for point in points]

    def _fake(self, point):
        rate = float(point.workload.split("rate=")[1].split(",")[0])
        over = max(0.0, rate / limit_of_engine(point.engine) - 1) + (0.01 if point.seed == 1 else 0.0)
        share = {name: 1 - over * (2 if name == ALL else 1) for name in SETS}
        asked = 20 * 10**9 if "policy=layerkv" in point.engine else 90 * 10**9
        return {"shares": {f"{s:g}": share for s in objectives().scales}, "rate": 1.0, "asked": asked}


def close(found, rate) -> bool:
    """Whether a capacity is the highest rate of the grid that is at most `rate`."""
    return found.rate <= rate * 1.0001 and found.rate * STEP > rate * 0.9999


def test_capacity_is_where_the_mean_over_seeds_crosses_the_level():
    """Seeds 0 and 1 miss on average half a point more: 90% holds until load 1.095, all four until 1.045 (2 x 0.045 +
    2 x 0.005 = 0.1), 99% until 1.005, and 99% of all four at load 1 exactly."""
    bench = FakeBench()
    asks = [Ask.of(SITE, V0, "", what, 1, level, (0, 1)) for what in (PAPER, ALL) for level in (0.9, 0.99)]
    found = bench.capacities(asks)
    for ask, load in zip(asks, (1.095, 1.005, 1.045, 1.0), strict=True):
        assert close(found[ask], 0.8 * load), ask
        assert found[ask].bounded and not found[ask].crossings
    assert len(set(bench.points)) == len(bench.points), "searches of one curve share its runs"
    shares = dict(found[asks[0]].tried)
    assert all(share == pytest.approx(1 - max(0, rate / 0.8 - 1) - 0.005, abs=1e-4) for rate, share in shares.items())


def test_nobody_is_judged_on_the_seed_that_was_tuned_on():
    assert tuning_ask(SITE, V0, "", PAPER).curve.seeds == (TUNED_ON,) and TUNED_ON not in capacity_runs.JUDGED_ON


def test_a_host_tier_that_is_not_used_further_is_not_run_smaller():
    """LayerKV wants 20 GB: what 128 GB gave holds for 32, not for 8. Who needs no host tier is run once."""
    bench = FakeBench()
    for host, new in ((128, True), (32, False), (8, True)):
        before = len(bench.points)
        ours, paged = (Ask.of(SITE.at(host_gb=host), p, "", PAPER, seeds=(0,)) for p in (LAYERKV, V0))
        found = bench.capacities([ours, paged])
        assert close(found[ours], 1.5 * 1.1) and close(found[paged], 0.8 * 1.1)
        added = bench.points[before:]
        assert any(p.config.cache.host_bytes == host * 10**9 for p in added) is new
        assert any(p.config.scheduler.policy == "vllm_v0" for p in added) is (host == 128)


def test_a_curve_that_rises_again_is_told_of(monkeypatch):
    """Rates from 0.6 to 0.7 fail. A search from 0.614 goes down and ends below them, one from 1 above; together they
    know that 0.614 fails and 0.864 passes."""
    bench, fake = FakeBench(), FakeBench._fake

    def dipped(self, point):
        run = fake(self, point)
        if 0.6 <= float(point.workload.split("rate=")[1].split(",")[0]) <= 0.7:
            run["shares"] = {scale: dict.fromkeys(SETS, 0.0) for scale in run["shares"]}
        return run

    monkeypatch.setattr(FakeBench, "_fake", dipped)
    below, above = (Ask.of(SITE, V0, "", PAPER, 1, level, (0,)) for level in (0.91, 0.9))
    found = bench.capacities([below, above], {below: -10})
    assert (found[below].rate, found[above].rate) == (rate_at(1.0, -11), rate_at(1.0, -3))
    assert found[below].crossings == found[above].crossings == ((rate_at(1.0, -10), rate_at(1.0, -3)),)


GRID = Grid((FIXED,), (0.5, 1), ("l20",), (1,), (1.0, 0.25), (8, 128), (0, 1))


@pytest.fixture(scope="module")
def study() -> Study:
    study = Study(GRID, FakeBench(), 4)
    for part in capacity.PARTS:
        getattr(study, part)()
    return study


def test_every_policy_has_the_same_number_of_trials_and_the_best_is_chosen(study):
    assert len(study.log) == 4 * len(POLICIES)
    for policy in POLICIES:
        own = [line for line in study.log if line["policy"] == policy]
        assert [line["trial"] for line in own] == [0, 1, 2, 3] and len({line["settings"] for line in own}) == 4
        for target in (PAPER, ALL):
            (winner,) = (line for line in own if target in line["chosen_for"])
            top = max(line["capacity"][target] for line in own)
            assert winner["capacity"][target] == top
            assert all(line["capacity"][target] < top for line in own[: winner["trial"]]), "of equals the first"
            assert study.chosen[FIXED.name, target][policy] == winner["settings"]


def test_rows_say_what_was_found(study):
    """The best paged baseline is `sjf` or one with swap; LayerKV is told wider objectives, and can do more then."""
    assert {row.part for row in study.rows} == {"curves", "alone", "length", "map"}
    curves = picked(study.rows, part="curves", family=FIXED.name, target=PAPER, level=0.9)
    assert len(curves) == len(POLICIES) * len(objectives().scales)
    ours = {row.scale: row.found.rate for row in picked(curves, policy=LAYERKV)}
    assert ours[4] / ours[1] == pytest.approx(2, rel=0.06) and ours[1] / ours[0.5] == pytest.approx(2**0.5, rel=0.06)
    at_one = {row.policy: row.found.rate for row in picked(curves, scale=1)}
    value = ratio(picked(curves, scale=1), LAYERKV, (V0, SJF))
    assert value == at_one[LAYERKV] / max(at_one[V0], at_one[SJF]) and value > 1
    assert ratio(picked(curves, scale=1), LAYERKV, (PARK,)) == at_one[LAYERKV] / at_one[PARK]
    assert best(study.rows)[FIXED.name][PAPER] == pytest.approx(
        ours[1] / max(at_one[p] for p in capacity.PAGED), rel=1e-4
    )
    lengths = {row.site.num_requests for row in picked(study.rows, part="length")}
    assert lengths == {study.sites[FIXED.name].num_requests // 2, study.sites[FIXED.name].num_requests}
    hosts = {
        (row.site.place.device, row.site.place.fraction, row.site.place.host_gb)
        for row in study.rows
        if row.part == "map"
    }
    assert hosts == {(d, f, h) for d in GRID.devices for f in GRID.fractions for h in GRID.hosts}


def test_a_ratio_to_nothing(study):
    row = picked(study.rows, part="curves", scale=1, level=0.9, target=PAPER)
    none = [dataclasses.replace(r, found=dataclasses.replace(r.found, rate=0.0)) for r in row]
    ours = [dataclasses.replace(r, found=dataclasses.replace(r.found, rate=2.0 * (r.policy == LAYERKV))) for r in row]
    assert ratio(none, LAYERKV, (V0,)) is None and ratio(ours, LAYERKV, (V0,)) == float("inf")


@flagsaver.flagsaver
def test_the_program_writes_the_same_again(tmp_path, monkeypatch, capsys):
    """To the byte: data, log, tables and figures follow from the code and the flags."""
    monkeypatch.setattr(capacity, "Bench", lambda kept, processes: FakeBench())
    monkeypatch.setattr(capacity, "GRIDS", {"small": GRID})
    for out in ("a", "b"):
        flags.FLAGS(["test", f"--out={tmp_path / out}", "--trials=4"])
        assert capacity.main() == 0
    *text, line = capsys.readouterr().out.splitlines()
    headline = json.loads(line)
    assert headline["bench"] == "capacity" and set(headline["ratio"][FIXED.name]) == {PAPER, ALL}
    assert any(words.startswith("layerkv / best paged") for words in text)
    for name in ("capacity.json", "search.jsonl", "tables.txt", "capacity.png", "map.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    record = json.loads((tmp_path / "a" / "capacity.json").read_text())
    assert {row["part"] for row in record["rows"]} == {"curves", "alone", "length", "map"}
    log = [json.loads(words) for words in (tmp_path / "a" / "search.jsonl").read_text().splitlines()]
    assert len(log) == 4 * len(POLICIES)
    with pytest.raises(ConfigError, match="holds an earlier run"):
        capacity.main()


SHORT = Family("short", "synthetic:prompt=fixed:64,output=fixed:8", 128)


def small_site(host_gb=1) -> Site:
    """A model of 1M parameters on an L20 with room for 8 requests."""
    return Site(Place(SHORT, model="tiny-1m", stack=None, host_gb=host_gb), 4 * 40, 8, 48, 2000.0)


def test_the_second_half_of_the_requests_is_judged():
    """By hand from the same run: of 48 requests the last 24 count, whenever they end."""
    point = small_site().point(POLICIES[V0], "", 6000.0, 0)
    found = judge(point)
    done, _ = outcomes.serve_once(Engine.from_pretrained(point.model, point.config), point.requests(), StopFlag())
    late = sorted(done.completed, key=lambda m: m.arrival)[24:]
    assert len(late) == 24
    assert found["shares"] == objectives().shares(late, 24) != objectives().shares(done.completed, 24)
    longest = max(m.arrival + m.e2e_s for m in done.completed)
    assert found["rate"] == pytest.approx(48 / longest, rel=1e-6) and found["asked"] == 0


def test_a_host_tier_of_what_was_asked_for_changes_nothing():
    """And LayerKV does ask for some."""
    point = small_site().point(POLICIES[LAYERKV], "", 50_000.0, 0)
    found = judge(point)
    assert found["asked"] > 0
    exact = dataclasses.replace(point, engine=f"{point.engine},host_bytes={found['asked']}B")
    assert judge(exact) == found
    assert judge(dataclasses.replace(point, engine=f"{point.engine},host_bytes={found['asked'] // 4}B")) != found


def test_a_search_over_real_runs_goes_on_where_it_was(tmp_path, monkeypatch):
    """From kept runs: the same capacity, and nothing is run."""
    ask = Ask.of(small_site(), V0, "", PAPER, scale=0.5, seeds=(0,))
    first = Bench(tmp_path, 1).capacities([ask])[ask]
    assert np.all(np.diff([share for _, share in first.tried]) <= 0) and len(first.tried) > 3
    monkeypatch.setattr(capacity_runs, "judge", None)
    assert Bench(tmp_path, 1).capacities([ask])[ask] == first


def test_a_site_is_what_the_devices_leave_for_kv():
    """A quarter of the pool holds a quarter of the requests; a model that does not fit leaves none."""
    site, quarter = look(Place(FIXED)), look(Place(FIXED, fraction=0.25))
    assert site.holds == 21 and quarter.num_pages == pytest.approx(site.num_pages / 4, abs=32) and quarter.holds == 5
    assert site.num_pages * 16 // 32 // 2498 == site.holds and site.num_requests == quarter.num_requests == 256
    assert look(Place(FIXED), times=2).num_requests == 512
    assert look(Place(FIXED, model="llama3.1-70b")) is None

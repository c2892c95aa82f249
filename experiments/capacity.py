"""Capacity under objectives: the highest arrival rate at which 90% (99%) of requests keep to them, by bisection.

    python -m experiments.capacity --grid=small --out=results/capacity

Every policy is tuned first, with the same number of trials (`tuning.py`), on a workload seed of its own; what was
chosen is judged on other seeds. `objectives.json` holds the objectives. Rates are those of Poisson arrivals, stretched;
the second half of a run's requests is judged. Parts:

    tune      the trials, by family of workloads; chosen for the objectives of LayerKV's paper, and for all four
    curves    capacities over scales of the objectives, on one L20 with Llama2-7B and a host tier of 128 GB
    length    the same at scale 1 when runs are shorter and longer: what is absorbed, and what can be sustained
    map       LayerKV over the best paged baseline: devices, parallel degree, pool, host tier; fixed lengths

Every run that has ended is kept (--kept), so that an interrupted program goes on where it was. Writes capacity.json,
search.jsonl (a line per trial), tables.txt, and two figures, all the same bytes whenever the same code runs, and
environment.json under --out; ends with one JSON line.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags

from engine.errors import ConfigError
from engine.files import write_whole
from experiments import capacity_figure, common_flags, environment, seeded
from experiments.bisection import STEP
from experiments.capacity_places import CHAT, FIXED, LONG, TUNED_ON, Family, Place, Site, look
from experiments.capacity_runs import JUDGED_ON, Ask, Bench, Capacity, tuning_ask
from experiments.capacity_tables import Row, best, tables
from experiments.objectives import ALL, PAPER, SETS, objectives
from experiments.run_record import claim
from experiments.tuning import LAYERKV, PAGED, PARK, POLICIES, trials

flags.declare_key_flag("out")
flags.declare_key_flag("overwrite")
flags.declare_key_flag("processes")
flags.declare_key_flag("kept")
PARTS = ("tune", "curves", "length", "map")
PART = flags.DEFINE_multi_enum("part", PARTS, PARTS, "Parts; `tune` is always among them.")
GRID = flags.DEFINE_enum("grid", "small", ["small", "full"], "How much: see `GRIDS`.")
TRIALS = flags.DEFINE_integer("trials", 12, "Settings that each policy is tried with.", lower_bound=1)
FILE, LOG, TABLES, ENVIRONMENT = "capacity.json", "search.jsonl", "tables.txt", "environment.json"
TARGETS = (PAPER, ALL)  # what settings are chosen for
HALF = math.ceil(math.log(2) / math.log(STEP))  # grid steps


@dataclass(frozen=True)
class Grid:
    """How much is run."""

    families: tuple[Family, ...]
    lengths: tuple[float, ...]  # of runs, times the usual
    devices: tuple[str, ...]
    degrees: tuple[int, ...]
    fractions: tuple[float, ...]
    hosts: tuple[int, ...]  # GB, besides 0, where LayerKV cannot run and is the baseline: ratio 1
    seeds: tuple[int, ...] = JUDGED_ON
    map_seeds: tuple[int, ...] = JUDGED_ON[:1]


DEVICES = ("l20", "a100", "h100", "h200", "tpu-v6e")
GRIDS = {
    "small": Grid((FIXED, CHAT), (0.5, 1, 4), DEVICES, (1,), (1.0, 0.25), (8, 128), JUDGED_ON[:2]),
    "full": Grid((FIXED, CHAT, LONG), (0.5, 1, 2, 4, 8), DEVICES, (1, 2, 4), (1.0, 0.5, 0.25), (8, 32, 128, 512)),
}
Chosen = dict[tuple[str, str], dict[str, str]]  # by family and target: settings by policy
Starts = dict[tuple[str, str, str], int]  # by family, target and policy: grid index of the capacity on the tuning seed


class Study:
    """The parts, one after the other; `rows` is what they found."""

    def __init__(self, grid: Grid, bench: Bench, num_trials: int):
        self.grid, self.bench, self.num_trials = grid, bench, num_trials
        self.sites = dict(zip([f.name for f in grid.families], bench.based(_there(grid.families)), strict=True))
        self.chosen: Chosen = {}
        self.log: list[dict[str, Any]] = []
        self.rows: list[Row] = []
        self._starts: Starts = {}

    def tune(self) -> None:
        """The same number of trials for every policy and family, the defaults first. What cannot do half of what they
        can is not looked at further."""
        names = [(site, policy) for site in self.sites.values() for policy in POLICIES]
        tried = {name: trials(POLICIES[name[1]], self.num_trials) for name in names}
        asks = {
            (site.place.family.name, policy, number, target): tuning_ask(site, policy, settings, target)
            for (site, policy), found in tried.items()
            for number, settings in enumerate(found)
            for target in TARGETS
        }
        defaults = self.bench.capacities(ask for key, ask in asks.items() if key[2] == 0)
        start = {ask: defaults[asks[f, p, 0, t]].index or 0 for (f, p, _, t), ask in asks.items()}
        found = self.bench.capacities(asks.values(), start, HALF)
        for (site, policy), settings in tried.items():
            family = site.place.family.name
            rates = {t: [found[asks[family, policy, i, t]] for i in range(len(settings))] for t in TARGETS}
            winners = {t: max(range(len(settings)), key=lambda i: (rates[t][i].rate, -i)) for t in TARGETS}
            for target, winner in winners.items():
                self.chosen.setdefault((family, target), {})[policy] = settings[winner]
                self._starts[family, target, policy] = rates[target][winner].index or 0
            for i, text in enumerate(settings):
                self.log.append({
                    "family": family, "policy": policy, "trial": i, "settings": text,
                    "capacity": {t: rates[t][i].rate for t in TARGETS},  # 0: less than half of what defaults do
                    "chosen_for": [t for t in TARGETS if winners[t] == i],
                })  # fmt: skip

    def curves(self) -> None:
        """Over scales and levels, for the objectives that settings were chosen for; then each objective alone."""
        o = objectives()
        wanted = [(s, lv) for s in o.scales for lv in o.levels]
        for target in TARGETS:
            self._search("curves", target, [(target, scale, level) for scale, level in wanted], list(POLICIES))
        alone = [(name, 1, o.levels[0]) for name in SETS if name not in TARGETS]
        self._search("alone", PAPER, alone, list(POLICIES))

    def length(self) -> None:
        """Longer and shorter runs, fixed lengths, the paper's objectives."""
        wanted = (PAPER, 1, objectives().levels[0])
        policies = [*PAGED, PARK, LAYERKV]
        for times in self.grid.lengths:
            site = dataclasses.replace(self.sites[FIXED.name], num_requests=_times(self.sites[FIXED.name], times))
            self._search("length", PAPER, [wanted], policies, {FIXED.name: site})

    def map(self) -> None:
        """Everything else, with the settings that were chosen on one L20. Larger host tiers come first."""
        g, level = self.grid, objectives().levels[0]
        places = [
            Place(FIXED, d, None, tensor=n, fraction=f) for d in g.devices for n in g.degrees for f in g.fractions
        ]
        sites = self.bench.based([site for place in places if (site := look(place))])
        for host in sorted(g.hosts, reverse=True):
            asks = {
                (site, policy, target): Ask.of(
                    site.at(host_gb=host),
                    policy,
                    self.chosen[FIXED.name, target][policy],
                    target,
                    1,
                    level,
                    g.map_seeds,
                )
                for site in sites
                for policy in (*PAGED, PARK, LAYERKV)
                for target in TARGETS
            }
            self._keep("map", asks, self.bench.capacities(asks.values()))

    def _search(self, part: str, target: str, wanted: Sequence[tuple[str, float, float]], policies: Sequence[str],
                sites: dict[str, Site] | None = None) -> None:  # fmt: skip
        """Capacities for (objectives, scale, level), with the settings chosen for a target."""
        asks = {
            (site, policy, target, *what): Ask.of(
                site, policy, self.chosen[family, target][policy], *what, seeds=self.grid.seeds
            )
            for family, site in (sites or self.sites).items()
            for policy in policies
            for what in wanted
        }
        start = {ask: self._starts[key[0].place.family.name, target, key[1]] for key, ask in asks.items()}
        self._keep(part, asks, self.bench.capacities(asks.values(), start))

    def _keep(self, part: str, asks: dict[Any, Ask], found: dict[Ask, Capacity]) -> None:
        for (_, policy, target, *_), ask in asks.items():
            self.rows.append(
                Row(part, ask.curve.site, policy, target, ask.objectives, ask.scale, ask.level, found[ask])
            )


def _there(families: Sequence[Family]) -> list[Site]:
    """The sites on one L20."""
    sites = [look(Place(family)) for family in families]
    assert all(sites)
    return [site for site in sites if site]


def _times(site: Site, times: float) -> int:
    return max(int(site.num_requests * times) // 2 * 2, 2)


def record_of(study: Study) -> dict[str, Any]:
    """What follows from the code and the flags alone."""
    return {
        "grid": GRID.value,
        "trials": study.num_trials,
        "tuned_on": TUNED_ON,
        "seeds": study.grid.seeds,
        "objectives": dataclasses.asdict(objectives()),
        "sites": {name: dataclasses.asdict(site) for name, site in study.sites.items()},
        "chosen": [
            {"family": family, "for": target, "settings": settings}
            for (family, target), settings in study.chosen.items()
        ],
        "rows": [row.record() for row in study.rows],
    }


def draw(study: Study, out: Path) -> list[str]:
    """The figures' paths; none after saying why."""
    try:
        return capacity_figure.draw(study.rows, out)
    except ConfigError as e:
        print(f"no figure: {e}")
        return []


def main() -> int:
    """The program."""
    out = claim(common_flags.out_directory("capacity"), common_flags.OVERWRITE.value, (FILE, LOG, TABLES))
    start = time.perf_counter()
    bench = Bench(Path(seeded.KEPT.value) / "capacity", seeded.PROCESSES.value)
    study = Study(GRIDS[GRID.value], bench, TRIALS.value)
    for part in PARTS:
        if part in ("tune", *PART.value):
            getattr(study, part)()
            print(f"{part}: {bench.num_runs} runs, {time.perf_counter() - start:.0f} s", flush=True)
    text = tables(study.rows, study.log)
    print(text)
    write_whole(out / TABLES, text + "\n")
    write_whole(out / LOG, "".join(json.dumps(line) + "\n" for line in study.log))
    write_whole(out / FILE, json.dumps(record_of(study), separators=(",", ":")) + "\n")
    seconds = round(time.perf_counter() - start, 1)
    about = environment.describe() | {"seconds": seconds}
    write_whole(out / ENVIRONMENT, json.dumps(about, indent=1) + "\n")
    line = {"bench": "capacity", "grid": GRID.value, "runs": bench.num_runs, "seconds": seconds}
    print(json.dumps(line | {"ratio": best(study.rows), "figures": draw(study, out)}))
    return 0


if __name__ == "__main__":
    common_flags.run_main(main, engine=False)

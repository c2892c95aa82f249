"""The programs that sweep the virtual clock: every study names valid settings, and data files follow from the code."""

import json

import pytest

from experiments import paper_layerkv, studies
from experiments.layerkv_gates import LAYERKV, NO_RULE
from experiments.studies import STUDIES, Case, Load, Study
from tests.experiments import programs
from tests.experiments.test_seeded import cell


@pytest.mark.parametrize("study", STUDIES.values(), ids=list(STUDIES))
def test_every_study_names_settings_and_workloads_that_exist(study):
    """Points check their settings when they are made. Nothing is run twice under two names."""
    points = study.points()
    assert len(points) == len(study.cases) * len(study.loads)
    assert all(point.requests() for point in {p.workload: p for p in points.values()}.values())
    configs = [points[study.loads[0].name, case.name].config for case in study.cases]
    assert all(a != b for i, a in enumerate(configs) for b in configs[:i])
    longest = {p.workload: max(r.prompt_len + r.output_len for r in p.requests()) for p in points.values()}
    assert all(point.config.max_context >= longest[point.workload] for point in points.values())


def test_leaving_out_changes_one_setting_and_adding_in_all_but_one():
    def changed(engine):
        return set(engine.split(",")) - {"policy=layerkv"}

    out, into = STUDIES["leave_one_out"], STUDIES["add_one_in"]
    every = changed(studies.without(*(name for name, *_ in studies.MECHANISMS)))
    singles = [changed(case.engine) for case in out.cases if case.name.startswith("- ")]
    assert len(every) == 6 and sorted(map(len, singles)) == [1] * 6 and set.union(*singles) == every
    assert all(case.instead for case in out.cases if case.name.startswith("- "))
    alone = [every - changed(c.engine) for c in into.cases if c.name.startswith("+") and c.name.count("+") == 1]
    assert sorted(map(len, alone)) == [1] * 6 and set.union(*alone) == every


def test_settings_over_settings():
    """The last one of a name counts, and says so in the configuration."""
    load = Load("l", "burst:num=2,context=20,output=4", "max_context=64,link_gbs=2")
    study = Study("s", "", (Case("a", "policy=vllm_v0"), Case("b", "policy=chunked,link_gbs=1")), (load,))
    links = {case: point.config.link_gbs for (_, case), point in study.points().items()}
    assert links == {"a": 2, "b": 1}


def test_no_pressure_must_cost_nothing():
    study = STUDIES["no_pressure"]
    quiet = {"peak_host_bytes": [0]}
    cells = {(load.name, case.name): cell(**quiet) for load in study.loads for case in study.cases}
    assert [gate.passed for gate in studies.costs_nothing(study, cells)] == [True] * len(study.loads)
    names = [load.name for load in study.loads]
    cells[names[0], "layerkv"] = cell(1011.0, **quiet)
    cells[names[1], "layerkv"] = cell(peak_host_bytes=[1])
    cells[names[2], "layerkv"] = cell(rate=9.8, **quiet)
    assert [gate.passed for gate in studies.costs_nothing(study, cells)] == [False] * 3 + [True]


@pytest.fixture
def parsed():
    """Flags at their defaults."""
    from absl import flags

    flags.FLAGS(["test"])
    return flags.FLAGS


def test_rates_follow_a_rule_that_knows_the_baseline_only(parsed):
    """The load of every model at 2,048 tokens is that of Llama2-7B at 1 request/s, 1 / 0.8; then shares of capacity."""
    names = [setup.name for setup in paper_layerkv.SETUPS]
    capacity = {(s.name, c): 10.0 for s in paper_layerkv.SETUPS for c in paper_layerkv.contexts(s)}
    capacity |= {(names[0], 2048): 0.8, (names[1], 2048): 0.4, (names[2], 2048): 0.2}
    alone = {(name, context): float(context) for name, context in capacity}
    alone[names[2], 2048] = 3001.0
    found = paper_layerkv.rates(capacity, alone)
    assert [found[name][512] for name in names] == [[1.0], [0.5], [0.25]]
    assert found[names[1]][2048] == [0.5, 0.1, 0.2, 0.3, 0.36, 0.4, 0.44, 0.5, 0.6] and found[names[1]][1024] == [0.5]
    assert found[names[2]][1024] == [0.25, 2.5, 5, 7.5, 9, 10, 11, 12.5, 15] and len(found[names[2]][2048]) == 9


def test_the_paper_program_writes_the_same_data_again(tmp_path):
    """From points that are kept, too; a place per context and rate, with a cell per policy."""
    small = "--setup=Llama2-7B --prompt_tokens=64 --num_requests=3 --num_output_tokens=4 --seeds=2 --kept=kept"
    for out in ("a", "b"):
        code, stdout, stderr = programs.run("paper_layerkv", *small.split(), f"--out={out}", cwd=tmp_path)
        assert code == 0, stderr
    line = json.loads(stdout.splitlines()[-1])
    assert line["bench"] == "layerkv_paper" and line["gates"]["TTFT of layerkv at 2048 tokens, 1/s"] in (True, False)
    for name in ("layerkv_paper.json", "tables.txt", "ttft.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    record = json.loads((tmp_path / "a/layerkv_paper.json").read_text())
    assert {place["context"] for place in record["places"]} == {64, 2048}
    for place in record["places"]:
        assert set(place["cells"]) == set(paper_layerkv.POLICIES) >= {LAYERKV, NO_RULE}
        assert all(len(of["mean_ttft_ms"]) == 2 and of["completed"] == [3, 3] for of in place["cells"].values())
    assert "seconds" in json.loads((tmp_path / "a/environment.json").read_text())


def test_bad_input_is_one_line(tmp_path):
    code, _, stderr = programs.run("ablate", "--study=nothing", cwd=tmp_path)
    assert code == 2 and "should be one of" in stderr.splitlines()[-1]

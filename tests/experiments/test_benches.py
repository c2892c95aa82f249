"""The benches without tests of their own run, at tiny sizes, and end in a JSON line that holds what they measure."""

import json

from tests.experiments import programs


def line_of(program: str, *flags: str, **options) -> dict:
    code, out, err = programs.run(program, *flags, **options)
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def test_swap_measures_every_way_and_the_bar_is_the_faster_by_hand():
    size = ("--layers=2", "--page_size=4", "--kv_heads=1", "--head_dim=8", "--repeats=3")
    line = line_of("bench_swap", "--gib=0.005", *size)
    assert line["bench"] == "swap" and line["layers"] == 2 and abs(line["gib"] - 0.005) < 1e-4
    assert all(line[f"{way}_gbs"] > 0 for way in ("engine", "pieces", "whole", "plain"))
    assert line["engine_over_by_hand"] == min(line["engine_over_pieces"], line["engine_over_whole"]) > 0


def test_async_measures_both_depths():
    size = ("--batch=2", "--prompt=8", "--new_tokens=8", "--pairs=1", "--num_pages=64", "--max_num_seqs=2")
    line = line_of("bench_async", "--model=tiny-1m", *size)
    assert line["bench"] == "async" and line["batch"] == 2 and line["gain"] > 0
    assert all(line[f"depth{depth}_ms"] > 0 and 0 <= line[f"depth{depth}_idle"] <= 1 for depth in (0, 1))


def test_policies_serves_every_workload_on_every_engine(tmp_path):
    engines = ("policy=vllm_v0", "policy=vllm_v1,order=sjf")
    loads = [f"synthetic:num={n},rate=1000,prompt=fixed:8,output=fixed:2" for n in (2, 3)]
    given = [f"--engine={e}" for e in engines] + [f"--workload={w}" for w in loads]
    line = line_of("bench_policies", "--model=any", *given, f"--out={tmp_path}/run", "--repeats=2", timed=True)
    assert line["repeats"] == 2 and set(line["mean_ttft_ms"]) == {f"{w}|{e}" for w in loads for e in engines}
    runs = json.loads((tmp_path / "run/policies.json").read_text())["runs"]
    assert [[s["completed"] for s in run["summaries"]] for run in runs] == [[2, 2], [2, 2], [3, 3], [3, 3]]


def test_sim_runs_the_traces_that_are_there(tmp_path):
    trace = tmp_path / "azure-2023/AzureLLMInferenceTrace_conv.csv"
    trace.parent.mkdir()
    rows = [f"2023-11-16 18:15:{46 + i}.0000000,{100 + i},{5 + i}" for i in range(3)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows, ""]))
    cases = ("--case=azure", "--case=mooncake")
    (case,) = line_of("bench_sim", f"--traces={tmp_path}", *cases, "--repeats=1")["cases"]
    assert (case["case"], case["requests"], case["preempted"]) == ("azure", 3, 0)
    assert case["steps"] >= case["plans"] > 0 and case["requests_per_s"] > 0
    code, out, err = programs.run("bench_sim", f"--traces={tmp_path}", "--case=mooncake")
    assert code == 2 and "mooncake: left out" in out and f"no trace under --traces={tmp_path}" in err

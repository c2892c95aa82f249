"""Protects comparisons: vLLM's and SGLang's field names load, ratios are to the first, workloads must agree."""

import json

import pytest

from tests.experiments import programs

# What `vllm bench serve --save-result` writes with its defaults: no E2E latencies, P99 only.
VLLM = {
    "date": "20260301-120000", "endpoint_type": "openai", "backend": "openai", "label": None, "model_id": "m",
    "tokenizer_id": "m", "num_prompts": 10, "request_rate": "inf", "burstiness": 1.0, "max_concurrency": None,
    "duration": 5.0, "completed": 10, "failed": 0, "total_input_tokens": 1280, "total_output_tokens": 640,
    "request_throughput": 2.0, "request_goodput": None, "output_throughput": 128.0, "total_token_throughput": 384.0,
    "max_output_tokens_per_s": 200.0, "max_concurrent_requests": 10, "rtfx": 0.0,
    "mean_ttft_ms": 60.0, "median_ttft_ms": 50.0, "std_ttft_ms": 5.0, "p99_ttft_ms": 100.0,
    "mean_tpot_ms": 12.0, "median_tpot_ms": 10.0, "std_tpot_ms": 1.0, "p99_tpot_ms": 20.0,
    "mean_itl_ms": 12.0, "median_itl_ms": 10.0, "std_itl_ms": 1.0, "p99_itl_ms": 30.0,
}  # fmt: skip
# A line of SGLang's bench_serving --output-file: other names for E2E.
SGLANG = {
    "backend": "sglang", "dataset_name": "random", "request_rate": 4.0, "max_concurrency": None, "duration": 5.0,
    "completed": 10, "total_input_tokens": 1280, "total_output_tokens": 640, "total_output_tokens_retokenized": 640,
    "request_throughput": 4.0, "input_throughput": 256.0, "output_throughput": 256.0,
    "mean_e2e_latency_ms": 500.0, "median_e2e_latency_ms": 400.0, "std_e2e_latency_ms": 10.0,
    "p99_e2e_latency_ms": 900.0, "mean_ttft_ms": 30.0, "median_ttft_ms": 25.0, "std_ttft_ms": 1.0, "p99_ttft_ms": 50.0,
    "mean_tpot_ms": 6.0, "median_tpot_ms": 5.0, "std_tpot_ms": 1.0, "p99_tpot_ms": 10.0,
    "mean_itl_ms": 6.0, "median_itl_ms": 5.0, "std_itl_ms": 1.0, "p95_itl_ms": 9.0, "p99_itl_ms": 15.0,
    "concurrency": 5.0, "accept_length": None,
}  # fmt: skip


def make_run(directory, workload_hash, **figures):
    directory.mkdir()
    summary = {**VLLM, "total_preemptions": 3, "median_e2el_ms": 800.0, **figures}
    window = {**summary, "request_throughput": 3.0}
    (directory / "summary.json").write_text(json.dumps(summary | {"window": window}))
    (directory / "config.json").write_text(json.dumps({"workload_hash": workload_hash}))
    return directory


def write(path, *objects):
    path.write_text("\n".join(map(json.dumps, objects)))
    return path


def compare(*args):
    code, stdout, stderr = programs.run("compare", *map(str, args))
    rows = json.loads(stdout.splitlines()[-1])["runs"] if code == 0 else []
    return code, stdout, stderr, rows


def test_runs_vllm_and_sglang_in_one_table(tmp_path):
    run = make_run(tmp_path / "ours", "abc123")
    vllm = write(tmp_path / "vllm.json", VLLM | {"workload_hash": "abc123", "request_throughput": 1.0})
    sglang = write(tmp_path / "sglang.jsonl", SGLANG, SGLANG | {"completed": 9})
    code, stdout, stderr, rows = compare(run, vllm, sglang)
    assert code == 0, stderr
    assert [r["run"] for r in rows] == [str(run), str(vllm), f"{sglang}:1", f"{sglang}:2"]
    assert [r["workload_hash"] for r in rows] == ["abc123", "abc123", None, None]
    assert [r["median_e2el_ms"] for r in rows] == [800.0, None, 400.0, 400.0]
    assert [r["completed"] for r in rows] == [10, 10, 10, 9]
    header, _, first, second, third, *_ = [line.split() for line in stdout.splitlines()]
    at = header.index("req/s")
    assert [line[at : at + 2] for line in (first, second, third)] == [["2", "1.00"], ["1", "0.50"], ["4", "2.00"]]
    assert "goodput" not in header  # nobody has it
    assert f"the workload of {sglang}:1, {sglang}:2 is not known" in stdout


def test_unequal_workloads_are_refused_in_one_line_that_names_both(tmp_path):
    a, b = make_run(tmp_path / "a", "1111"), make_run(tmp_path / "b", "2222")
    code, _, stderr, _ = compare(a, b)
    assert code == 2 and stderr.count("\n") == 1
    assert f"{a} served 1111 and {b} served 2222" in stderr and "--allow_different_workloads" in stderr
    assert compare(a, b, "--allow_different_workloads")[0] == 0


@pytest.mark.parametrize(
    "column, value, message",
    [
        ("median_ttft_ms", "fast", "median_ttft_ms must be a number, got 'fast'"),
        ("completed", [1], "completed must be a number, got '[1]'"),
        ("p99_itl_ms", True, "p99_itl_ms must be a number, got 'True'"),
        ("workload_hash", 7, "workload_hash must be text, got '7'"),
    ],
)
def test_a_figure_that_is_no_number_is_one_line(tmp_path, column, value, message):
    good, bad = write(tmp_path / "good.json", VLLM), write(tmp_path / "bad.json", VLLM | {column: value})
    code, _, stderr, _ = compare(good, bad)
    assert (code, stderr) == (2, f"compare: {bad}: {message}\n")


def test_the_scope_chooses_our_window(tmp_path):
    a, b = make_run(tmp_path / "a", "1"), write(tmp_path / "vllm.json", VLLM)
    assert [r["request_throughput"] for r in compare(a, b, "--scope=window")[3]] == [3.0, 2.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "vllm.json: not JSON"),
        ("[1]", "expected JSON objects"),
        ("", "expected JSON objects"),
        ('{"duration": 1}', "no request_throughput in result 1"),
        (None, "cannot be read"),
    ],
)
def test_bad_files_are_one_line(tmp_path, text, message):
    run, file = make_run(tmp_path / "a", "1"), tmp_path / "vllm.json"
    if text is not None:
        file.write_text(text)
    code, stdout, stderr, _ = compare(run, file)
    assert (code, stdout) == (2, "") and message in stderr and stderr.count("\n") == 1


def test_one_run_is_nothing_to_compare(tmp_path):
    code, _, stderr, _ = compare(make_run(tmp_path / "a", "1"))
    assert code == 2 and "at least two" in stderr

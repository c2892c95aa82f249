"""Protects frozen workloads: a round trip keeps every token and the hash, on any version; changed files are refused
with their line; exports say the same to a parser that knows nothing of ours."""

import json
import subprocess
import sys

import pytest

from engine.errors import WorkloadError
from engine.tokenizer import Tokenizer
from experiments import workload_exports
from experiments.workloads import build
from experiments.workloads.frozen import freeze, workload_hash
from tests.experiments import programs

VOCAB = 500
MOONCAKE = [
    {"timestamp": 0, "input_length": 1030, "output_length": 2, "hash_ids": [4, 5, 6]},
    {"timestamp": 40, "input_length": 600, "output_length": 3, "hash_ids": [4, 8]},
    {"timestamp": 70, "input_length": 1024, "output_length": 3, "hash_ids": [4, 5]},
]
MESSAGES = (("human", "one two"), ("gpt", "three"), ("human", "four"), ("gpt", "six"))
SHAREGPT = [{"conversations": [{"from": who, "value": text} for who, text in MESSAGES]}]
# Content hashes are part of the format: these must not depend on the Python, NumPy or JAX version.
PINNED = {
    "synthetic:num=3,rate=2,arrivals=fixed,prompt=uniform:3:9": "7982b673e3c1df61",
    "burst:num=2,context=600,output=3,seed=5,temperature=0.5": "d8f5c7fd425adc6e",
    "synthetic:turns=3,arrivals=fixed,num=5,loop=closed": "963ec5690010c36a",
}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in MOONCAKE))
    (tmp_path / "s.json").write_text(json.dumps(SHAREGPT))
    return tmp_path


def frozen(path, requests, vocab_size=VOCAB):
    text, digest = freeze(requests, "spec", 0, vocab_size)
    path.write_text(text)
    return digest


SPECS = ("mooncake:{}/m.jsonl", "sharegpt:{}/s.json,loop=closed", "burst:num=9,context=9,priorities=3", *PINNED)


@pytest.mark.parametrize("spec", SPECS)
def test_round_trip(files, spec):
    requests = build(spec.format(files))
    digest = frozen(files / "w.jsonl", requests)
    for again in (build(f"frozen:{files}/w.jsonl"), build(f"{files}/w.jsonl")):
        for a, b in zip(requests, again, strict=True):
            assert a.prompt_tokens(VOCAB).tolist() == b.prompt_tokens(4 * VOCAB).tolist()
            columns = (
                "id",
                "arrival_s",
                "prompt_len",
                "output_len",
                "sampling",
                "session",
                "turn",
                "think_s",
                "priority",
            )
            assert all(getattr(a, c) == getattr(b, c) for c in columns)
        assert {workload_hash(again, v) for v in (VOCAB, 4 * VOCAB)} == {digest} == {workload_hash(requests, VOCAB)}
        assert freeze(again, "spec", 0, 4 * VOCAB) == ((files / "w.jsonl").read_text(), digest)


@pytest.mark.parametrize("spec", PINNED)
def test_hashes_are_the_same_on_every_version(spec):
    assert workload_hash(build(spec), VOCAB)[:16] == PINNED[spec]


def test_the_hash_covers_everything():
    base = "synthetic:turns=2,arrivals=fixed,prompt=fixed:9,num=4"
    more = (
        "seed=1",
        "rate=2",
        "max_output=3",
        "max_prompt=8",
        "temperature=1",
        "priorities=2",
        "loop=closed",
        "loop=closed,think=2",
    )
    variants = (base, base[:-1] + "3", *(f"{base},{options}" for options in more))
    hashes = [workload_hash(build(spec), VOCAB) for spec in variants] + [workload_hash(build(base), VOCAB + 1)]
    assert len(set(hashes)) == len(hashes)
    assert workload_hash(build(base), VOCAB) == hashes[0]


def test_options_apply_to_a_frozen_workload(files):
    digest = frozen(files / "w.jsonl", build("synthetic:turns=2,num=6,loop=closed"))
    closed, opened = build(f"{files}/w.jsonl"), build(f"{files}/w.jsonl,loop=open")
    assert any(r.think_s for r in closed) and not any(r.think_s for r in opened)
    assert len(build(f"{files}/w.jsonl,num=2")) == 2 and workload_hash(opened, VOCAB) != digest
    with pytest.raises(WorkloadError, match="has its seed already"):
        build(f"{files}/w.jsonl,seed=3")


def test_a_model_with_a_smaller_vocabulary_is_told(files):
    frozen(files / "w.jsonl", build("synthetic:num=2"))
    with pytest.raises(WorkloadError, match=r"frozen for a vocabulary of 500, this model has 100: .*--vocab_size=100"):
        workload_hash(build(f"{files}/w.jsonl"), 100)


TAMPERED = {
    "arrival": (2, '"arrival_s": 0.0', '"arrival_s": 0.5', ":2: not what was frozen: sha256 is"),
    "output": (3, '"output_len": 3', '"output_len": 4', ":3: not what was frozen"),
    "block": (4, "[4, 5]", "[4, 7]", ":4: not what was frozen"),
    "seed": (4, '"seed": 0', '"seed": 1', ":4: not what was frozen"),
    "length": (3, '"prompt_len": 600', '"prompt_len": "600"', ":3: not a row of a frozen workload"),
    "negative": (3, '"seed": 0', '"seed": -1', ":3: not a row of a frozen workload"),
    "missing": (3, '"arrival_s"', '"arrived"', ":3: not a row of a frozen workload"),
    "digest": (3, '"sha256"', '"sha"', ":3: field sha256 is missing"),
    "version": (1, '"folio_workload": 1', '"folio_workload": 2', ":1: field folio_workload: expected version 1"),
    "number": (1, '"num_requests": 3', '"num_requests": 4', ":1: not what was frozen: 3 of 4 rows"),
    "vocabulary": (1, '"vocab_size": 500', '"vocab_size": 501', ":2: not what was frozen"),
    "header": (1, '"sha256": "', '"sha256": "f', ":1: not what was frozen: 3 of 3 rows"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_changed_file_is_refused_with_the_line(files, name):
    path = files / "w.jsonl"
    frozen(path, build(f"mooncake:{files}/m.jsonl"))
    line, old, new, expected = TAMPERED[name]
    lines = path.read_text().splitlines()
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new)
    path.write_text("\n".join(lines))
    with pytest.raises(WorkloadError) as e:
        build(f"frozen:{path}")
    assert f"{path}{expected}" in str(e.value) and "\n" not in str(e.value)


def test_rows_cannot_be_removed_or_reordered(files):
    path = files / "w.jsonl"
    frozen(path, build(f"mooncake:{files}/m.jsonl"))
    header, *rows = path.read_text().splitlines()
    for changed in (rows[:-1], rows[::-1], []):
        path.write_text("\n".join([header, *changed]))
        with pytest.raises(WorkloadError, match=r"w\.jsonl:1: not what was frozen"):
            build(f"{path}")
    path.write_text("")
    with pytest.raises(WorkloadError, match=r"w\.jsonl:1: field folio_workload is missing"):
        build(f"{path}")


# ---------------------------------------------------------------------------------------------- exports


def parsed(text):
    return [json.loads(line) for line in text.splitlines()]


def test_mooncake_export_keeps_the_traces_sharing(files):
    rows = parsed(workload_exports.mooncake(build(f"mooncake:{files}/m.jsonl"), VOCAB).text)
    assert [r["hash_ids"] for r in rows] == [[0, 1, 2], [0, 3], [0, 1]]  # the trace's ids, numbered as they come
    kept = [{k: r[k] for k in ("timestamp", "input_length", "output_length")} for r in MOONCAKE]
    assert [{k: r[k] for k in r if k != "hash_ids"} for r in rows] == kept
    (files / "again.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert [r.prompt_len for r in build(f"mooncake:{files}/again.jsonl")] == [1030, 600, 1024]


def test_mooncake_export_of_sessions_shares_whole_blocks():
    requests = build("synthetic:turns=2,num=2,prompt=fixed:1100,output=fixed:10,arrivals=fixed,rate=0.01,think=0.5")
    rows = parsed(workload_exports.mooncake(requests, VOCAB).text)
    assert [r["timestamp"] for r in rows] == [100_000, 100_500]
    assert rows[0]["hash_ids"] == [0, 1, 2] and rows[1]["hash_ids"] == [0, 1, 3, 4, 5]  # block 2 was partial


def test_sglang_export_holds_token_ids():
    requests = build("synthetic:num=3,prompt=uniform:3:9,arrivals=fixed,rate=4")
    rows = parsed(workload_exports.sglang(requests, VOCAB).text)
    assert [r["prompt"] for r in rows] == [r.prompt_tokens(VOCAB).tolist() for r in requests]
    assert [(r["prompt_len"], r["output_len"]) for r in rows] == [(r.prompt_len, r.output_len) for r in requests]
    assert [r["timestamp"] for r in rows] == [250.0, 500.0, 750.0]


class Letters(Tokenizer):
    """One letter per token; `z` cannot be encoded again."""

    def __init__(self):
        super().__init__(None)

    def decode(self, ids):
        return "".join(chr(ord("a") + i) for i in ids)

    def encode(self, text):
        return [ord(c) - ord("a") for c in text if c != "z"]


def test_vllm_export_is_text_and_counts_what_changed():
    requests = build("synthetic:num=4,prompt=fixed:20,output=uniform:1:9")
    export = workload_exports.vllm(requests, 26, Letters())
    rows = parsed(export.text)
    assert all(set(r) == {"prompt", "output_tokens"} for r in rows)
    assert [r["output_tokens"] for r in rows] == [r.output_len for r in requests]
    assert rows[0]["prompt"] == Letters().decode(requests[0].prompt_tokens(26).tolist())
    changed = sum("z" in r["prompt"] for r in rows)
    lost = {"arrival time": 4, "prompt length": changed, "token ids": changed}
    assert workload_exports.left_out(requests, export, 26) == lost and 0 < changed < 4


def hashed(requests):
    return workload_hash(requests, 26)


EXPORTS = {
    "vllm": lambda requests: workload_exports.vllm(requests, 26, Letters()),
    "sglang": lambda requests: workload_exports.sglang(requests, 26),
    "mooncake": lambda requests: workload_exports.mooncake(requests, 26),
}
SESSIONS = "synthetic:turns=2,num=4,think=0.25,rate=4,arrivals=fixed,prompt=fixed:3,output=fixed:2,seed=2"
OPTIONS = {"closed loop and think time": "loop=closed", "sampling": "temperature=0.5", "priority": "priorities=3"}


@pytest.mark.parametrize("name", EXPORTS)
@pytest.mark.parametrize("option", OPTIONS)
def test_an_export_without_a_property_has_another_hash_and_says_so(name, option):
    """Whatever no format holds: the hash is that of the workload that never had it."""
    plain, special = build(SESSIONS), build(f"{SESSIONS},{OPTIONS[option]}")
    ours, theirs = EXPORTS[name](plain), EXPORTS[name](special)
    changed = sum(a != b for a, b in zip(plain, special, strict=True))
    lost = [workload_exports.left_out(r, e, 26) for r, e in ((plain, ours), (special, theirs))]
    assert lost[1] == lost[0] | {option: changed} and changed
    assert theirs.text == ours.text and theirs.workload_hash == ours.workload_hash != hashed(special)


def test_what_a_format_holds_keeps_its_hash(files):
    """Token ids and times: SGLang's. Text that encodes to the same tokens, all at once: vLLM's."""
    sessions, burst = build(SESSIONS), build("burst:num=3,context=4,seed=6")
    assert not any("z" in row["prompt"] for row in parsed(EXPORTS["vllm"](burst).text))
    for requests, export in ((sessions, EXPORTS["sglang"](sessions)), (burst, EXPORTS["vllm"](burst))):
        assert export.workload_hash == hashed(requests) and workload_exports.left_out(requests, export, 26) == {}
    later = EXPORTS["vllm"](sessions)
    assert (
        later.workload_hash != hashed(sessions) and workload_exports.left_out(sessions, later, 26)["arrival time"] == 4
    )


@pytest.mark.parametrize("spec", [SESSIONS, "synthetic:num=5,rate=300,prompt=fixed:600", "mooncake:{}/m.jsonl"])
def test_a_mooncake_export_has_the_hash_of_what_is_read_from_it(files, spec):
    """Times in whole ms after the first request, tokens that follow from the block ids."""
    requests = build(spec.format(files))
    export = EXPORTS["mooncake"](requests)
    (files / "x.jsonl").write_text(export.text)
    again = build(f"mooncake:{files}/x.jsonl")
    assert export.workload_hash == hashed(again) and [r.arrival_s for r in export.requests] == [
        r.arrival_s for r in again
    ]
    assert workload_exports.left_out(requests, export, 26)["token ids"] == len(requests)


# ---------------------------------------------------------------------------------------------- the program


def test_the_program_and_serve_agree_on_the_hash(tmp_path):
    spec = "synthetic:num=4,arrivals=fixed,rate=20,turns=2,think=0.01,loop=closed,prompt=fixed:8,output=fixed:3"
    path = tmp_path / "w.jsonl"
    code, out, err = programs.run("workload", f"--workload={spec}", f"--out={path}", "--vocab_size=100")
    assert code == 0, err
    line = json.loads(out.splitlines()[-1])
    assert line["num_requests"] == 4 and line["workload_hash"] == workload_hash(build(spec), 100)
    code, _, err = programs.run("workload", f"--workload={spec}", f"--out={path}")
    assert code == 2 and "is there already" in err and err.count("\n") == 1
    runs = []
    for workload in (str(path), spec):
        directory = tmp_path / f"run{len(runs)}"
        code, _, err = programs.run(
            "serve", "--model=timed", f"--workload={workload}", f"--out={directory}", timed=True
        )
        assert code == 0, err
        runs += [json.loads((directory / name).read_text()) for name in ("config.json", "summary.json")]
        rows = [json.loads(row) for row in (directory / "requests.jsonl").read_text().splitlines()]
        assert sorted((r["session"], r["turn"]) for r in rows) == [("0", 0), ("0", 1), ("1", 0), ("1", 1)]
    assert {r["workload_hash"] for r in runs} == {line["workload_hash"]}
    assert runs[1]["completed"] == 4 and runs[1]["dropped"] == 0


@pytest.mark.parametrize(("name", "field"), [("mooncake", "hash_ids"), ("sglang", "prompt")])
def test_the_program_exports(tmp_path, name, field):
    path, spec = tmp_path / "x.jsonl", "burst:num=3,context=40,temperature=0.5"
    code, out, err = programs.run("workload", f"--workload={spec}", f"--out={path}", f"--format={name}")
    assert code == 0, err
    line = json.loads(out.splitlines()[-1])
    lost = {"sampling": 3} | ({"token ids": 3} if name == "mooncake" else {})
    assert line["left_out"] == lost
    assert [row for row in out.splitlines() if row.startswith("left out")] == [
        f"left out: {what}, of 3 of 3 requests" for what in lost
    ]
    served = build(f"mooncake:{path}" if name == "mooncake" else "burst:num=3,context=40")
    assert line["workload_hash"] == workload_hash(served, 32000)
    assert [len(r[field]) for r in parsed(path.read_text())] == [1 if name == "mooncake" else 40] * 3


def test_help_imports_nothing_heavy():
    code = (
        "import runpy, sys; sys.argv = ['x', '--help']\n"
        "try:\n    runpy.run_module('experiments.workload', run_name='__main__', alter_sys=True)\n"
        "finally:\n    print('HEAVY', sorted({'jax', 'tokenizers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=programs.ROOT, capture_output=True, text=True, timeout=60)
    assert "--vocab_size" in done.stdout and "--[no]overwrite" in done.stdout and "HEAVY []" in done.stdout


BAD = {
    "--out=x": "--workload is missing",
    "--workload=burst": "--out is missing",
    "--workload=burst --out=x --vocab_size=0": "vocab_size",
    "--workload=burst --out=x --format=csv": "format",
    "--workload=burst --out=nowhere/x": "nowhere/x cannot be written: No such file or directory",
    "--workload=burst:num=1 --out=x --format=vllm": "--format=vllm holds text: give --tokenizer",
    "--workload=burst:num=1 --out=x --format=vllm --tokenizer=no": "--tokenizer=no needs tokenizer.json",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_flags_are_one_line(arguments, tmp_path):
    code, out, err = programs.run("workload", *arguments.split(), cwd=tmp_path)
    assert (code, out) == (2, "") and BAD[arguments] in err and err.count("\n") == 1
    assert not (tmp_path / "x").exists()

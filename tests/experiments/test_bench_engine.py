"""Protects the bench: one definition of prefill and decode for both sides, paired ratios, and life without the peer."""

import json
import sys
from pathlib import Path

import pytest

from experiments.measure import our_side, timing
from tests.experiments import programs
from tests.experiments.timed_engine import timed_engine

# Speaks the worker's protocol. Every prompt token takes 0.1 s, every later token 0.5 s; token ids are all 0.
FAKE_PEER = """#!{python}
import json, sys
print(json.dumps({{"versions": {{"fake": "1"}}, "argv": sys.argv[2:]}}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    n, first = job["new_tokens"], 0.1 * len(job["prompts"][0])
    times = [first + 0.5 * i for i in range(n)]
    print(json.dumps({{"times": times, "tokens": [[0] * n for _ in job["prompts"]]}}), flush=True)
"""


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_definition_by_hand():
    t = timing([1.0, 2.0, 2.5, 3.0], [1, 2, 4, 6], [[1, 2, 3], [4, 5, 6]])
    assert t.prefill_s == 2.0  # the second sequence's first token
    assert t.decode_tokens_s == (6 - 2) / (3.0 - 2.0)


def test_our_side_on_virtual_time():
    engine = timed_engine(token_s=0.01, decode_s=0.25)
    t = our_side(engine)([[1] * 50, [2] * 50], 5)
    assert t.prefill_s == pytest.approx(1.0)  # both prompts in one step
    assert t.decode_tokens_s == pytest.approx(2 / 0.25)
    assert t.tokens == [[0] * 5, [0] * 5]


def test_prompts_prefilled_in_several_steps_count_as_prefill_until_the_last():
    engine = timed_engine(token_s=0.01, decode_s=0.25, max_batched_tokens=50)
    t = our_side(engine)([[1] * 50, [2] * 50], 5)
    assert t.prefill_s == pytest.approx(1.0) and t.decode_tokens_s == pytest.approx(2 / 0.25)


def bench(tmp_path, peer_python, *more):
    code, stdout, stderr = programs.run(
        "bench_engine", f"--model={tmp_path}", "--prompts=10,20", "--batches=1,2", "--pairs=2", "--new_tokens=4",
        f"--peer_python={peer_python}", f"--out={tmp_path}/out", *more, timed=True,
    )  # fmt: skip
    return code, stdout, stderr


def test_ratios_against_a_peer_of_known_speed(tmp_path):
    code, stdout, stderr = bench(tmp_path, executable(tmp_path / "peer", FAKE_PEER.format(python=sys.executable)))
    assert code == 0, stderr
    line = json.loads(stdout.splitlines()[-1])
    assert [(c["prompt"], c["batch"]) for c in line["cells"]] == [(10, 1), (10, 2), (20, 1), (20, 2)]
    for cell in line["cells"]:
        assert cell["transformers_prefill_s"] == pytest.approx(0.1 * cell["prompt"])
        assert cell["transformers_decode_tokens_s"] == pytest.approx(cell["batch"] / 0.5)
        low, high = map(float, cell["decode_ratio_range"].split("-"))
        assert low - 0.01 <= cell["decode_ratio"] <= high + 0.01
        assert cell["decode_ratio"] > 1 and cell["prefill_ratio"] > 1 and cell["same_tokens"] == 1.0
    geomean = (line["cells"][0]["decode_ratio"] * line["cells"][1]["decode_ratio"]) ** 0.5
    assert line["decode_ratio_geomean_10"] == pytest.approx(geomean, rel=1e-3)
    stored = json.loads((tmp_path / "out/bench_engine.json").read_text())
    assert len(stored["cells"][0]["runs"]["folio"]) == 2 and stored["peer"]["argv"] == [str(tmp_path), "float32"]


def test_without_transformers_our_numbers_alone_and_how_to_install_it(tmp_path):
    bare = executable(tmp_path / "bare", f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    code, stdout, stderr = bench(tmp_path, bare)
    assert code == 0, stderr
    assert "torch is not installed" in stdout and "pip install 'folio[peer]'" in stdout
    line = json.loads(stdout.splitlines()[-1])
    assert all(c["folio_decode_tokens_s"] > 0 and "decode_ratio" not in c for c in line["cells"])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--batches=1,x", "--batches must be integers > 0"),
        ("--prompts=0", "--prompts must be integers > 0"),
        ("--new_tokens=1", "new_tokens"),
        ("--pairs=0", "pairs"),
    ],
)
def test_bad_flags(tmp_path, flag, message):
    code, _, stderr = programs.run("bench_engine", f"--model={tmp_path}", f"--out={tmp_path}/out", flag, timed=True)
    assert code == 2 and message in stderr and stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()

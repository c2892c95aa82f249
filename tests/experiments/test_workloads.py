"""Protects reproducibility of workloads, their statistics against closed forms, and errors that name the line."""

import math
import os
from pathlib import Path

import numpy as np
import pytest

from engine.errors import WorkloadError
from experiments.workloads import azure as workload_azure
from experiments.workloads import build, mean_rate
from experiments.workloads.synthetic import lognormal_parameters

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ROWS = (
    "2023-11-16 18:15:46.6805900,374,44\n"
    "2023-11-16 18:15:50.9951690,396,109\n"
    "2023-11-16 18:15:51.2224670,879,55"  # the real file's last line has no newline either
)
REAL_TRACE = Path(__file__).parents[3] / "shared/traces/azure-2023/AzureLLMInferenceTrace_conv.csv"


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(HEADER + ROWS)
    return path


def columns(spec):
    requests = build(spec)
    return tuple(np.array([getattr(r, n) for r in requests]) for n in ("arrival_s", "prompt_len", "output_len"))


SPECS = (
    "synthetic:rate=2,arrivals=gamma,cv=2,prompt=uniform:16:512,output=lognormal:64:100",
    "synthetic:prompt=fixed:3",
    "azure-like:rate=1.5,scale_len=0.25",
)


@pytest.mark.parametrize("spec", SPECS)
def test_same_spec_same_requests_and_a_smaller_num_is_a_prefix(spec):
    long, again, short = build(f"{spec},num=40"), build(f"{spec},num=40"), build(f"{spec},num=15")
    assert long == again and long[:15] == short
    assert len({r.token_seed for r in long}) == 40
    assert [r.id for r in long] == [str(i) for i in range(40)]


@pytest.mark.parametrize("spec", SPECS)
def test_start_skips_and_rebases(spec):
    whole, tail = build(f"{spec},num=20"), build(f"{spec},num=5,start=15")
    assert tail[0].arrival_s == 0.0
    for a, b in zip(whole[15:], tail, strict=True):
        assert (a.id, a.prompt_len, a.output_len, a.token_seed) == (b.id, b.prompt_len, b.output_len, b.token_seed)
        assert b.arrival_s == pytest.approx(a.arrival_s - whole[15].arrival_s)


def test_seed_changes_everything_and_options_do_not_disturb_each_other():
    a, b = columns("azure-like:num=50,seed=1"), columns("azure-like:num=50,seed=2")
    assert all((x != y).any() for x, y in zip(a, b, strict=True))
    c, d = columns("synthetic:num=50"), columns("synthetic:num=50,prompt=uniform:1:9")
    assert (c[0] == d[0]).all() and (c[2] == d[2]).all() and (c[1] != d[1]).any()


def test_prompt_tokens_are_seeded_and_in_range():
    a, b = build("synthetic:num=2,prompt=fixed:500")
    tokens = a.prompt_tokens(10)
    assert tokens.dtype == np.int32 and tokens.shape == (500,) and set(tokens) == set(range(10))
    assert (tokens == a.prompt_tokens(10)).all() and (tokens != b.prompt_tokens(10)).any()


def test_arrival_processes():
    fixed, _, _ = columns("synthetic:rate=4,arrivals=fixed,num=3")
    assert fixed.tolist() == [0.25, 0.5, 0.75]
    for spec, cv in (("arrivals=poisson", 1.0), ("arrivals=gamma,cv=0.5", 0.5), ("arrivals=gamma,cv=2", 2.0)):
        gaps = np.diff(columns(f"synthetic:rate=4,num=20000,{spec}")[0], prepend=0.0)
        assert gaps.mean() == pytest.approx(0.25, rel=0.05)
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.08)


def test_lengths():
    _, prompt, output = columns("synthetic:num=20000,prompt=uniform:5:9,output=lognormal:200:400")
    assert set(prompt) == {5, 6, 7, 8, 9} and prompt.mean() == pytest.approx(7, rel=0.01)
    assert output.mean() == pytest.approx(200, rel=0.03) and np.quantile(output, 0.9) == pytest.approx(400, rel=0.03)


def test_lognormal_parameters_by_hand():
    mu, sigma = lognormal_parameters(math.exp(0.5), math.exp(1.2815515655446004))
    assert (mu, sigma) == (pytest.approx(0, abs=1e-9), pytest.approx(1))
    for mean, p90 in ((100, 100), (100, 90), (100, 230)):
        with pytest.raises(WorkloadError, match="no log-normal"):
            lognormal_parameters(mean, p90)


def test_common_options(trace):
    arrival, prompt, output = columns(f"azure:{trace},scale_len=0.1,rate_scale=2,max_prompt=40,max_output=5")
    assert arrival == pytest.approx([0.0, 4.314579 / 2, 4.541877 / 2], abs=1e-7)
    assert prompt.tolist() == [37, 40, 40] and output.tolist() == [4, 5, 5]
    assert columns(f"azure:{trace},scale_len=0.001")[2].tolist() == [1, 1, 1]  # at least one token stays
    _, prompt, output = columns(f"azure:{trace},scale_len=0.1,scale_output=0.5")
    assert prompt.tolist() == [37, 40, 88] and output.tolist() == [22, 54, 28]
    stretched, _, _ = columns(f"azure:{trace},time_scale=0.5")
    assert stretched == pytest.approx(arrival)


def test_azure_file(trace):
    arrival, prompt, output = columns(f"azure:{trace}")
    assert arrival == pytest.approx([0.0, 4.314579, 4.541877], abs=1e-7)
    assert prompt.tolist() == [374, 396, 879] and output.tolist() == [44, 109, 55]
    tail = build(f"azure:{trace},start=1,num=1")
    assert [(r.id, r.arrival_s, r.prompt_len) for r in tail] == [("1", 0.0, 396)]


BAD_ROWS = {
    "2023-11-16 18:15:46.68,374": ":3: expected 3 fields",
    "2023-11-16 18:15:46.68,374,44,5": ":3: expected 3 fields",
    "": ":3: expected 3 fields",
    "yesterday,374,44": ":3: field TIMESTAMP: expected YYYY-MM-DD",
    "2023-13-16 18:15:46.68,374,44": ":3: field TIMESTAMP: expected YYYY-MM-DD",
    "2023-11-16 18:15:46.67,374,44": ":3: field TIMESTAMP: expected a time not before",
    "2023-11-16 18:15:46.69,37.5,44": ":3: field ContextTokens: expected an integer >= 1, got '37.5'",
    "2023-11-16 18:15:46.69,0,44": ":3: field ContextTokens: expected an integer >= 1, got '0'",
    "2023-11-16 18:15:46.69,374,-4": ":3: field GeneratedTokens: expected an integer >= 1, got '-4'",
}


@pytest.mark.parametrize("row", BAD_ROWS)
def test_malformed_row_names_file_line_and_field(tmp_path, row):
    path = tmp_path / "trace.csv"
    path.write_text(HEADER + f"2023-11-16 18:15:46.6805900,374,44\n{row}\n2023-11-16 18:15:50.9951690,396,109\n")
    with pytest.raises(WorkloadError) as e:
        build(f"azure:{path}")
    assert f"{path}{BAD_ROWS[row]}" in str(e.value) and "\n" not in str(e.value)


def test_unreadable_traces(tmp_path):
    with pytest.raises(WorkloadError, match=r"none\.csv: cannot read"):
        build(f"azure:{tmp_path}/none.csv")
    (tmp_path / "other.csv").write_text("a,b,c\n1,2,3\n")
    with pytest.raises(WorkloadError, match=r"other\.csv:1: expected the header 'TIMESTAMP,"):
        build(f"azure:{tmp_path}/other.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WorkloadError, match=r"binary\.csv: cannot read"):
        build(f"azure:{tmp_path}/binary.csv")


BAD_SPECS = {
    "azur:x": "unknown name 'azur'; known: azure, azure-like, bailian, burst, frozen, mooncake, sharegpt, ",
    "azure": "needs a file",
    "azure-like:trace.csv": "reads no file",
    "synthetic:rates=2": "unknown option rates; known: start, num",
    "synthetic:rate=0": "rate must be a number > 0, got '0'",
    "synthetic:rate=nan": "rate must be a number > 0",
    "synthetic:rate=2,rate=3": "rate is given twice",
    "synthetic:num=-1": "num must be an integer >= 1, got '-1'",
    "synthetic:num": "reads no file, got 'num'",
    "synthetic:rate=1,num": "expected option=value, got 'num'",
    "synthetic:arrivals=gamma": "needs cv=",
    "synthetic:cv=2": "cv belongs to arrivals=gamma",
    "synthetic:arrivals=uniform": "arrivals must be one of poisson, gamma, fixed",
    "synthetic:prompt=128": "prompt must be fixed:N",
    "synthetic:prompt=fixed:0": "token counts are >= 1",
    "synthetic:prompt=uniform:9:5": "LOW is above HIGH",
    "synthetic:output=lognormal:9:5": "no log-normal has mean 9 and P90 5",
    "synthetic:rate_scale=2,time_scale=2": "give one of them",
}


@pytest.mark.parametrize("spec", BAD_SPECS)
def test_bad_spec_is_one_clear_line(spec):
    with pytest.raises(WorkloadError) as e:
        build(spec)
    assert BAD_SPECS[spec] in str(e.value) and "\n" not in str(e.value)


def test_a_window_past_the_end_is_refused(trace):
    with pytest.raises(WorkloadError, match="num=3 from start=1, but only 2"):
        build(f"azure:{trace},num=3,start=1")
    with pytest.raises(WorkloadError, match="no request is left"):
        build(f"azure:{trace},start=9")


def test_mean_rate(trace):
    requests = build(f"azure:{trace}")
    assert mean_rate(requests) == pytest.approx(2 / 4.541877)
    assert mean_rate(build(f"azure:{trace},rate_scale={8 / mean_rate(requests)}")) == pytest.approx(8.0)
    with pytest.raises(WorkloadError, match="all 1 requests arrive at once"):
        mean_rate(requests[:1])


@pytest.mark.skipif(not os.path.exists(REAL_TRACE), reason="the Azure 2023 trace is not beside the checkout")
def test_azure_like_has_the_hours_quantiles():
    real, like = columns(f"azure:{REAL_TRACE}"), columns("azure-like:num=20000")
    assert len(real[0]) == 19366
    assert mean_rate(build(f"azure:{REAL_TRACE}")) == pytest.approx(workload_azure.MEAN_RATE, rel=0.01)
    assert 19999 / (like[0][-1] - like[0][0]) == pytest.approx(workload_azure.MEAN_RATE, rel=0.03)
    for p in (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98):
        assert np.quantile(np.diff(like[0]), p) == pytest.approx(np.quantile(np.diff(real[0]), p), rel=0.15)
        assert np.quantile(like[1], p) == pytest.approx(np.quantile(real[1], p), rel=0.1)
        assert np.quantile(like[2], p) == pytest.approx(np.quantile(real[2], p), rel=0.1)
    for low, high in ((0, 450), (900, 1200), (3900, 10**6)):  # the dependence of output on context is kept
        medians = [np.median(out[(ctx >= low) & (ctx < high)]) for _, ctx, out in (real, like)]
        assert medians[1] == pytest.approx(medians[0], rel=0.12)


def test_priorities_are_drawn_alike_whatever_the_number_of_requests():
    """All levels occur; a longer workload starts as a shorter one; the default is one level."""
    drawn = [[r.priority for r in build(f"burst:num={n},context=5,priorities=3")] for n in (20, 40)]
    assert drawn[1][:20] == drawn[0] and {*drawn[1]} == {0, 1, 2}
    assert {r.priority for r in build("burst:num=5,context=5")} == {0}

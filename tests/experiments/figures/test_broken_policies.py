"""Figures whose verdicts nothing turns red are worth nothing: LayerKV, wrong in one way each, and what they say of it.

Settings of the papers' policies are looked up by name in `setting.POLICIES`: a policy from outside the tree takes the
place of LayerKV there, and a figure's points and verdicts are its own. Few points, one seed, few requests.
"""

import dataclasses
import re
from functools import lru_cache
from pathlib import Path

import pytest

from experiments.figures.layerkv import fig6, setting
from experiments.points import run_point
from experiments.seeded import VALUES
from tests.experiments.figures import example_figure

BROKEN = Path(__file__).parent / "broken_policies.py"
INVERTED, NEVER_HOME = f"{BROKEN}:InvertedRule", f"{BROKEN}:NeverHome"
TTFT, SPEED, VIOLATIONS = "TTFT, times lower", "tok/s over vLLM's", "violations beyond vLLM's"

run = lru_cache(None)(run_point)  # the baseline's points are the same for all


def missed(monkeypatch, figure, policy: str, num: int, wanted=lambda key: True) -> set[str]:
    """The verdicts that this LayerKV does not pass, on the points `wanted` with `num` requests each."""
    monkeypatch.setitem(setting.POLICIES, setting.LAYERKV, f"policy={policy}")
    cells = {}
    for key, point in figure.points("sim").items():
        if wanted(key):
            few = dataclasses.replace(point, workload=re.sub(r"num=\d+", f"num={num}", point.workload))
            summary = run(few)
            cells[key] = {name: [summary.get(name)] for name in VALUES}
    return {v.name for v in figure.evaluate(cells, "sim").verdicts if v.passed is False}


@pytest.mark.parametrize(
    "policy, red",
    [
        ("layerkv", set()),
        ("vllm_v0", {TTFT}),
        (INVERTED, {TTFT, SPEED, VIOLATIONS}),
        (NEVER_HOME, {SPEED, VIOLATIONS}),
    ],
)
def test_what_is_wrong_is_red(monkeypatch, policy, red):
    monkeypatch.setattr(example_figure, "RATES", (1.5,))
    assert missed(monkeypatch, example_figure.Queue(), policy, 28) == red


@pytest.mark.parametrize("policy", [INVERTED, NEVER_HOME])
def test_figure_6_sees_it(monkeypatch, policy):
    """At one of its contexts, so few requests that gains are small; tokens/s must not fall."""
    monkeypatch.setattr(fig6, "CONTEXTS", {setting.LLAMA2_7B: (2048,)})
    monkeypatch.setattr(fig6, "RATES", {setting.LLAMA2_7B: 1.5})
    found = {name: missed(monkeypatch, fig6.Fig6(), name, 28) for name in ("layerkv", policy)}
    assert found[policy] - found["layerkv"] == {SPEED}

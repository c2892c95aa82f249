"""LayerKV's figures that need no sweep: evaluated and drawn. What the research note asks for, and what is missed is
explained."""

import pytest

from experiments import figures
from experiments.figures.base import PREDICTED

# How many of their verdicts hold, from the first on: the others are about our engine, or stricter than the paper.
HOLD = {"fig2": 3, "fig4": 3, "fig5": 3, "tab1": 6}


@pytest.mark.parametrize("name", [*HOLD, "eq34"])
def test_drawn(name, tmp_path):
    figure = figures.find(f"layerkv/{name}")
    assert not figure.points("sim")
    result = figure.evaluate({}, "sim")
    assert all(v.passed for v in result.verdicts[: HOLD.get(name, 0)])
    assert all(v.why for v in result.verdicts if not v.passed)
    assert result.table.csv() == figure.evaluate({}, "sim").table.csv()
    figure.draw(result, tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png", f"{name}.pdf"}


def test_equations_ask_for_nothing_at_the_full_link():
    """At the full link, which is the claim of the research note; on a slow one they do."""
    found = {v.name: v for v in figures.find("layerkv/eq34").evaluate({}, "sim").verdicts}
    assert found["x at the full link"].passed and found["x at the full link"].kind == PREDICTED
    assert found["places where the equations ask for anything"].passed

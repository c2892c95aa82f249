"""Verdicts of LayerKV's figures 4 and 5 and of Eqs 3 and 4, on numbers made by hand: what should fail fails."""

import pytest

from experiments.figures.base import Table, Verdict
from experiments.figures.layerkv import eq34, fig4, fig5


def by_name(found: list[Verdict]) -> dict[str, bool | None]:
    return {v.name: v.passed for v in found}


def copies(**changed: float) -> Table:
    """Figure 4: copies end half a block behind, with x = 0 seven blocks on the slow link; `formula_512_1=2.0` changes a
    cell."""
    rows = []
    for prompt in fig4.PROMPTS:
        for share in fig4.SHARES:
            for rule in (fig4.FORMULA, fig4.NONE, fig4.ALL):
                late = 7.0 if rule == fig4.NONE and share == fig4.SLOW else 0.5
                late = changed.get(f"{rule}_{prompt}_{share:g}".replace(".", "p"), late)
                rows.append([prompt, share, rule, 0, 100.0, changed.get("longer", 1.0), 90.0, 1.0, late])
    return Table(fig4.HEADER, rows)


def test_figure_4():
    assert all(by_name(fig4.verdicts(copies())).values())
    hidden, exceeds, longer = (v.name for v in fig4.verdicts(copies()))
    assert by_name(fig4.verdicts(copies(formula_2048_0p05=1.2))) == {hidden: False, exceeds: True, longer: True}
    assert by_name(fig4.verdicts(copies(none_512_0p05=0.9))) == {hidden: True, exceeds: False, longer: True}
    assert by_name(fig4.verdicts(copies(longer=1.06))) == {hidden: True, exceeds: True, longer: False}


def steps(bound: float, **functions) -> Table:
    """Figure 5: milliseconds of a step by name, as functions of the streamed tokens."""
    link = 16 * 16_384 / 25e9 * 1e3  # ms a token
    plain = {
        "none": lambda n: 60.0,
        "interleave": lambda n: 60.0 + max(0.0, n - bound) * link,
        "prefix": lambda n: 60.0 + max(0.0, n - bound / 2) * link,
        "suffix": lambda n: 60.0 + max(0.0, n - bound / 2) * link,
    }
    plain |= {f"engine_{name}": plain[name] for name in fig5.PATTERNS}
    columns = (plain | functions).values()
    return Table(fig5.HEADER, [[n, *(of(n) for of in columns)] for n in fig5.TOKENS])


def test_figure_5():
    bound = 6000.0
    names = [v.name for v in fig5.verdicts(steps(bound), bound)]
    assert by_name(fig5.verdicts(steps(bound), bound)) == dict.fromkeys(names, True)
    best, equal, slope, engine_best, engine_equal = names

    def missed(**changed) -> set[str]:
        return {v.name for v in fig5.verdicts(steps(bound, **changed), bound) if not v.passed}

    assert missed(prefix=lambda n: 60.0) == {best}
    assert missed(engine_suffix=lambda n: 60.0) == {engine_best}
    assert missed(none=lambda n: 50.0) == {equal, engine_equal}
    assert missed(interleave=lambda n: 60.0 if n < bound else 61.0) == {slope}
    assert missed(engine_interleave=lambda n: 64.0) == {engine_best, engine_equal}


def layers(x=0, events=0, none_behind=1, link=1.0) -> Table:
    fixed = [["a", 32, 1.0, 512, 0, 0, 1], ["a", 32, 0.05, 512, 18, 18, 19]]
    return Table(eq34.HEADER, [*fixed, ["a", 32, link, 2048, x, events, none_behind]])


@pytest.mark.parametrize(
    "table, expected",
    [
        (layers(), [True, True, True, True]),
        (layers(4, 5, 5, 0.1), [True, True, True, True]),
        (layers(4, 6, 5, 0.1), [False, True, True, True]),
        (layers(4, 4, 6, 0.1), [True, False, True, True]),
        (layers(1, 1, 1), [True, True, False, True]),
    ],
)
def test_equations_3_and_4(table, expected):
    assert [v.passed for v in eq34.verdicts(table)] == expected


def test_equations_that_never_ask_for_anything_are_not_tested():
    table = Table(eq34.HEADER, [["a", 32, 1.0, 512, 0, 0, 1]])
    assert [v.passed for v in eq34.verdicts(table)] == [True, True, True, False]

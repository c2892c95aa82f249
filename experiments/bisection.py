"""The highest arrival rate that passes, by bisection over a geometric grid of rates. Pure: no run is made here.

A search is a generator: it yields the grid index that it wants to know about and is sent whether that rate passes. Many
searches go on together (`drive`), so that what they want in one round can be run in parallel. Rates are a grid, so that
searches that look at the same settings under other objectives meet at the same runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

STEP = 1.05  # between neighbouring rates: what a capacity is known to
LOW, HIGH = -60, 60  # the rates that are tried: 1/19 to 19 times the base
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Bracket:
    """Neighbours on the grid: one passes, the next does not. None: the lowest rate fails, or the highest passes."""

    passes: int | None
    fails: int | None


Search = Generator[int, bool, Bracket]


def rate_at(base: float, index: int) -> float:
    """The rate of a grid index, to five digits, so that a text says it exactly."""
    return float(f"{base * STEP**index:.5g}")


def search(start: int = 0, low: int = LOW, high: int = HIGH) -> Search:
    """Goes from `start` in steps that double until one rate passes and another fails, then halves what lies between.

    Of a curve that falls the bracket is the only one there is. Otherwise it is one of several: `crossings` tells.
    """
    start, step = min(max(start, low), high), 1
    passes: int | None = None
    fails: int | None = None
    index = start
    while True:
        if (yield index):
            passes = index
            if index == high:
                return Bracket(high, None)
        else:
            fails = index
            if index == low:
                return Bracket(None, low)
        if passes is not None and fails is not None:
            break
        index = min(index + step, high) if fails is None else max(index - step, low)
        step *= 2
    while fails - passes > 1:
        middle = (passes + fails) // 2
        if (yield middle):
            passes = middle
        else:
            fails = middle
    return Bracket(passes, fails)


def drive(
    searches: Mapping[Key, Search], passes: Callable[[Sequence[tuple[Key, int]]], Sequence[bool]]
) -> dict[Key, Bracket]:
    """Runs all searches to their end, round by round.

    Args:
      passes: for (search, index) that are wanted in this round, whether they pass.
    """
    found: dict[Key, Bracket] = {}
    wanted = {key: next(search) for key, search in searches.items()}
    while wanted:
        keys = list(wanted)
        answers = passes([(key, wanted[key]) for key in keys])
        for key, answer in zip(keys, answers, strict=True):
            try:
                wanted[key] = searches[key].send(answer)
            except StopIteration as end:
                found[key] = end.value
                del wanted[key]
    return found


def crossings(outcomes: Mapping[int, bool]) -> list[tuple[int, int]]:
    """Where more load did better: pairs of neighbours among the indices tried of which the lower rate fails and the
    higher one passes. None for a curve that falls."""
    tried = sorted(outcomes)
    return [(a, b) for a, b in itertools.pairwise(tried) if not outcomes[a] and outcomes[b]]

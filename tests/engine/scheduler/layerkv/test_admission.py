"""Who may be prefilled, by hand: an objective of 3 s to the first token, decode steps of 0.1 s, prefills of 1 ms per
token; it is 10 s."""

from types import SimpleNamespace

import numpy as np
import pytest

from engine.config import LayerKVConfig
from engine.scheduler.layerkv.admission import AdmissionRule

NOW, STEP = 10.0, 0.1
SLACK = np.array([0.5, 2.0, -1.0])  # Eq 1 of those that run: the last one has lost its objective already


class Waiting:
    """A queue of (arrival, tokens)."""

    def __init__(self, *prompts, produced=()):
        self._requests = [SimpleNamespace(arrival=a, num_tokens=n, token_times=list(produced)) for a, n in prompts]

    @property
    def head(self):
        return self._requests[0]

    def first(self, count):
        return self._requests[:count]


def rule(late=(False, False, False), **knobs):
    return AdmissionRule(LayerKVConfig(**knobs), NOW, STEP, SLACK, np.array(late), lambda tokens: tokens / 1000)


@pytest.mark.parametrize(
    "arrival, tokens, allowed",
    [
        (9.0, 500, True),  # nobody loses
        (9.0, 600, False),  # the first would, and this one has until 12 s: it can wait
        (8.31, 600, False),  # 0.71 s to spare: a step, and another prefill before it
        (8.29, 600, True),  # less: one for one
        (2.0, 600, True),  # late anyway, it costs no more than one
        (9.0, 2100, False),  # late, too, but two would lose by it
    ],
)
def test_objectives_of_both_kinds(arrival, tokens, allowed):
    assert rule().allows(Waiting((arrival, tokens))) is allowed


def test_those_behind_count_too():
    """The head has time; the one behind it, ready 1.2 s from now, is due in 1.3 s. Two behind it are worth two."""
    assert rule().allows(Waiting((9.0, 600), (8.3, 600)))
    assert not rule().allows(Waiting((9.0, 2100), (9.0, 100)))
    assert rule().allows(
        Waiting((10.0, 2100), (9.3, 100), (9.4, 100))
    )  # due 2.3 and 2.4 s from now, ready after 2.2, 2.3


def test_who_was_late_has_nothing_to_lose():
    """Without the first, 2 s are free; without both of them, there is no limit."""
    first = rule([True, False, False])
    assert first.allows(Waiting((9.0, 600))) and not rule().allows(Waiting((9.0, 600)))
    assert first.allows(Waiting((9.9, 2000)))
    assert rule([True, True, False]).allows(Waiting((9.0, 10**9)))


def test_prompts_add_up():
    """After 0.3 s for the first, 0.2 s are left."""
    found = rule()
    assert found.allows(Waiting((9.9, 300)))
    found.admitted(300)
    assert found.allows(Waiting((9.9, 200))) and not found.allows(Waiting((9.9, 300)))


def test_what_was_broken_already_does_not_count_twice():
    """The first prompt costs the first its objective; a second one up to 2 s costs nobody anything more."""
    found = rule()
    assert found.allows(Waiting((7.0, 600)))
    found.admitted(600)
    assert found.allows(Waiting((7.0, 1400))) and found.allows(Waiting((7.0, 1500)))  # the last one the second


def test_a_preempted_request_is_held_to_tpot_alone():
    """It has its first token: no objective of its own is at stake."""
    assert not rule().allows(Waiting((1.0, 600), produced=[3.0])) and rule().allows(Waiting((1.0, 500), produced=[3.0]))


@pytest.mark.parametrize("lost, allowed", [("ignore", True), ("block", False)])
def test_as_the_paper_writes_it(lost, allowed):
    """TPOT alone: a prompt waits however late it is."""
    found = rule(weigh_ttft=False, lost=lost)
    assert found.allows(Waiting((0.0, 500))) is allowed and not found.allows(Waiting((0.0, 600)))

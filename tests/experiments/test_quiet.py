"""Whether others disturbed a measurement, on clocks that tests set."""

import pytest

from experiments import quiet
from experiments.quiet import Others


@pytest.fixture
def clocks(monkeypatch):
    """[wall, own, busy] seconds, which stand still until a test moves them; sleeping moves the wall clock."""
    now = [100.0, 10.0, 50.0]
    monkeypatch.setattr(quiet, "_now", lambda: tuple(now))
    monkeypatch.setattr(quiet.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(quiet.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def test_share_is_what_was_busy_and_not_ours(clocks):
    """Two seconds on two CPUs: ours took 1.5 of 4, others 1; since then nothing, and never less than nothing."""
    others = Others(0.1, 0.0)
    clocks[:] = [102.0, 11.5, 52.5]
    assert others.share() == pytest.approx(0.25)
    assert others.share() == 0
    clocks[:] = [103.0, 12.5, 53.4]  # ticks are coarse
    assert others.share() == 0


def test_disturbed_only_while_there_is_patience(clocks):
    others = Others(0.1, 3.0)
    clocks[:] = [102.0, 11.0, 53.0]  # others took 2 of 4
    assert others.disturb() and others.patience == pytest.approx(3.0 - 2.0 - 0.5), "the measurement and one look"
    clocks[:] = [clocks[0] + 1.0, clocks[1], clocks[2] + 0.1]
    assert not others.disturb(), "5% are allowed"
    others.patience = 0.0
    clocks[:] = [clocks[0] + 1.0, clocks[1], clocks[2] + 2.0]
    assert not others.disturb()


def test_waiting_ends_with_quiet_or_patience(clocks, monkeypatch):
    """Others work for 1.2 s more: the third look of half a second sees 0.2 of 1, the fourth nothing."""
    start, others = clocks[0], Others(0.1, 60.0)

    def sleep(seconds: float) -> None:
        worked = min(seconds, max(0.0, 1.2 - (clocks[0] - start)))
        clocks[0], clocks[2] = clocks[0] + seconds, clocks[2] + worked

    monkeypatch.setattr(quiet.time, "sleep", sleep)
    others.wait()
    assert clocks[0] - start == pytest.approx(2.0) and others.patience == pytest.approx(58.0)
    impatient = Others(0.1, 0.5)
    monkeypatch.setattr(
        quiet.time, "sleep", lambda s: clocks.__setitem__(slice(None), [clocks[0] + s, 0, clocks[2] + s])
    )
    impatient.wait()
    assert impatient.patience == 0


def test_this_machine_has_clocks():
    """Real ones: they only go forward, and what this process burns is not others'."""
    wall, own, busy = quiet._now()
    while quiet._now()[1] < own + 0.05:
        sum(range(1000))
    later = quiet._now()
    assert later[0] > wall and later[1] >= own + 0.05 and later[2] >= busy

"""Idle time of the device is what it is: a host that is slow shows, at any depth, whether it sleeps or computes."""

import threading
import time

import pytest

from engine.clock import WallClock
from engine.executor.step_watch import StepWatch
from engine.request import SamplingParams
from experiments.measure import idle_share
from tests.engine.tiny import NARROW, prompts, tiny_engine

PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)


class Result:
    """Stands in for a step's output array: there when told so, or failed."""

    def __init__(self, fails=False):
        self.fails, self.there = fails, threading.Event()

    def block_until_ready(self):
        assert self.there.wait(30)
        if self.fails:
            raise RuntimeError("the program failed")


def seen(finish):
    """Waits for a stamp."""
    while finish.time == float("inf"):
        time.sleep(1e-3)
    return finish.time


def test_ends_are_stamped_when_they_happen_in_order_and_failures_too():
    """The first is stamped while the second is still running, long before anybody asks."""
    clock, results = WallClock(), [Result(fails=True), Result()]
    watch = StepWatch(clock)
    first, second = (watch.watch(r) for r in results)
    times = [clock.now()]
    for result, finish in zip(results, (first, second), strict=True):
        result.there.set()
        seen(finish)
        times.append(clock.now())
        assert finish is second or second.time == float("inf")
    assert times[0] <= first.time <= times[1] <= second.time <= times[2]


def test_the_thread_ends_with_its_watch():
    """Engines come and go in one process."""
    before = set(threading.enumerate())
    watch = StepWatch(WallClock())
    (thread,) = set(threading.enumerate()) - before
    del watch
    thread.join(30)
    assert not thread.is_alive()


def spin(seconds):
    """Computes in Python, as a slow policy does."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def served(engine, host, seconds):
    """Idle share and seconds per step of a decode whose every plan takes `seconds` more of the host."""
    plan = type(engine.policy).plan
    engine.policy.plan = lambda now: (host(seconds), plan(engine.policy, now))[1]
    engine.step_log.clear()
    engine.generate(prompts([8, 8]), PARAMS)
    steps = [s for s in engine.step_log if s.num_decode == 2]
    return idle_share(steps), (steps[-1].end - steps[0].end) / (len(steps) - 1)


@pytest.mark.parametrize("host", [time.sleep, spin])
@pytest.mark.parametrize("async_depth", [0, 1])
def test_a_slow_host_shows_as_idle_time_of_the_device(async_depth, host):
    """Work of the host that is six steps long leaves the device idle for most of the time, at depth 1 as well: there
    only one step of it is hidden."""
    engine = tiny_engine(NARROW, async_depth=async_depth, poison=False, debug_checks=False, capture_logits=False)
    served(engine, host, 0.0)  # compiles
    quick, step = served(engine, host, 0.0)
    slow, _ = served(engine, host, max(0.03, 6 * step))  # and longer than the interpreter's switch interval
    assert 0 <= quick < slow and slow > 0.5
    for a, b in zip(engine.step_log, list(engine.step_log)[1:], strict=False):
        assert a.device_start <= a.device_end <= b.device_start and a.device_end <= a.end

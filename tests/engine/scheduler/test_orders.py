"""Orders of the queue and victims, by hand under every policy; and the queue itself."""

import pytest

from engine.errors import ConfigError, RequestError
from engine.request import Request, SamplingParams
from engine.scheduler.queue import SLACK, RequestQueue
from tests.engine.scheduler.trace import traced

POLICIES = ["vllm_v0", "vllm_v1", "chunked"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "order, expected",
    [
        ("fcfs", ["A+30", "A", "B+20", "B", "C+10", "C", "D+10"]),
        ("sjf", ["C+10", "C", "D+10", "B+20", "B", "A+30", "A"]),  # C and D are equal: C came first
        ("priority", ["B+20", "B", "C+10", "C", "A+30", "A", "D+10"]),  # B and C are equal: B came first
    ],
)
def test_whose_turn_it_is(policy, order, expected):
    """One slot, four requests: name, prompt tokens, output tokens, priority."""
    t = traced(policy=policy, num_pages=64, num_slots=1, order=order)
    for request in (("A", 30, 2, 2), ("B", 20, 2, 1), ("C", 10, 2, 1), ("D", 10, 1, 3)):
        t.add(*request)
    assert t.run() == expected


@pytest.mark.parametrize("policy", ["vllm_v1", "chunked"])
@pytest.mark.parametrize(
    "order, expected",
    [
        ("fcfs", ["A+48 B+32 C+16", "A B xC", "A B", "A B", "C+17", "C", "C"]),
        ("sjf", ["C+16 B+32 A+48", "C B xA", "C B", "C B", "A+49", "A", "A"]),
        ("priority", ["C+16 A+48 B+32", "C A xB", "C A", "C A", "B+33", "B", "B"]),
    ],
)
def test_who_is_preempted(policy, order, expected):
    """7 pages, A 3, B 2, C 1, one free: two of the three can grow. The last in the order goes: the last to come, the
    longest, the least urgent."""
    t = traced(policy=policy, num_pages=7, order=order)
    for request in (("A", 48, 4, 1), ("B", 32, 4, 2), ("C", 16, 4, 0)):
        t.add(*request)
    assert t.run() == expected


def test_a_preempted_request_goes_by_its_priority():
    """B was preempted; C comes later but is more urgent, and is prefilled first."""
    t = traced(policy="vllm_v0", num_pages=6, order="priority")
    t.add("A", 48, 3, 0)
    t.add("B", 48, 3, 2)
    t.engine.step()
    t.engine.step()
    t.add("C", 80, 1, 1)
    assert t.run() == ["A+48 B+48", "A xB", "A", "C+80", "B+49", "B"]


def request(number, length=1, priority=0):
    return Request(str(number), [1] * length, SamplingParams(), 0.0, number=number, priority=priority)


def test_the_queue_keeps_its_order_whatever_is_removed():
    """Heads, the first n, iteration, removal from the middle, and return."""
    queue = RequestQueue("priority")
    a, b, c, d = (request(i, priority=p) for i, p in enumerate([1, 0, 1, 0]))
    for r in (d, c, b, a):
        queue.push(r)
    assert [*queue] == [b, d, a, c] and queue.first(2) == [b, d] and len(queue) == 4
    queue.remove(b)
    queue.remove(a)
    assert queue.head is d and [*queue] == [d, c] and a not in queue
    queue.push(a)
    queue.remove(d)
    assert queue.head is a and [*queue] == [a, c]
    with pytest.raises(KeyError):
        queue.remove(d)
    for r in (a, c):
        queue.remove(r)
    assert not queue
    with pytest.raises(IndexError):
        _ = queue.head


def test_removed_requests_do_not_pile_up():
    """Ten thousand aborts behind one head: their entries go."""
    queue = RequestQueue()
    queue.push(request(0))
    for i in range(1, 10_000):
        queue.push(r := request(i))
        queue.remove(r)
    assert len(queue._heap) <= SLACK + 2 and queue.head.number == 0


def test_bad_orders_and_priorities_are_refused():
    """One line each."""
    with pytest.raises(ConfigError, match="order 'lifo'; known: fcfs, sjf, priority"):
        traced(policy="vllm_v0", num_pages=8, order="lifo")
    with pytest.raises(RequestError, match="priority must be an integer, got 'high'"):
        traced(policy="vllm_v0", num_pages=8).engine.add_request([1], priority="high")

"""The order in which requests get their turn, orthogonal to the policy: a heap of requests with cheap removal.

fcfs       first come, first served
sjf        fewest tokens first: what a prefill has to compute
priority   lower number first

Ties go to whoever came first. A preempted request goes by the same key, so under `fcfs` it returns to the head: all
that wait came later. The victim of a preemption is the running sequence that would be last in the queue: the last to
come (fcfs), the longest, whose pages help most (sjf), the least urgent (priority). The sequence with the best key is
therefore never a victim while others run, which makes progress certain. No JAX here.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from engine.request import Request

Entry = tuple[int, int, Request]  # key, then number: no two requests share a number
SLACK = 64  # removed entries that a heap may keep, beyond as many as there are live ones


def rank(request: Request, order: str) -> tuple[int, int]:
    """Sort key of a request: lower comes first. `order`: one of `config.ORDERS`."""
    if order == "sjf":
        return request.num_tokens + request.in_flight, request.number
    return request.priority if order == "priority" else 0, request.number


class RequestQueue:
    """Requests in the given order. The key counts when a request is pushed; removal leaves its entry in the heap."""

    def __init__(self, order: str = "fcfs"):
        self.order = order
        self._heap: list[Entry] = []
        self._live: dict[Request, Entry] = {}

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Request]:
        """All requests in order; O(n log n)."""
        return iter(self.first(len(self)))

    @property
    def head(self) -> Request:
        """Whose turn it is. Raises IndexError when nobody waits."""
        while self._live.get(self._heap[0][2]) is not self._heap[0]:
            heapq.heappop(self._heap)
        return self._heap[0][2]

    def first(self, count: int) -> list[Request]:
        """The first `count` requests in order, fewer if fewer wait."""
        return [request for _, _, request in heapq.nsmallest(count, self._live.values())]

    def push(self, request: Request) -> None:
        """Adds a request, preempted or new."""
        entry = self._live[request] = (*rank(request, self.order), request)
        heapq.heappush(self._heap, entry)

    def remove(self, request: Request) -> None:
        """Takes a request out wherever it stands. Raises KeyError when it is not there."""
        del self._live[request]
        if len(self._heap) > 2 * len(self._live) + SLACK:
            self._heap = list(self._live.values())
            heapq.heapify(self._heap)

"""What a scheduler decides under a load, step by step, in terms that two schedulers share; and ours, driven that way.

A load says before which step each request comes, every request produces a fixed number of tokens, and one step ends
before the next is planned: nothing depends on time. A step written down:

    3 5+64 >7+10 x9 | 12     3 computes a token and 5 computes 64, 7 is admitted and computes 10, 9 is preempted; 12
                             blocks stay free

A block is `PAGE_SIZE` tokens of all layers: a page in each of ours. Imports no JAX.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np

from engine.clock import WallClock
from engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, cdiv
from engine.engine import Engine, Executor
from engine.errors import ConfigError
from engine.executor.memory_plan import MemoryPlan
from engine.memory.paged import PagedStore
from engine.memory.pages import PagePool
from engine.request import SamplingParams
from engine.scheduler.plan import Plan, StepResult

PAGE_SIZE = 16
NUM_LAYERS = 2
ORDERS = ("fcfs", "priority")
RANDOM_REQUESTS = 20


@dataclass(frozen=True)
class Arrival:
    """A request, numbered by its place in the load."""

    step: int  # it comes before this step, the first being 0
    prompt_len: int  # tokens
    output_len: int  # tokens it produces, whatever they are
    priority: int = 0  # lower goes first under `order="priority"`


@dataclass(frozen=True)
class Load:
    """Requests in order of arrival, and the limits of the scheduler that serves them.

    Raises:
      ConfigError: a request that can never be served, one that comes before its predecessor, or another order.
    """

    arrivals: tuple[Arrival, ...]
    num_blocks: int  # usable ones
    max_num_seqs: int
    max_num_batched_tokens: int
    order: str = "fcfs"  # one of ORDERS

    def __post_init__(self):
        if self.order not in ORDERS:
            raise ConfigError(f"order {self.order!r}; vLLM knows {' and '.join(ORDERS)}")
        for i, (last, arrival) in enumerate(itertools.pairwise((self.arrivals[0], *self.arrivals))):
            tokens = arrival.prompt_len + arrival.output_len - 1  # the last one's KV is never needed
            if cdiv(tokens, PAGE_SIZE) > self.num_blocks:
                raise ConfigError(f"request {i} needs room for {tokens} tokens: more than {self.num_blocks} blocks")
            if arrival.step < last.step:
                raise ConfigError(f"request {i} comes before step {arrival.step}, the one before it {last.step}")

    @property
    def max_context(self) -> int:
        """Tokens of the longest request, and one: no request ends because the context does."""
        return max(a.prompt_len + a.output_len for a in self.arrivals) + 1


@dataclass(frozen=True)
class Step:
    """One decision. Requests are named by their number."""

    tokens: tuple[tuple[int, int], ...]  # who computes how many, by number
    admitted: tuple[int, ...]  # in order, those that come back after a preemption included
    preempted: tuple[int, ...]  # by number
    free_blocks: int  # once the step has its own

    @classmethod
    def between(cls, before: Sequence[int], after: Sequence[int], tokens: Iterable[tuple[int, int]], free: int) -> Step:
        """From who was running before and after the decision, both in order of admission."""
        admitted = tuple(number for number in after if number not in before)
        return cls(tuple(sorted(tokens)), admitted, tuple(sorted({*before} - {*after})), free)

    def __str__(self) -> str:
        counts = {number: f"{number}" + f"+{count}" * (count > 1) for number, count in self.tokens}
        words = [word for number, word in counts.items() if number not in self.admitted]
        words += [f">{counts[number]}" for number in self.admitted] + [f"x{number}" for number in self.preempted]
        return " ".join([*words, "|", str(self.free_blocks)])


class Scheduler(Protocol):
    """One side of a comparison."""

    def add(self, number: int, arrival: Arrival) -> None:
        """A request comes."""
        ...

    def unfinished(self) -> bool:
        """Whether a request waits or runs."""
        ...

    def step(self) -> Step:
        """Decides one step, and gives a token to every request whose tokens it has all computed."""
        ...


def schedule(load: Load, scheduler: Scheduler) -> list[Step]:
    """Serves a load to the end. A step in which nothing runs, because nobody is there, counts as one."""
    steps: list[Step] = []
    to_come = deque(enumerate(load.arrivals))
    while to_come or scheduler.unfinished():
        while to_come and to_come[0][1].step <= len(steps):
            scheduler.add(*to_come.popleft())
        steps.append(scheduler.step())
        idle = not to_come and not any(step.tokens for step in steps[-2:])  # one step may do no more than preempt
        assert not idle, f"nothing runs in step {len(steps) - 1}, and nobody is to come"
    return steps


class VllmV1:
    """Our `vllm_v1` policy over a paged store, in the engine's own loop, of which this is also the executor."""

    def __init__(self, load: Load):
        context, pages = load.max_context, load.num_blocks * NUM_LAYERS
        model = ModelConfig("instant", NUM_LAYERS, 64, 8, 8, 8, 64, 100, context)
        limits = SchedulerConfig("vllm_v1", load.order, load.max_num_seqs, load.max_num_batched_tokens, watermark=0.0)
        config = EngineConfig(CacheConfig(page_size=PAGE_SIZE, num_pages=pages), limits, async_depth=0)
        store = PagedStore(PagePool(pages, NUM_LAYERS), load.max_num_seqs, PAGE_SIZE, context)
        memory = MemoryPlan(pages, 1, 1, context, "", load.max_num_batched_tokens, 0, 0, 0, 0)
        executor = cast(Executor, self)  # without a host tier nothing else is asked of it
        self._engine = Engine(model, config, memory, store, executor, WallClock())
        self._before: list[int] = []
        self._tokens: list[tuple[int, int]] = []
        self._step: Step

    def add(self, number: int, arrival: Arrival) -> None:
        """See `Scheduler`."""
        params = SamplingParams(max_tokens=arrival.output_len, ignore_eos=True)
        prompt = np.ones(arrival.prompt_len, np.int32)
        self._engine.add_request(prompt, params, request_id=str(number), priority=arrival.priority)

    def unfinished(self) -> bool:
        """See `Scheduler`."""
        return self._engine.has_work()

    def step(self) -> Step:
        """See `Scheduler`."""
        self._before = self._running()
        self._step = self._decided([])
        self._engine.step()
        return self._step

    def submit(self, plan: Plan) -> Plan:
        """Writes the plan down."""
        number = {slot: int(request.id) for slot, request in enumerate(self._engine.state.requests) if request}
        tokens = [(number[slot], 1) for slot in plan.decode_slots.tolist()]
        self._step = self._decided(tokens + [(number[p.slot], len(p.tokens)) for p in plan.prefills])
        return plan

    def collect(self, plan: Plan) -> StepResult:
        """The same token everywhere."""
        return StepResult(np.ones(plan.num_sampled, np.int32), None, 0.0, 0.0)

    def _running(self) -> list[int]:
        state = self._engine.state
        return [int(request.id) for request in state.owners(state.running)]

    def _decided(self, tokens: list[tuple[int, int]]) -> Step:
        return Step.between(self._before, self._running(), tokens, self._engine.store.num_free_pages // NUM_LAYERS)


def difference(ours: Sequence[Step], theirs: Sequence[Step]) -> tuple[int, dict[str, Any] | None]:
    """How many steps of two schedules are identical, and the first that is not (None: all are), as plain JSON types."""
    pairs = list(itertools.zip_longest(ours, theirs))
    differ = [i for i, (a, b) in enumerate(pairs) if a != b]
    if not differ:
        return len(pairs), None
    a, b = pairs[differ[0]]
    return len(pairs) - len(differ), {"step": differ[0], "ours": str(a or "ended"), "vllm": str(b or "ended")}


def random_load(seed: int, order: str) -> Load:
    """A small load in which every limit is hit: as many tokens as one request can have are as likely as few."""
    rng = np.random.default_rng(seed)
    num_blocks = int(rng.integers(2, 25))
    lengths = rng.integers(2, num_blocks * PAGE_SIZE + 2, RANDOM_REQUESTS)  # of prompt and output together
    prompts = np.maximum(rng.integers(1, lengths), lengths - 100)
    steps = np.cumsum(rng.integers(0, 10, RANDOM_REQUESTS))
    priorities = rng.integers(0, 3, RANDOM_REQUESTS)
    columns = np.stack([steps, prompts, lengths - prompts, priorities], 1).tolist()
    limits = int(rng.integers(1, 17)), int(rng.integers(1, 301))
    return Load(tuple(Arrival(*row) for row in columns), num_blocks, *limits, order)


def preempted(steps: Sequence[Step]) -> int:
    """Preemptions of a schedule."""
    return sum(len(step.preempted) for step in steps)


def continued_chunks(steps: Sequence[Step]) -> int:
    """Chunks of a prompt, other than the first, of more than one token."""
    return sum(count > 1 and number not in step.admitted for step in steps for number, count in step.tokens)

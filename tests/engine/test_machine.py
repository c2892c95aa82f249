"""Invariants 1 to 5 under everything that can happen to the host side, in any order, for every built-in policy.

The machine knows each request's tokens beforehand (`pattern_model.expected_output`), so whatever it does to the
engine, an output must be the next piece of them. See `pattern_executor` for what a step checks.
"""

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    run_state_machine_as_test,
)

from engine.config import LayerKVConfig, SchedulerConfig
from engine.errors import OutOfPages
from engine.memory import parking
from engine.request import Phase, SamplingParams
from engine.scheduler.policy import names, needs_host, parks
from tests.engine.events import PARAMS, PROMPTS, event
from tests.engine.pattern_engine import pattern_engine
from tests.engine.pattern_executor import Injected
from tests.engine.pattern_model import MODEL, expected_output

LAYERS = st.integers(0, MODEL.num_layers - 1)
NATIVE = 0  # instead of a chunk size: the native store
POOLS = {1: (4, 17), 4: (4, 20), 32: (1, 96), NATIVE: (4, 0)}  # page size and pages per layer, by chunk size
# A step takes a second here: objectives that every stall breaks, some do, none does.
KNOBS = st.builds(
    LayerKVConfig,
    layerwise=st.sampled_from([True, True, False]),
    chunked=st.booleans(),
    retain=st.sampled_from(["spare", "minimum"]),
    retained_layers=st.sampled_from([None, None, 0, 1, 2, 3]),
    pattern=st.sampled_from(["interleave", "prefix", "suffix", "random", "interval"]),
    overlap=st.booleans(),
    stream=st.sampled_from(["hidden", "urgent", "always", "never"]),
    append_pages=st.sampled_from([1, 3]),
    slo_rule=st.booleans(),
    tpot_slo=st.sampled_from([0.5, 1.5, 100.0]),
    lost=st.sampled_from(["ignore", "block"]),
    lengths=st.sampled_from(["quantile", "oracle"]),
    forecast=st.booleans(),
    horizon=st.sampled_from([2, 20]),
    high_watermark=st.sampled_from([0.05, 0.3]),
)
PLACES = ("coming in", "going out", "swapped", "prefilling", "waiting", "running")
TROUBLE = ("poison", "submit", "half way", "collect", "allocate")


class EngineMachine(RuleBasedStateMachine):
    """Serves requests from one engine while everything that can fail does."""

    policy = "vllm_v0"
    moves = False  # whether the policy needs the host tier, and so a paged store
    parking = False  # whether it parks layers
    seen: Counter  # what happened, over all examples

    @initialize(
        chunk=st.sampled_from(list(POOLS)),
        host_pages=st.sampled_from([300, 100, 30, 0]),  # for all; for some; for hardly any; recompute
        async_depth=st.integers(0, 1),
        num_slots=st.integers(3, 6),
        watermark=st.sampled_from([0.0, 0.1]),
        budget=st.sampled_from([8, 64]),
        fetch_blocks=st.sampled_from([1, 8]),
        streamed=st.sampled_from([1, 2, None]),
        layerkv=KNOBS,
    )
    def build(self, chunk, host_pages, async_depth, num_slots, watermark, budget, fetch_blocks, streamed, layerkv):
        """An idle engine, which regathers a layer that takes more than `fetch_blocks` blocks."""
        if self.moves:
            chunk, host_pages = chunk or 1, host_pages or 30
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(parking, "MAX_BLOCKS_PER_FETCH", fetch_blocks)
        page_size, pages = POOLS[chunk]
        self.engine = engine = pattern_engine(
            pages,
            host_pages,
            chunk,
            page_size,
            num_slots,
            policy=self.policy,
            async_depth=async_depth,
            watermark=watermark,
            max_batched_tokens=budget,
            store="paged" if chunk else "native",
            layerkv=layerkv,
            streamed=streamed if self.parking else None,  # others do not count what the machine parks
        )
        self.executor, self.store, self.state = engine.executor, engine.store, engine.state
        self.requests, self.tokens, self.done = {}, {}, set()
        self.paged, self.parks = chunk > 0, chunk > 0 and host_pages > 0
        self.refusals = -1  # of the pool: allocations until it fails once
        owner, name = (self.store.pool, "allocate") if self.paged else (self.store, "open")
        allocate = getattr(owner, name)
        setattr(owner, name, lambda count: self.maybe_refuse() or allocate(count))
        self.arrive(
            0, (), prompt=[1, 2, 3] * 5, params=SamplingParams(max_tokens=40), new=set("stuvwx")
        )  # too many to fit

    def maybe_refuse(self):
        """Fails the allocation that `trouble` chose."""
        self.refusals -= 1
        if self.refusals == -1:
            raise OutOfPages("injected")

    @event(prompt=PROMPTS, params=PARAMS, new=st.sets(st.sampled_from("abcdefgh"), min_size=1, max_size=4))
    def arrive(self, prompt, params, new):
        """Some requests, under names that may have been used before."""
        for name in sorted(new & self.done | new - set(self.requests)):
            self.engine.add_request(prompt, params, request_id=name)
            self.requests[name], self.tokens[name] = self.engine._live[name], []
            self.done.discard(name)

    def step(self):
        """One step: with work left it collects something, unless it fails."""
        progress, had_work = self.executor.progress, self.engine.has_work()
        try:
            outputs = self.engine.step()
        except (Injected, OutOfPages) as error:
            assert isinstance(error, Injected) or str(error) == "injected", "a policy tests what fits before it takes"
            self.seen[str(error)] += 1
            return
        assert self.executor.progress > progress or not had_work, "a step with work left made no progress"
        for out in outputs:
            request, tokens = self.requests[out.request_id], self.tokens[out.request_id]
            tokens += out.new_token_ids
            expected = expected_output(request)
            assert tokens == expected[: len(tokens)], "tokens depend on the schedule"
            assert out.finished == (tokens == expected)
            if out.finished:
                assert out.finish_reason == ("stop" if tokens[-1] in request.stop_ids else "length")
                self.done.add(out.request_id)
                self.seen["finished"] += 1
                self.seen["preempted"] += request.num_preemptions
                self.seen["lost"] += request.lost

    def place(self, request) -> str:
        """Where a request is, and what moves it."""
        if request.phase is Phase.SWAPPED:
            return "swapped" if self.store.host.landed(request.id) else "going out"
        if request.phase is Phase.WAITING:
            return "waiting"
        if any(request.id in move.owners for move in self.executor.lanes[False]):
            return "coming in"
        prefilling = not request.output and request.in_flight
        return "prefilling" if prefilling else "running"

    @precondition(lambda self: len(self.done) < len(self.requests))
    @event(anywhere=st.sampled_from([False, False, True]))
    def abort(self, anywhere):
        """Somebody in the rarest place, or nobody when all are in common ones."""
        live = [(PLACES.index(self.place(r)), name) for name, r in self.requests.items() if name not in self.done]
        place, name = min(live)
        if PLACES[place] in ("waiting", "running") and not anywhere:
            return
        assert self.engine.abort(name) and not self.engine.abort(name)
        self.done.add(name)
        self.seen["abort " + PLACES[place]] += 1

    @precondition(lambda self: len(self.state.running))
    @event(index=st.integers(0, 3))
    def swap_out(self, index):
        """Somebody is swapped out whom the policy would have kept, in any phase of its prefill or decode."""
        slot = int(self.state.running[index % len(self.state.running)])
        if self.store.can_swap_out(slot):
            self.state.preempt(slot, swap=True)
            self.seen["swapped out"] += 1

    @precondition(lambda self: self.parks and len(self.state.running))
    @event(layers=st.sets(LAYERS, min_size=1), which=st.integers(1, 7))
    def park(self, layers, which):
        """Full pages of some layers of some sequences leave, in one block per layer."""
        slots = [slot for i, slot in enumerate(self.state.running.tolist()) if which >> i & 1]
        owners = [request.id for request in self.state.owners(slots)]
        for layer in sorted(layers):
            try:
                ends = self.state.cached[slots] // self.store.page_size
                self.seen["parked"] += self.store.park(layer, slots, owners, ends.tolist()) > 0
            except OutOfPages:
                self.seen["host tier full"] += 1

    @precondition(lambda self: self.at_home_again())
    @event(index=st.integers(0, 7))
    def bring_home(self, index):
        """A parked layer of a sequence gets pages on the device again."""
        places = self.at_home_again()
        try:
            self.store.bring_home(*places[index % len(places)])
            self.seen["came home"] += 1
        except OutOfPages as error:
            self.seen[str(error)] += 1

    def at_home_again(self) -> list[tuple[int, int]]:
        """(slot, layer) of what is parked, all of it landed, and fits the device."""
        if not self.parks:
            return []
        parked = np.argwhere(self.store.parked[..., 0] < self.store.parked[..., 1]).tolist()
        return [(slot, layer) for slot, layer in parked if self.fits_home(slot, layer)]

    def fits_home(self, slot: int, layer: int) -> bool:
        """Whether a parked layer may come home now."""
        a, b = self.store.parked[slot, layer].tolist()
        fits = self.store.pool.fits(np.eye(MODEL.num_layers, dtype=int)[layer] * (b - a))
        return fits and self.store.is_parked(slot, layer)

    @precondition(lambda self: self.store.copies_in_flight)
    @event(out=st.booleans(), count=st.sampled_from([9, 1, 2]), ok=st.sampled_from([True, True, True, False]))
    def copies_end(self, out, count, ok):
        """The oldest copies of a lane land; or a copy out fails."""
        for _ in range(min(count, len(self.executor.lanes[out]))):
            self.executor.land(out, ok)

    @precondition(lambda self: self.store.host is not None)
    @event(out=st.booleans(), ok=st.booleans())
    def choose_what_a_wait_brings(self, out, ok):
        """Which copy ends when the engine has nothing to do but wait, and how."""
        self.executor.wait_lands = out, ok

    @precondition(lambda self: self.store.host is not None)
    @event(out=st.booleans(), count=st.integers(1, 4))
    def copies_will_fail(self, out, count):
        """The next copies of a direction will not start."""
        self.executor.fail_start[out] = count

    @event(kind=st.sampled_from(TROUBLE), after=st.integers(0, 3), happens=st.sampled_from([False, False, True]))
    def trouble(self, kind, after, happens):
        """The next call of a kind will fail, or an allocation after it. Not always: it starts everything over."""
        if not happens:
            return
        if kind == "allocate":
            self.refusals = after
        else:
            self.executor.fail.add(kind)

    @invariant()
    def consistent(self):
        """Books, queues and what the executor really holds agree."""
        if not hasattr(self, "engine"):
            return
        self.state.check()
        assert not self.paged or self.store.pool.refcount.max() <= 1, "nothing is shared, yet a page has two owners"
        host = self.store.host
        if host is None:
            return
        assert set(self.executor.blocks) <= set(host.blocks), "the executor holds a block that nobody needs"
        assert all(i in self.executor.blocks for i, b in host.blocks.items() if b.landed), "a block's bytes are gone"
        for name, request in self.requests.items():
            if not host.holds(name):
                assert request.phase is not Phase.SWAPPED
                continue
            ends = [self.end_of(host.extents(name, layer)) for layer in range(MODEL.num_layers)]
            if request.phase is Phase.SWAPPED:
                assert ends == ends[:1] * MODEL.num_layers, "a sequence is on the host in part"
                assert ends[0] * self.store.page_size >= request.cached
            else:
                assert request.phase is Phase.RUNNING and self.parks
                assert (self.store.parked[request.slot, :, 1] <= ends).all()

    @staticmethod
    def end_of(extents) -> int:
        """Pages that the extents of a layer hold: [0, n) without a gap."""
        end = 0
        for e in extents:
            assert e.start == end, "the pages of a layer have a gap on the host, or are there twice"
            end = e.end
        return end

    def teardown(self):
        """Without further trouble everybody is served soon, and nothing is left."""
        if not hasattr(self, "engine"):
            return
        try:
            self.serve_the_rest()
        finally:
            self.patch.undo()
        self.seen["regathered"] += self.executor.regathered

    def serve_the_rest(self):
        """To the end."""
        self.executor.fail.clear()
        self.executor.fail_start, self.executor.wait_lands = {True: 0, False: 0}, (True, True)
        self.refusals = -1
        bound = 50 + sum(3 * r.max_length for n, r in self.requests.items() if n not in self.done) * 3
        for _ in range(bound):
            if not self.engine.has_work():
                break
            self.step()
            self.consistent()
        assert not self.engine.has_work(), "work is left"
        assert self.done == set(self.requests), "a request was forgotten"
        assert self.store.num_free_pages == self.store.num_pages and self.store.num_free_slots == self.store.num_slots
        assert self.store.num_host_pages == 0 and not self.executor.blocks and not self.executor.ended


def run(policy: str, **options) -> Counter:
    """Runs the machine under a policy and returns what happened how often."""
    kind = {"policy": policy, "moves": needs_host(SchedulerConfig(policy)), "parking": parks(SchedulerConfig(policy))}
    machine = type("Machine", (EngineMachine,), {**kind, "seen": Counter()})
    health = list(HealthCheck)
    run_state_machine_as_test(machine, settings=settings(deadline=None, suppress_health_check=health, **options))
    return machine.seen


@pytest.mark.parametrize("policy", names())
def test_every_invariant_in_every_order(policy):
    """Quick: the same examples at every run."""
    seen = run(policy, max_examples=25, stateful_step_count=60, derandomize=True)
    assert all(seen[what] for what in ("finished", "preempted", "swapped out", "lost")), seen


@pytest.mark.long
@pytest.mark.parametrize("policy", names())
def test_every_invariant_in_every_order_at_length(policy):
    """The same, over many more examples, other ones each time, with everything in them that can happen. (Regathering is
    rare here; it has a machine of its own in `memory/test_parking_store.py`.)"""
    seen = run(policy, max_examples=300, stateful_step_count=80)
    happened = ("preempted", "swapped out", "lost", "parked", "came home", "host tier full", "injected")
    assert all(seen[what] >= 5 for what in [*happened, *TROUBLE[:-1], *("abort " + p for p in PLACES)]), seen

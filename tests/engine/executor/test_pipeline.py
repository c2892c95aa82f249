"""Pipeline stages: schedules worked out by hand, and laws for any step."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.clock import VirtualClock
from engine.config import EngineConfig
from engine.costmodel.device import device_names, load_device
from engine.costmodel.stages import Stage
from engine.costmodel.step_model import StepModel, StepWork
from engine.executor.link import Link
from engine.executor.pipeline import Timeline, lasting, micro_batches
from engine.executor.pipeline_executor import PipelineExecutor
from engine.memory.moves import Move
from engine.presets import preset
from engine.scheduler.plan import Plan, Prefill
from tests.engine.executor.flat_cost import FlatCost

NO_DELTAS = np.empty((0, 4), np.int32)


def plan(slots=(), positions=(), prompts=(), moves=(), tokens=-1):
    """Decode rows whose tokens are on the device unless `tokens` says otherwise, and (slot, start, tokens, samples)."""
    prefills = tuple(Prefill(slot, start, np.zeros(n, np.int32), samples) for slot, start, n, samples in prompts)
    rows, at = np.array(slots, np.int32), np.array(positions or [0] * len(slots), np.int32)
    return Plan(1, rows, np.full(len(rows), tokens, np.int32), at, prefills, NO_DELTAS, None, None, tuple(moves))


def executor(stages, depth=1, rate=256.0):
    links = [(Link(rate), Link(rate)) for _ in stages]
    return PipelineExecutor(stages, EngineConfig(async_depth=depth), VirtualClock(), 1, links)


def two_stages(first=2.0, second=2.0, send=0.5, host=0.0):
    """One layer each, which takes any micro-batch so many seconds."""
    flat = {"row": 0.0, "kv": 0.0, "token": 0.0, "send": send, "host": host}
    return FlatCost(first, layers=range(1), **flat), FlatCost(second, layers=range(1, 2), **flat)


def test_two_stages_and_two_micro_batches_by_hand():
    """The first stage takes 2 and 3 s, the second 4 and 1 s, the way between them half a second."""
    timeline, seconds = Timeline([0.0, 0.0]), lasting([[2.0, 3.0], [4.0, 1.0]])
    # 0-2 | 2-5 in the first stage; 2.5-6.5 | 6.5-7.5 in the second, where the second micro-batch waits for a second
    assert timeline.step([0.0, 0.0], [0.5, 0.5], seconds) == [6.5, 7.5] and timeline.free == [5.0, 7.5]
    # the next step's inputs are there at 6.5 and 7.5: 6.5-8.5 | 8.5-11.5; 9-13 | 13-14
    assert timeline.step([6.5, 7.5], [0.5, 0.5], seconds) == [13.0, 14.0] and timeline.free == [11.5, 14.0]


def test_micro_batches_by_hand():
    """Five decode rows on three micro-batches; prompts of 9, 4 and 2 tokens go where the fewest tokens are."""
    step = plan(range(5), [10, 20, 30, 40, 50], [(7, 0, 2, True), (8, 5, 9, False), (9, 0, 4, True)])
    first, second, third = micro_batches(step, 3)
    assert first.work == StepWork(2, 32, 21, ((0, 4),), 3)
    assert second.work == StepWork(2, 72, 41, ((0, 2),), 3)
    assert third.work == StepWork(1, 51, 51, ((5, 9),), 1)
    assert [b.num_tokens for b in (first, second, third)] == [6, 4, 10]
    assert [b.reads.tolist() for b in (first, second, third)] == [[0, 1], [2, 3], [4]]
    assert [b.samples.tolist() for b in (first, second, third)] == [[0, 1, 9], [2, 3, 7], [4]]


ROWS = {
    "positions": st.lists(st.integers(0, 500), max_size=12),
    "prompts": st.lists(st.tuples(st.integers(0, 50), st.integers(1, 90), st.booleans()), max_size=6),
    "most": st.integers(1, 6),
}


@given(**ROWS)
def test_a_step_is_cut_and_nothing_is_lost(positions, prompts, most):
    """min(most, rows) micro-batches, none empty; decode rows differ by one at most; sums are those of the step."""
    step = plan(range(len(positions)), positions, [(20 + i, *p) for i, p in enumerate(prompts)])
    batches, rows = micro_batches(step, most), len(positions) + len(prompts)
    assert len(batches) == max(1, min(most, rows))
    works = [b.work for b in batches]
    assert rows == 0 or all(w.num_decode + len(w.prefills) for w in works)
    counts = [w.num_decode for w in works]
    assert sum(counts) == len(positions) and max(counts) - min(counts) <= 1
    assert sum(w.decode_kv for w in works) == sum(positions) + len(positions)
    assert max(w.max_kv for w in works) == max(positions, default=-1) + 1
    assert sorted(p for w in works for p in w.prefills) == sorted((start, n) for start, n, _ in prompts)
    assert sorted(np.concatenate([b.samples for b in batches])) == sorted(step.sampled_slots)
    assert sum(w.num_sampled for w in works) == step.num_sampled


def test_the_next_step_follows_without_draining_the_stages():
    """Two rows, two micro-batches: 0-2, 2-4 | 2.5-4.5, 4.5-6.5. The second step, submitted ahead, starts a row as soon
    as its token is there: 4.5-6.5, 6.5-8.5 | 7-9, 9-11. What the first took alone, 6.5 s, the second adds 4.5 s to."""
    e = executor(two_stages())
    first, second = e.submit(plan([0, 1], tokens=5)), e.submit(plan([0, 1]))
    assert (first.start, first.ends, second.start, second.ends) == (0.0, [6.5], 6.5, [11.0])
    assert (e.collect(first).end, e.collect(second).end, e.clock.now()) == (6.5, 11.0, 11.0)


def test_a_row_waits_for_its_own_token():
    """As before, but slot 1 comes first in the second step, and its token at 6.5 s: 6.5-8.5, 8.5-10.5 | 9-11, 11-13.
    With tokens that the host knows nothing is waited for but the stages: 4-6, 6-8 | 6.5-8.5, 8.5-10.5."""
    for tokens, end in ((-1, 13.0), (5, 10.5)):
        e = executor(two_stages())
        e.submit(plan([0, 1], tokens=5))
        assert e.submit(plan([1, 0], tokens=tokens)).ends == [end]


def test_a_step_planned_late_starts_after_the_hosts_time():
    """A quarter of a second of host time, once a step."""
    e = executor(two_stages(host=0.25))
    assert e.collect(e.submit(plan([0]))).end == 0.25 + 2 + 0.5 + 2
    e.clock.wait_until(10.0)
    assert e.submit(plan([0])).ends == [14.75]


def test_every_stage_has_a_link_of_its_own():
    """256 pages of each of two layers leave: each takes a second, although they overlap. The first stage gathers from 0
    to 1/16, so that its copy ends at 17/16; the second starts at 1/16 + 2 + 0.5 and its copy leaves 1/16 later. On one
    link that carries both, at 1/4 of the rate, they would take more than 4 s."""
    moves = [Move(True, layer, layer, np.arange(256, dtype=np.int32)) for layer in (0, 1)]
    e = executor(two_stages())
    result = e.collect(e.submit(plan([0], moves=moves)))
    assert result.end == 1 / 16 + 2 + 0.5 + 1 / 16 + 2
    assert [(c.layer, c.start, c.end) for c in result.copies] == [(0, 1 / 16, 17 / 16), (1, 2.625, 3.625)]


def test_a_stage_waits_for_what_its_layers_read():
    """512 pages of the second layer take 2 s to come and 1/8 s to scatter once the second stage asks for them at 2.5 s;
    the second micro-batch finds them there."""
    back = Move(False, 3, 1, np.arange(512, dtype=np.int32), ("a",))
    e = executor(two_stages())
    result = e.collect(e.submit(plan([0, 1], moves=[back])))
    assert result.end == 2.5 + 2 + 1 / 8 + 2 + 2
    assert [(c.start, c.end, c.owners) for c in result.copies] == [(2.5, 4.5, ("a",))]


def test_a_plan_of_moves_alone_takes_what_the_copies_take():
    """No row, no micro-batch to send on."""
    e = executor((FlatCost(0.0, layers=range(1)), FlatCost(0.0, layers=range(1, 2))))
    assert e.submit(plan(moves=[Move(True, 0, 1, np.arange(256, dtype=np.int32))])).ends == [1 / 16]


SECONDS = st.integers(1, 64).map(lambda n: n / 16)


def steps(num_stages: int):
    """Seconds [stages][micro-batches] and sends [micro-batches] of any step."""

    def of(num: int):
        row = st.lists(SECONDS, min_size=num, max_size=num)
        return st.tuples(st.lists(row, min_size=num_stages, max_size=num_stages), row)

    return st.integers(1, 4).flatmap(of)


STAGES = st.integers(1, 4)


def longest_path(seconds, sends, stage: int, batch: int) -> float:
    """When a stage ends a micro-batch of a step that begins at 0: the longest of all ways there through the grid, a
    step to the next stage costing a send."""
    before = [longest_path(seconds, sends, stage - 1, batch) + sends[batch]] if stage else []
    before += [longest_path(seconds, sends, stage, batch - 1)] if batch else []
    return max(before, default=0.0) + seconds[stage][batch]


@given(STAGES.flatmap(steps))
def test_laws_of_a_step(step):
    """Exactly the longest path; no shorter than any micro-batch's way through all stages or than any stage's work, no
    longer than all of it one after the other."""
    seconds, sends = step
    num_stages, num = len(seconds), len(sends)
    done = Timeline([0.0] * num_stages).step([0.0] * num, sends, lasting(seconds))
    assert done == [longest_path(seconds, sends, num_stages - 1, m) for m in range(num)]
    for m in range(num):
        assert done[-1] >= sum(stage[m] for stage in seconds) + (num_stages - 1) * sends[m]
    assert all(done[-1] >= sum(stage) for stage in seconds)
    assert done[-1] <= sum(map(sum, seconds)) + (num_stages - 1) * sum(sends)


@given(STAGES.flatmap(lambda num_stages: st.lists(steps(num_stages), min_size=1, max_size=5)))
def test_a_stage_does_one_thing_at_a_time_and_in_order(several):
    """Over several steps, each of which waits for the tokens of the one before."""
    timeline, ran, ready = Timeline([0.0] * len(several[0][0])), {}, [0.0]
    for seconds, sends in several:

        def run(stage, batch, start, seconds=seconds):
            ran.setdefault(stage, []).append((start, start + seconds[stage][batch]))
            return ran[stage][-1][1]

        ready = timeline.step([max(ready)] * len(sends), sends, run)
    for intervals in ran.values():
        assert all(end <= start for (_, end), (start, _) in pairwise(intervals))
    assert timeline.free == [intervals[-1][1] for intervals in ran.values()]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(device_names()), st.integers(1, 32), st.integers(1, 20_000), st.integers(0, 3000))
def test_one_row_passes_all_stages_and_all_sends(device, num_stages, position, prompt):
    """Llama-3.1-8B: nothing overlaps, so it takes what one device takes, and a send between any two stages."""
    model, profile = preset("llama3.1-8b"), load_device(device)
    stages = [StepModel(model, profile, stage=stage) for stage in Stage.split(model, num_stages)]
    step = plan([], prompts=[(0, position, prompt, True)]) if prompt else plan([0], [position])
    (batch,) = micro_batches(step, num_stages)
    whole = StepModel(model, profile).step(batch.work)
    sends = (num_stages - 1) * stages[0].send_seconds(prompt or 1)
    assert executor(stages).submit(step).ends == [pytest.approx(whole.total + sends, rel=1e-9)]

"""`vllm_v0` against schedules worked out by hand, and laws that hold for every load."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError, RequestError
from engine.request import SamplingParams
from tests.engine.fake import fake_engine, schedule


def add(engine, name, prompt, output):
    engine.add_request([1] * prompt, SamplingParams(max_tokens=output, ignore_eos=True), request_id=name)


def test_prompts_are_prefilled_together_before_any_decode():
    """A and B arrive together: one prefill step gives both their first token, then they decode side by side."""
    engine = fake_engine(num_pages=64)
    add(engine, "A", 10, 3)
    add(engine, "B", 20, 2)
    assert schedule(engine) == ["p A B", "d A B", "d A"]


def test_a_late_prompt_interrupts_decoding():
    """C arrives while A decodes: its prefill comes first and A waits one step (the stall LayerKV's SLO rule bounds)."""
    engine = fake_engine(num_pages=64)
    add(engine, "A", 10, 4)
    assert [o.request_id for o in engine.step()] == ["A"]
    add(engine, "C", 10, 2)
    assert schedule(engine) == ["p C", "d A C", "d A", "d A"]


def test_the_token_budget_splits_prefills_in_order():
    """Budget 64: A (40) + B (30) exceed it, so B is prefilled in the next step; the head is never skipped for C."""
    engine = fake_engine(num_pages=64, max_batched_tokens=64)
    for name, prompt in (("A", 40), ("B", 30), ("C", 10)):
        add(engine, name, prompt, 1)
    assert schedule(engine) == ["p A", "p B C"]


def test_a_long_prompt_waits_for_pages_and_blocks_the_queue():
    """8 pages of 16 tokens per layer. A holds 5; B needs 4 and waits; C needs 1, fits, and waits behind B (Fig 2 of
    LayerKV: request-level allocation makes the queue)."""
    engine = fake_engine(num_pages=8)
    add(engine, "A", 5 * 16 - 2, 3)
    add(engine, "B", 4 * 16 - 1, 2)
    add(engine, "C", 8, 1)
    assert schedule(engine) == ["p A", "d A", "d A", "p B C", "d B"]


def test_the_youngest_is_preempted_and_recomputed_first():
    """6 pages. A and B hold 3 each with full last pages. A's growth takes B's pages; B, with its token kept, comes back
    when A is done, ahead of C, and recomputes prompt + output."""
    engine = fake_engine(num_pages=6)
    add(engine, "A", 48, 3)
    add(engine, "B", 48, 3)
    add(engine, "C", 80, 1)  # 5 pages: does not fit in the 2 that B leaves
    lines = schedule(engine)
    assert lines == ["p A B", "d A xB", "d A", "p B", "d B", "p C"]
    prefills = [(p.start, len(p.tokens)) for plan in engine.executor.plans for p in plan.prefills]
    assert prefills == [(0, 48), (0, 48), (0, 49), (0, 80)]


def test_the_watermark_keeps_pages_at_admission_but_not_for_growth():
    """10 pages, 2 kept by the watermark: B (3 pages) would leave 1 and is not admitted; A may grow into them."""
    engine = fake_engine(num_pages=10, watermark=0.2)
    add(engine, "A", 6 * 16, 18)  # 6 pages, grows to 8
    add(engine, "B", 3 * 16 - 1, 1)
    lines = schedule(engine)
    assert lines[0] == "p A" and lines[-1] == "p B" and lines.count("d A") == 17


def test_alone_a_request_may_use_the_watermark():
    """A request that fits the pool only without the watermark runs when the engine is empty: progress is guaranteed."""
    engine = fake_engine(num_pages=10, watermark=0.2)
    add(engine, "A", 150, 10)
    assert schedule(engine)[0] == "p A"


def test_what_can_never_fit_is_refused_at_arrival():
    """161 tokens of KV in a pool of 160: refused, and nothing is queued. One token less is served."""
    engine = fake_engine(num_pages=10)
    with pytest.raises(RequestError, match="never fit the KV pool of 20 pages"):
        add(engine, "A", 150, 12)
    assert not engine.has_work()
    add(engine, "A", 150, 11)
    assert len(schedule(engine)) == 11


def test_the_number_of_sequences_is_bounded():
    """Two slots: the third request waits for one."""
    engine = fake_engine(num_pages=64, num_slots=2)
    for name in "ABC":
        add(engine, name, 10, 2)
    assert schedule(engine) == ["p A B", "d A B", "p C", "d C"]


def test_timestamps_by_hand():
    """One second per step: B queues for A's two steps; TTFT = queue + prefill."""
    engine = fake_engine(num_pages=64, num_slots=1)
    add(engine, "A", 10, 2)
    add(engine, "B", 10, 3)
    outputs = {}
    while engine.has_work():
        outputs.update({o.request_id: o for o in engine.step()})
    m = outputs["B"].metrics
    assert (m.queue_s, m.prefill_s, m.ttft_s, m.tpot_s, m.e2e_s) == (2.0, 1.0, 3.0, 1.0, 5.0)


def test_stop_tokens_and_reasons():
    """Token 7 is the model's end of sequence; own stop ids end a request too; `ignore_eos` runs to the length."""
    for answer, params, expected in (
        (7, {}, "stop"),
        (7, {"ignore_eos": True}, "length"),
        (9, {"stop_token_ids": (8, 9)}, "stop"),
        (9, {"stop_token_ids": (8,), "ignore_eos": True}, "length"),
    ):
        engine = fake_engine(num_pages=64, answer=lambda slot, answer=answer: answer)
        (out,) = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4, **params))
        assert (out.finish_reason, len(out.token_ids)) == (expected, 1 if expected == "stop" else 4)


def test_unknown_policy_lists_the_known():
    """The message names what would be right."""
    with pytest.raises(ConfigError, match=r"'vllm' is unknown; known: .*vllm_v0"):
        fake_engine(num_pages=8, policy="vllm")


LOADS = st.lists(st.tuples(st.integers(1, 100), st.integers(1, 60)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(LOADS, st.integers(10, 24), st.sampled_from([1, 4]), st.sampled_from([0.0, 0.1]), st.sampled_from([32, 4096]))
def test_every_load_finishes_and_nothing_leaks(load, num_pages, chunk, watermark, budget):
    """Everyone gets exactly its tokens; all pages come back; steps are bounded by the work (liveness)."""
    engine = fake_engine(num_pages, num_slots=4, watermark=watermark, max_batched_tokens=budget, chunk=chunk)
    wanted = {}
    for i, (prompt, output) in enumerate(load):
        try:
            add(engine, str(i), prompt, output)
            wanted[str(i)] = output
        except RequestError:
            pages = -(-(prompt + output - 1) // 16)
            assert -(-pages // chunk) * engine.model_config.num_layers > engine.store.pool.num_chunks
    finished = {}
    for _ in range(4 * sum(o for _, o in load) + 4 * len(load) + 4):
        finished.update({o.request_id: len(o.token_ids) for o in engine.step() if o.finished})
    assert finished == wanted and not engine.has_work()
    assert engine.store.num_free_pages == engine.store.num_pages

"""`vllm_v1` against schedules worked out by hand (notation: `trace.py`). Pages hold 16 tokens."""

from engine.config import SchedulerConfig
from engine.scheduler.policy import token_budget
from tests.engine.scheduler.trace import traced


def v1(num_pages=64, budget=32, **setup):
    return traced(policy="vllm_v1", num_pages=num_pages, max_batched_tokens=budget, **setup)


def test_a_prompt_is_cut_at_the_budget_and_the_next_takes_what_is_left():
    """Budget 32: A's 40 tokens take a step and a quarter of the next; B's 10 follow in that one."""
    t = v1()
    t.add("A", 40, 3)
    t.add("B", 10, 2)
    assert t.run() == ["A+32", "A+8 B+10", "A B", "A"]


def test_decodes_take_one_token_of_the_budget_each():
    """A's decode leaves 31 tokens to B's prompt of 70: 22 + 31 + 17. A never waits for it."""
    t = v1()
    t.add("A", 10, 4)
    t.add("B", 70, 2)
    assert t.run() == ["A+10 B+22", "A B+31", "A B+17", "A B"]


def test_more_decodes_than_budget_run_in_order_of_admission():
    """Budget 2, three sequences: C gets no token before A ends."""
    t = v1(budget=2)
    for name in "ABC":
        t.add(name, 1, 3)
    assert t.run() == ["A+1 B+1", "A B", "A B", "C+1", "C", "C"]


def test_pages_are_mapped_as_chunks_are_scheduled():
    """6 pages, budget 17. B's 60 tokens (4 pages) fit beside A (2) at admission; A's third page is there when it needs
    it, because B has only 2 of its pages by then; A ends before B wants the last one: nobody is preempted."""
    t = v1(num_pages=6, budget=17)
    t.add("A", 31, 3)
    t.add("B", 60, 2)
    assert t.run() == ["A+17", "A+14 B+3", "A B+16", "A B+16", "B+17", "B+8", "B"]


def test_admission_needs_room_for_the_whole_sequence():
    """B's first chunk would fit beside A, all of B (4 pages beside 3, of 6) would not: it waits, and C behind it."""
    t = v1(num_pages=6, budget=64)
    t.add("A", 47, 2)
    t.add("B", 60, 1)
    t.add("C", 5, 1)
    assert t.run() == ["A+47", "A", "B+60 C+4", "C+1"]


def test_the_last_running_is_preempted_and_nobody_is_admitted_in_that_step():
    """A (48) and B (47) fill 6 pages as B's second chunk comes due; A needs a fourth. B goes, and comes back when A is
    done, although C (16) would fit earlier: B is at the head of the queue."""
    t = v1(num_pages=6, budget=64)
    t.add("A", 48, 3)
    t.add("B", 47, 3)
    t.add("C", 16, 1)
    assert t.run() == ["A+48 B+16", "A xB", "A", "B+47 C+16", "B", "B"]


def test_one_that_cannot_grow_is_preempted_itself_when_it_is_the_last():
    """A has 2 of 6 pages and a third to come; B's last chunk wants a fourth page and there is none: B is the last, and
    goes itself. A decodes on in the same step."""
    t = v1(num_pages=6, budget=33)
    t.add("A", 31, 4)
    t.add("B", 60, 2)
    assert t.run() == ["A+31 B+2", "A B+32", "A xB", "A", "B+33", "B+27", "B"]


def test_under_priority_a_victims_tokens_go_to_the_first_that_can_use_them():
    """3 pages, budget 4. B (31 tokens) is more urgent and comes behind A, which decodes: B's chunks take 3 tokens. When
    B needs its second page A goes, and B takes 4 in that very step (vLLM: 3, cut before A went). A waits for 2 pages
    until B's last token."""
    t = v1(num_pages=3, budget=4, order="priority")
    t.add("A", 15, 9, priority=1)
    for _ in range(3):
        t.engine.step()
    t.add("B", 31, 2, priority=0)
    chunks = ["A+3 B+1", *["A B+3"] * 5, "B+4 xA", "B+4", "B+4", "B+3", "B"]
    again = ["A+4"] * 5 + ["A+1", "A", "A"]
    assert t.run() == ["A+4"] * 3 + chunks + again


def test_the_watermark_holds_for_admissions_beside_others_only():
    """10 pages, 2 kept: A alone may take 9; B (2 pages, 1 free) waits, C (1 page) too, behind B."""
    t = v1(num_pages=10, budget=4096, watermark=0.2)
    t.add("A", 140, 2)
    t.add("B", 20, 1)
    t.add("C", 5, 1)
    assert t.run() == ["A+140", "A", "B+20 C+5"]


def test_the_default_budgets_are_the_published_ones():
    """vLLM: 2048. Sarathi: 512. vLLM v0: the context, at least 2048."""
    budget = lambda policy, given=None: token_budget(SchedulerConfig(policy, max_num_batched_tokens=given), 4096)  # noqa: E731
    assert [budget("vllm_v1"), budget("chunked"), budget("vllm_v0")] == [2048, 512, 4096]
    assert [budget(p, 100) for p in ("vllm_v1", "chunked", "vllm_v0")] == [100] * 3

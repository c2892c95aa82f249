"""Schedules of `layerkv` and `paged_park`, worked out by hand (notation: `trace.py`). Pages hold 4 tokens, the model
has 3 layers, and a step takes a second unless a test says otherwise."""

import pytest

from engine.config import LayerKVConfig
from engine.errors import ConfigError
from tests.engine.pattern_engine import land_all, pattern_engine
from tests.engine.scheduler.trace import Trace

ALL = (0, 1, 2)  # layers


class Desk(Trace):
    """An engine whose copies land between two steps."""

    def steps(self, count: int) -> list[str]:
        """The lines of so many steps."""
        first = len(self.lines)
        for _ in range(count):
            for out in (True, False):
                land_all(self.engine, out)
            self.engine.step()
        return self.lines[first:]

    def rest(self) -> list[str]:
        """The lines of all that are left."""
        lines = []
        while self.engine.has_work():
            lines += self.steps(1)
        return lines

    def request(self, name: str):
        """By name."""
        return self.engine._live[name]

    def park(self, name: str, end: int) -> None:
        """Pages up to `end` leave, of all layers."""
        request = self.request(name)
        for layer in ALL:
            self.engine.store.park(layer, [request.slot], [request.id], [end])

    def parked(self, name: str) -> list[int]:
        """Pages of each layer that are on the host and not on the device."""
        ranges = self.engine.store.parked[self.request(name).slot]
        return (ranges[:, 1] - ranges[:, 0]).tolist()

    @property
    def plan(self):
        """The last one."""
        return self.engine.executor.plans[-1]


def desk(policy="layerkv", pages=20, seconds=lambda plan: 1.0, page_seconds=0.0, knobs=None, **setup) -> Desk:
    """`pages` of each layer."""
    given = {"host_pages": 300, "async_depth": 0, "preemption": "recompute", "num_slots": 10, **setup}
    knobs = {"weigh_ttft": False} | (knobs or {})
    d = Desk(pattern_engine(pages, policy=policy, layerkv=LayerKVConfig(**knobs), **given))
    d.engine.executor.seconds, d.engine.executor.page_seconds = seconds, page_seconds
    return d


def test_a_prefill_waits_until_the_slack_suffices():
    """Nobody knows lengths yet, so one more token is expected. After k decodes of A its slack is 1.26 (k + 1) - (k + 1)
    seconds: 0.52 and 0.78 when B's prefill of 1 s is looked at first, then 1.04."""
    d = desk(knobs={"tpot_slo": 1.26})
    d.add("A", 8, 9)
    assert d.steps(2) == ["A+8", "A"]
    d.add("B", 8, 2)
    assert d.steps(4) == ["A", "A", "B+8", "A B"]


def test_as_many_prompts_are_admitted_as_fit_into_the_slack():
    """A has 20 tokens to go of 1 s each, and 1.275 s for each: 5.5 s for prefills of 1 s. So five of eight; half a
    second is left, and the rest waits for A's end. A sixth would have made A's mean 1.3 s."""
    knobs = {"tpot_slo": 1.275, "lengths": "oracle"}
    d = desk(pages=40, knobs=knobs, seconds=lambda plan: float(max(1, len(plan.prefills))))
    d.add("A", 8, 21)
    assert d.steps(2) == ["A+8", "A"]
    a = d.request("A")
    for name in "BCDEFGHI":
        d.add(name, 8, 3)
    assert d.rest() == [
        "B+8 C+8 D+8 E+8 F+8", *["A B C D E F"] * 2, *["A"] * 17, "G+8 H+8 I+8", *["G H I"] * 2
    ]  # fmt: skip
    assert (a.token_times[-1] - a.token_times[0]) / 20 == 1.25


def test_without_the_rule_all_are_admitted_at_once():
    """Whatever becomes of A."""
    d = desk(pages=40, knobs={"tpot_slo": 1.275, "lengths": "oracle", "slo_rule": False})
    d.add("A", 8, 21)
    d.steps(2)
    for name in "BCDEFGHI"[:7]:
        d.add(name, 8, 3)
    assert d.steps(1) == ["B+8 C+8 D+8 E+8 F+8 G+8 H+8"]


@pytest.mark.parametrize("lost, lines", [("ignore", ["B+8", "A B"]), ("block", ["A", "A", "B+8", "B"])])
def test_a_request_whose_objective_is_lost(lost, lines):
    """A takes 1 s per token and should take 0.9: it does not count, or nobody starts before its end."""
    d = desk(knobs={"tpot_slo": 0.9, "lost": lost, "lengths": "oracle"})
    d.add("A", 8, 4)
    d.steps(2)
    d.add("B", 8, 2)
    assert d.steps(len(lines)) == lines


def test_a_prompt_that_would_be_late_takes_the_objective_of_one_other():
    """A has 20 tokens to go of 1 s each and 1.04 s for each: 0.8 s of slack, and a prefill takes 1 s. B comes at 2 s
    and has to be ready by 7 s: it waits as long as a step and another prefill could come before it, until 5 s."""
    knobs = {"tpot_slo": 1.04, "lengths": "oracle", "weigh_ttft": True, "ttft_slo": 5.0}
    d = desk(knobs=knobs)
    d.add("A", 8, 21)
    assert d.steps(2) == ["A+8", "A"]
    d.add("B", 8, 2)
    b = d.request("B")
    assert d.steps(5) == ["A", "A", "A", "B+8", "A B"]
    assert b.token_times[0] - b.arrival == 4.0


def test_a_late_prompt_does_not_take_two_objectives():
    """As above, but A and C would lose theirs: B waits until they have ended."""
    knobs = {"tpot_slo": 1.04, "lengths": "oracle", "weigh_ttft": True, "ttft_slo": 5.0}
    d = desk(knobs=knobs)
    d.add("A", 8, 11)
    d.add("C", 8, 11)
    assert d.steps(2) == ["A+8 C+8", "A C"]
    d.add("B", 8, 2)
    assert d.rest() == [*["A C"] * 9, "B+8", "B"]


@pytest.mark.parametrize("page_seconds, parked", [(0.05, [0, 1, 2]), (0.1, [0, 1]), (0.2, [0]), (0.3, [])])
def test_the_fewest_layers_stay_for_which_the_others_leave_in_time(page_seconds, parked):
    """Eqs 3 and 4. A prefill of 16 tokens takes 1 s and writes 4 pages of each layer: 0.2, 0.4, 0.8 and 1.2 s of the
    link for each layer. Before either is known all leave (A), then none (B)."""
    d = desk(knobs={"retain": "minimum"}, page_seconds=page_seconds)
    found = []
    for name in "ABC":
        d.add(name, 16, 2)
        assert d.steps(1) == [f"{name}+16"]
        found.append([move.layer for stream in d.plan.streams for move in stream.sends])
        d.rest()
    assert found == [[0, 1, 2], [], parked]


@pytest.mark.parametrize("layerwise, lines", [(True, ["A+32 B+16", "A", "A B"]), (False, ["A+32", "A", "A"])])
def test_a_prompt_is_admitted_with_its_layers_away(layerwise, lines):
    """A has 24 of 30 pages, and 27 when it decodes. B takes 12, or none when all of it leaves, and 3 for its next
    token, when the engine has heard that its layers have landed."""
    d = desk(pages=10, knobs={"layerwise": layerwise, "slo_rule": False, "stream": "always", "forecast": False})
    d.add("A", 32, 9)
    d.add("B", 16, 3)
    assert d.steps(3) == lines


def test_chunks_of_a_sequence_with_layers_away_end_with_a_page():
    """Budget 10 of 22 tokens. The next chunk waits until the one before has landed, and so does the first decode."""
    d = desk(max_batched_tokens=10, knobs={"chunked": True, "retained_layers": 1, "slo_rule": False})
    d.add("A", 22, 2)
    assert [d.steps(1) for _ in range(7)] == [["A+8"], [], ["A+8"], [], ["A+6"], [], ["A"]]


def test_one_prompt_after_the_other_is_computed_in_chunks():
    """B starts when A has all of its 18 tokens, with what A's decode leaves of a budget of 10."""
    d = desk(max_batched_tokens=10, knobs={"chunked": True, "retained_layers": 3, "slo_rule": False})
    d.add("A", 18, 3)
    d.add("B", 8, 2)
    assert d.steps(4) == ["A+10", "A+8", "A B+8", "A B"]


def test_chunks_of_a_sequence_that_stays_take_no_transient_pages():
    """B streams 9 of the 15 there are, and C's second chunk ends with its ninth page."""
    d = three(prompt=36, stream="always", chunked=True, **NOT_HOME)
    d.engine.abort("C")
    d.park("B", 9)
    d.steps(2)
    d.engine.policy.max_batched_tokens = 20
    d.add("D", 36, 2)
    assert d.steps(2) == ["A B D+18", "A B D+18"]


def test_what_the_forecast_lacks_is_parked_newest_first():
    """81 pages, 36 of them held: 45 free. Each of three sequences begins 6 more pages in each of 3 layers before the
    first ends: 9 too few, and the low mark is 4. C's three layers of 4 pages and one of B's are 16, enough for 13."""
    marks = {"low_watermark": 0.05, "high_watermark": 0.15}
    d = desk(pages=27, knobs={"lengths": "oracle", "slo_rule": False, **marks})
    for name in "ABC":
        d.add(name, 16, 24)
    assert d.steps(2) == ["A+16 B+16 C+16", "A B C"]
    slots = {d.request(name).slot: name for name in "ABC"}
    table = d.engine.store.table
    left = {
        (name, move.layer)
        for move in d.plan.moves
        for slot, name in slots.items()
        if set(table[slot, move.layer, :4].tolist()) <= set(move.pages.tolist())
    }
    assert left == {("C", 0), ("C", 1), ("C", 2), ("B", 0)} and sum(len(m.pages) for m in d.plan.moves) == 16
    d.steps(1)
    assert (d.parked("A"), d.parked("B"), d.parked("C")) == ([0, 0, 0], [4, 0, 0], [4, 4, 4])


def three(prompt=13, third=None, page_seconds=0.2, **knobs) -> Desk:
    """A, B and C have decoded together; copies take `page_seconds`. Steps of one row and of three were seen to take a
    second. `prompt` tokens of B, `third` of C (None: as many)."""
    d = desk(pages=50, page_seconds=page_seconds, knobs={"slo_rule": False, **knobs}, streamed=1)
    d.add("A", 8, 40)
    d.steps(4)
    d.add("B", prompt, 60 - prompt)
    d.add("C", third or prompt, 60 - prompt)
    d.steps(1 + (prompt > 32) + 3)
    assert d.lines[-1] == "A B C"
    return d


def test_the_oldest_comes_home_first_layer_by_layer():
    """B and C are parked, 4 pages of each layer. Beside a step of 1 s the link brings 5 pages: one layer, first the one
    between the others. Whoever is at home again decodes."""
    d = three(forecast=False)
    for name in "BC":
        d.park(name, 4)
    d.steps(2)  # until the engine has heard of the landing
    homes = []
    for _ in range(6):
        d.steps(1)
        homes.append((d.parked("B"), d.parked("C")))
    gone, three_left = [0, 0, 0], [4, 4, 4]
    assert homes == [
        ([4, 0, 4], three_left), ([0, 0, 4], three_left), (gone, three_left),
        (gone, [4, 0, 4]), (gone, [0, 0, 4]), (gone, gone),
    ]  # fmt: skip
    assert d.lines[-6:] == ["A", "A", "A B", "A B", "A B", "A B C"]


NOT_HOME = {"layerwise": False, "low_watermark": 0.0, "high_watermark": 0.99}  # nothing leaves or comes home by itself


@pytest.mark.parametrize("stream, rows", [("hidden", "A C"), ("urgent", "A"), ("always", "A B C"), ("never", "A")])
def test_which_parked_rows_decode(stream, rows):
    """12 pages of B and 3 of C are parked; 5 come while A decodes. Nobody's objective is at stake. When A has gone they
    all decode, whatever the mode: there is nothing to hide under."""
    d = three(third=1, stream=stream, **NOT_HOME)
    d.park("B", 4)
    d.park("C", 1)
    d.steps(2)
    assert d.steps(1) == [rows]
    d.engine.abort("A")
    assert d.steps(1) == ["B C"]


def test_parked_rows_that_do_not_fit_together_take_turns():
    """B and C have 9 parked pages each, and 15 can be streamed."""
    d = three(prompt=36, stream="always", **NOT_HOME)
    for name in "BC":
        d.park(name, 9)
    d.steps(2)
    assert d.steps(4) == ["A B", "A C", "A B", "A C"]


def test_a_parked_row_decodes_when_its_objective_is_at_stake():
    """B may take 1.5 s per token, and one more is expected: after n tokens since its first, in t seconds, its slack is
    1.5 (n + 1) - t - 1. It waits while that is 1.5 or more: two steps of three it decodes."""
    d = three(stream="urgent", tpot_slo=1.5, **NOT_HOME)
    d.engine.abort("C")
    d.park("B", 4)
    d.steps(2)
    b, lines = d.request("B"), []
    for _ in range(9):
        n, t = len(b.output) - 1, d.engine.clock.now() - b.token_times[0]
        (line,) = d.steps(1)
        assert line == ("A B" if 0 <= 1.5 * (n + 1) - t - 1 < 1.5 else "A")
        lines.append(line)
    assert lines == ["A", "A", "A B", "A", "A B", "A B", "A", "A B", "A B"]


def test_whole_requests_are_parked_for_a_prompt_and_come_back_first_come():
    """8 pages of each layer, all held by A and B after a decode. C needs two: B, the newer, goes; it comes back when C
    has ended, with 14 tokens, into the 4 pages that are free then."""
    d = desk("paged_park", pages=8, knobs={"slo_rule": False})
    d.add("A", 12, 5)
    d.add("B", 12, 4)
    assert d.steps(2) == ["A+12 B+12", "A B"]
    d.add("C", 8, 2)
    assert d.rest() == ["C+8 >B", "A C", "A B <B", "A B"]


def test_more_layers_than_the_model_has_cannot_stay():
    """One line, when the engine is made."""
    with pytest.raises(ConfigError, match=r"^layerkv retained_layers=4: the model has 3$"):
        desk(knobs={"retained_layers": 4})

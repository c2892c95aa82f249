"""Times steps of the real executor by bucket: plans made here, submitted and collected as the engine does it.

Each *point* is a batch: so many decode rows at some contexts, so many prompts cut into query tiles. Its sequences are
opened in the engine's own store, whose pages hold whatever they hold; a first small step brings the page table, then
the point's steps follow each other, one submitted ahead. Points take turns in an order drawn anew every round, so that
whatever else the machine does falls on all of them; what other processes visibly disturbed is dropped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import ConfigError
from engine.executor.packing import FROM_DEVICE, Bucket, Packer
from engine.request import SamplingParams
from engine.scheduler.plan import Plan, Prefill
from engine.scheduler.state import NOBODY
from experiments.quiet import Others

if TYPE_CHECKING:
    from engine.engine import Engine

NO_DELTAS = np.empty((0, 4), np.int32)
CONTEXTS = (0, 1 / 4, 1 / 2, 1)  # at which a bucket of rows is timed, as shares of the longest that fits
LONG_ROWS = (1 / 8, 1 / 4, 1 / 2, 1)  # likewise, of one long row among short ones
GROUP = 0.2  # seconds of steps for which it is known whether others disturbed them
DECODES = 4  # decode steps of a point in a round; of prefills there is one


@dataclass(frozen=True)
class Point:
    """A batch that is timed."""

    contexts: tuple[int, ...] = ()  # tokens each decode row attends to
    prefills: tuple[tuple[int, int], ...] = ()  # (tokens before, new tokens)
    skewed: bool = False  # rows of unequal length


@dataclass
class Samples:
    """What was measured of one thing, seconds."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The middle one."""
        return float(np.median(self.seconds))

    def entry(self) -> dict[str, Any]:
        """For a device file: median, count, and spread = (third - first quartile) / median."""
        low, high = np.percentile(self.seconds, (25, 75))
        spread = float((high - low) / self.median) if self.median else 0.0
        return {"seconds": float(f"{self.median:.5g}"), "count": len(self.seconds), "spread": float(f"{spread:.3g}")}


class StepTimer:
    """Runs points on an engine that serves nothing meanwhile."""

    def __init__(self, engine: Engine):
        self._executor, self._store = engine.executor, engine.store
        self._vocab = engine.model_config.vocab_size
        self._rng = np.random.default_rng(0)

    def time(self, point: Point, repeats: int) -> list[float]:
        """Seconds of `repeats` steps of a point, each submitted while the one before it runs."""
        open_ = self._store.open
        decode = np.array([open_(context) for context in point.contexts], np.int32)
        slots = [open_(start + new) for start, new in point.prefills]
        plan = self._plan(decode, point, slots)
        first = int(decode[0]) if len(decode) else slots[0]
        primer = self._plan(np.array([first], np.int32), Point((1,)), [], self._store.take_deltas())
        results, ticket = [], self._executor.submit(primer)
        for _ in range(repeats):
            following = self._executor.submit(plan)
            results.append(self._executor.collect(ticket))
            ticket = following
        results.append(self._executor.collect(ticket))
        for slot in (*decode.tolist(), *slots):
            self._store.close(slot)
        return [result.end - result.start for result in results[1:]]

    def _plan(self, decode: np.ndarray, point: Point, slots: list[int], deltas: np.ndarray = NO_DELTAS) -> Plan:
        """A greedy step of a point whose sequences have these slots."""
        tokens = np.full(len(decode), FROM_DEVICE, np.int32)
        prefills = tuple(
            Prefill(slot, start, self._rng.integers(0, self._vocab, new).astype(np.int32), True)
            for slot, (start, new) in zip(slots, point.prefills, strict=True)
        )
        positions = np.array(point.contexts, np.int32) - 1
        return Plan(1, decode if len(decode) else NOBODY, tokens, positions, prefills, deltas, None, None)


def points_of(bucket: Bucket, packer: Packer, pool: int, max_context: int) -> list[Point]:
    """What is timed of a bucket.

    Args:
      pool: tokens that the KV pool holds when every sequence ends with a page.
      max_context: of one sequence; both are whole pages.

    Raises:
      ConfigError: the pool or the slots are too few to fill the bucket.
    """
    rows = min(bucket.rows, packer.num_slots)
    if not bucket.tiles:
        return _row_points(rows, pool, max_context)
    count = rows and min(rows, packer.num_slots // 2)  # decode rows that leave slots for prompts
    short = _shortest(pool // packer.num_slots)
    room, slots = pool - count * short, packer.num_slots - count
    return [Point((short,) * count, prefills) for prefills in _prompts(bucket, slots, room, max_context)]


def _shortest(longest: int) -> int:
    """Context of the rows that count as short."""
    return max(1, min(16, longest))


def _row_points(rows: int, pool: int, max_context: int) -> list[Point]:
    """Equal rows at several contexts, then one long row among short ones."""
    longest = min(pool // rows, max_context)
    if longest < 1:
        raise ConfigError(f"the KV pool cannot hold {rows} sequences: raise num_pages or lower max_num_seqs")
    short = _shortest(longest)
    contexts = sorted({max(short, int(share * longest)) for share in CONTEXTS})
    points = [Point((context,) * rows) for context in contexts]
    room = min(pool - (rows - 1) * short, max_context)
    long = sorted({int(share * room) for share in LONG_ROWS if int(share * room) > short}) if rows > 1 else []
    return points + [Point((context, *(short,) * (rows - 1)), skewed=True) for context in long]


def _prompts(bucket: Bucket, slots: int, room: int, max_context: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Ways to fill a bucket's tiles: as many prompts as can be, then as few, first without and then with all the cached
    tokens that have room. What attention costs is linear in between."""
    tokens = bucket.tiles * bucket.tile
    most, fewest = min(bucket.tiles, 1 << (slots.bit_length() - 1)) if slots else 0, 1
    while fewest < most and tokens // fewest > max_context:
        fewest *= 2
    if not most or tokens > room or tokens // fewest > max_context:
        raise ConfigError(
            f"{bucket.tiles} query tiles of {bucket.tile} tokens do not fit {room} tokens of KV pool, {slots} slots "
            f"and a context of {max_context}: raise num_pages, or lower max_tiles or query_tile in --config"
        )
    new, start = tokens // fewest, min(room // fewest, max_context) - tokens // fewest
    ways = [((0, tokens // most),) * most, *(((s, new),) * fewest for s in (0, start))]
    yield from dict.fromkeys(ways)


def attended(point: Point, packer: Packer) -> int:
    """Tokens that a point attends to, as `step_tables` counts them."""
    if point.prefills:
        return sum(end for start, new in point.prefills for end in packer.tile_ends(start, new))
    return sum(point.contexts)


def timed_buckets(engine: Engine) -> dict[Bucket, list[Point]]:
    """Every bucket that some policy's plans can need, and what is timed of it."""
    packer, size = engine.executor.packer, engine.store.page_size
    per_layer = engine.num_pages // engine.store.pages_per_chunk // engine.model_config.num_layers
    pages = per_layer * engine.store.pages_per_chunk - packer.num_slots  # every sequence may waste most of a page
    context = engine.max_context // size * size
    return {bucket: points_of(bucket, packer, pages * size, context) for bucket in packer.buckets(mixed=True)}


@dataclass
class Timed:
    """What rounds of points brought."""

    samples: dict[Point, Samples]
    rounds: int = 0
    others: float = 0.0  # mean share of the CPUs that others took while these were measured
    dropped: int = 0  # groups of steps that they disturbed

    def add(self, more: Timed) -> None:
        """Takes in what later rounds of the same points brought."""
        for point, samples in more.samples.items():
            self.samples.setdefault(point, Samples()).seconds.extend(samples.seconds)
        rounds = self.rounds + more.rounds
        self.others = (self.others * self.rounds + more.others * more.rounds) / rounds if rounds else 0.0
        self.rounds, self.dropped = rounds, self.dropped + more.dropped


def time_rounds(
    timer: StepTimer, points: Sequence[Point], seconds: float, rng: np.random.Generator, others: Others
) -> Timed:
    """Rounds of all points until so much time has been measured, at least two. What compiles comes before. Steps that
    others disturb are dropped and timed again, as long as there is patience."""
    for point in points:
        timer.time(point, 1)
    found, spent, taken = Timed({point: Samples() for point in points}), 0.0, 0.0
    while found.rounds < 2 or spent < seconds:
        order = [points[i] for i in rng.permutation(len(points))]
        while order:
            others.share()
            start, group = time.perf_counter(), []
            while order and time.perf_counter() - start < GROUP:
                point = order.pop()
                group.append((point, timer.time(point, 1 if point.prefills else DECODES)))
            wall = time.perf_counter() - start
            if others.disturb():
                found.dropped += 1
                order += [point for point, _ in group]
                continue
            for point, times in group:
                found.samples[point].seconds += times
            spent, taken = spent + wall, taken + wall * others.last
        found.rounds += 1
    found.others = taken / spent
    return found


def host_seconds(engine: Engine, timer: StepTimer, rows: int, tokens: int) -> tuple[float, float]:
    """What the engine's loop adds to a decode step of so many rows, beside steps of the same batch run here: medians of
    `tokens` steps, seconds (from the end of one step to that of the next, less the step)."""
    prompts = [[1] * 8] * rows
    engine.step_log.clear()
    engine.generate(prompts, SamplingParams(max_tokens=tokens, ignore_eos=True))
    ends = [record.end for record in engine.step_log if record.num_decode == rows]
    own = np.median(timer.time(Point((8 + tokens // 2,) * rows), tokens))
    return float(np.median(np.diff(ends))), float(own)

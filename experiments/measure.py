"""What a batch of equally long prompts costs: one definition of prefill and decode for every engine.

prefill   seconds from handing over the batch until every sequence has its first token
decode    tokens that became known after that moment / seconds since then
idle      share of the time of our steps in which the device had nothing to do
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.metrics import StepRecord
from engine.request import SamplingParams

if TYPE_CHECKING:
    from engine import Engine


@dataclass(frozen=True)
class Timing:
    """One run of one side."""

    prefill_s: float
    decode_tokens_s: float  # tokens per second, all sequences together
    tokens: list[list[int]]


Side = Callable[[list[list[int]], int], Timing]


def timing(times: Sequence[float], counts: Sequence[int], tokens: list[list[int]]) -> Timing:
    """Applies the definition to `counts[i]` tokens known `times[i]` seconds after the start (all sequences)."""
    batch = len(tokens)
    first = next(i for i, n in enumerate(counts) if n >= batch)  # every sequence has its first token
    return Timing(times[first], (counts[-1] - counts[first]) / (times[-1] - times[first]), tokens)


def idle_share(steps: Sequence[StepRecord]) -> float:
    """Share of the time between the ends of the first and the last of these steps, on the device, that it was idle.

    Raises:
      ValueError: steps that did not run on a device, or fewer than two.
    """
    spans = [(s.device_start, s.device_end) for s in steps if s.device_start is not None and s.device_end is not None]
    if len(spans) < max(2, len(steps)):
        raise ValueError(f"{len(spans)} of {len(steps)} steps ran on a device: at least two, and all, are wanted")
    return sum(b[0] - a[1] for a, b in itertools.pairwise(spans)) / (spans[-1][1] - spans[0][1])


def our_side(engine: Engine) -> Side:
    """Runs a batch through `add_request` and `step`."""

    def run(prompts: list[list[int]], new_tokens: int) -> Timing:
        params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
        now, start = engine.clock.now, engine.clock.now()
        ids = [engine.add_request(p, params) for p in prompts]
        times, counts, num_tokens = [], [], 0
        seen: set[str] = set()
        done: dict[str, list[int]] = {}
        while engine.has_work():
            outputs = engine.step()
            seen.update(o.request_id for o in outputs)
            num_tokens += len(outputs)
            counts.append(num_tokens if len(seen) == len(ids) else 0)  # 0: some sequence has no token yet
            times.append(now() - start)
            done.update((o.request_id, o.token_ids) for o in outputs if o.finished)
        return timing(times, counts, [done[i] for i in ids])

    return run

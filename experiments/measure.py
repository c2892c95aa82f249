"""What a batch of equally long prompts costs: one definition of prefill and decode for every engine.

prefill   seconds from handing over the batch until every sequence has its first token
decode    tokens that became known after that moment / seconds since then
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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

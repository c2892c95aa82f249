"""A step as a value object: what the scheduler decided and an executor carries out. No JAX here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from engine.memory.moves import Copy, Move, Stream


@dataclass(frozen=True, slots=True)
class Prefill:
    """Tokens of one sequence whose KV this step computes."""

    slot: int
    start: int  # position of the first of them: tokens before it are in the cache
    tokens: np.ndarray  # int32 [n]
    samples: bool  # True: the prompt ends here, so the step yields its next token


@dataclass(frozen=True, slots=True)
class Plan:
    """One step. Sampled rows (R) are the decode rows, then the prefills that sample, in this order."""

    step: int
    decode_slots: np.ndarray  # int32 [B]
    decode_tokens: np.ndarray  # int32 [B]: their input token; -1 = the last one sampled into the slot
    decode_positions: np.ndarray  # int32 [B]: position of that token = tokens in the cache before the step
    prefills: tuple[Prefill, ...]
    deltas: np.ndarray  # int32 [n, 4] page-table changes: layer, slot, index, page
    sampling: np.ndarray | None  # `sampling_rows.ROW` [R]; None: argmax will do for every row
    forced: np.ndarray | None  # int32 [R]: teacher forcing, -1 = take the sampled token; None: nowhere
    moves: tuple[Move, ...] = ()  # all outs before the step writes anything, each in before its layer is read
    streams: tuple[Stream, ...] = ()  # by layer
    num_preempted: int = 0
    repeat: int = 1  # this and the next repeat - 1 steps are identical decodes (the virtual clock fast-forwards)

    def repeated(self, repeat: int, deltas: np.ndarray) -> Plan:
        """This plan of decodes for so many steps, with the table changes of all of them."""
        rows = self.decode_slots, self.decode_tokens, self.decode_positions
        return Plan(self.step, *rows, (), deltas, self.sampling, self.forced, repeat=repeat)

    @property
    def sampled_slots(self) -> np.ndarray:
        """Slots of the sampled rows, int32 [R]."""
        if not self.prefills:
            return self.decode_slots
        ends = [p.slot for p in self.prefills if p.samples]
        return np.concatenate([self.decode_slots, np.asarray(ends, np.int32)]) if ends else self.decode_slots

    @property
    def num_sampled(self) -> int:
        """R: sampled rows."""
        return len(self.decode_slots) + (sum(p.samples for p in self.prefills) if self.prefills else 0)

    @property
    def num_prefill_tokens(self) -> int:
        """Prompt tokens whose KV this step computes."""
        return sum(len(p.tokens) for p in self.prefills) if self.prefills else 0

    @property
    def all_moves(self) -> tuple[Move, ...]:
        """`moves`, and what the streams move, in the order in which they were decided."""
        return (*self.moves, *(move for stream in self.streams for move in stream.moves))

    @property
    def empty(self) -> bool:
        """True when there is nothing to run."""
        return not self.prefills and not len(self.decode_slots) and not self.moves


class StepResult(NamedTuple):
    """What an executor gives back for a plan."""

    tokens: np.ndarray  # int32 [R], in the plan's order of sampled rows
    logits: np.ndarray | None  # float32 [R, V] with capture_logits
    start: float  # seconds on the engine's clock: submitted, and the step before it ended
    end: float  # collected
    logprobs: np.ndarray | None = None  # int32 [R, logprobs.ROW_FIELDS] when some row wants them
    copies: tuple[Copy, ...] = ()  # moves known to have ended since the last result, of any step
    device_start: float | None = None  # dispatched, and the step before it had finished; None: no device
    device_end: float | None = None  # finished, whenever it was collected

"""A request, how its tokens are sampled, its phases and its timestamps."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import ConfigError
from engine.logprobs import MAX_LOGPROBS

if TYPE_CHECKING:
    from engine.output_text import OutputText


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen. `temperature=0` is greedy. Requests of all kinds mix in one batch.

    Raises:
      ConfigError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0  # keep the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the smallest set of most likely tokens with at least this mass
    min_p: float = 0.0  # drop tokens less likely than this share of the most likely one; cuts before top_k and top_p
    seed: int | None = None  # None: derived from the engine's seed and the order of arrival
    max_tokens: int = 128
    min_tokens: int = 0  # no stop token can be drawn, and no stop string counts, among the first ones
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()  # strings that end it; `text` is cut before them. Needs a tokenizer
    ignore_eos: bool = False
    logprobs: int | None = None  # log-probabilities of each token and of this many most likely ones; None: none
    forced_tokens: tuple[int, ...] = ()  # teacher forcing: these tokens are produced, whatever the logits say

    def __post_init__(self):
        def require(ok: bool, what: str) -> None:
            if not ok:
                raise ConfigError(what)

        def integer(name: str, low: int, high: int = 2**31) -> None:
            value = getattr(self, name)
            require(
                isinstance(value, Integral) and low <= int(value) < high,
                f"{name} must be an integer in [{low}, {high}), got {value!r}",
            )

        hot = self.temperature
        require(hot == 0 or 1e-4 <= hot <= 1e4, f"temperature must be 0 (greedy) or in [1e-4, 1e4], got {hot!r}")
        require(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p!r}")
        require(0 <= self.min_p <= 1, f"min_p must be in [0, 1], got {self.min_p!r}")
        integer("top_k", 0)
        integer("max_tokens", 1)
        integer("min_tokens", 0, int(self.max_tokens) + 1)
        if self.logprobs is not None:
            integer("logprobs", 0, MAX_LOGPROBS + 1)
        if self.seed is not None:
            integer("seed", 0)
        for name in ("stop_token_ids", "forced_tokens"):
            value = getattr(self, name)
            ids = isinstance(value, (tuple, list)) and all(isinstance(t, Integral) for t in value)
            require(ids, f"{name} must be a tuple of token ids, got {value!r}")
        strings = isinstance(self.stop, (tuple, list)) and all(isinstance(s, str) and s for s in self.stop)
        require(strings, f"stop must be a tuple of non-empty strings, got {self.stop!r}")

    @property
    def greedy(self) -> bool:
        """True when the most likely token is taken."""
        return self.temperature == 0.0


class Phase(enum.Enum):
    """Where a request is in its life."""

    WAITING = "waiting"  # arrived, or preempted and waiting to be recomputed
    RUNNING = "running"  # holds a slot and pages
    SWAPPED = "swapped"  # preempted, its KV on the host
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Request:
    """One request. Times are seconds on the engine's clock; None until they happen."""

    id: str
    prompt: np.ndarray  # int32 [T]
    params: SamplingParams
    arrival: float  # t0: when it was due, not when it was handed over
    number: int = 0  # how many the engine took before it: breaks ties
    priority: int = 0  # lower is more urgent; counts in the order `priority`
    seed: int = 0  # of its sampling key, resolved
    max_length: int = 0  # prompt and output together, resolved against the context
    stop_ids: frozenset[int] = frozenset()  # tokens that end it, the model's own included unless ignored
    phase: Phase = Phase.WAITING
    slot: int = -1  # row of the page table while RUNNING
    output: list[int] = field(default_factory=list)  # tokens produced
    in_flight: int = 0  # tokens that submitted steps will produce
    lost: int = 0  # times its KV was lost with a failed copy: rows submitted before that do not count
    cached: int = 0  # tokens whose KV is on the host while SWAPPED
    token_times: list[float] = field(default_factory=list)  # when each became known to the host
    finish_reason: str | None = None  # stop | length | abort
    stop_reason: int | str | None = None  # the stop token id or string that ended it; None: the model's own, or no stop
    injected: float | None = None  # when the engine learned of it
    scheduled: float | None = None  # when its first prefill was submitted
    finished: float | None = None
    num_preemptions: int = 0
    num_swaps: int = 0  # preemptions that moved its KV to the host; the others dropped it
    logits: list[np.ndarray] = field(default_factory=list)  # float32 [V] per token, with capture_logits
    logprobs: list[np.ndarray] = field(default_factory=list)  # device rows, see `engine.logprobs`
    text: OutputText | None = None  # decoded as it grows, for stop strings and streams
    info: dict[str, Any] = field(default_factory=dict)  # the workload's own columns
    max_output: int = field(init=False)  # tokens it may produce
    may_stop: bool = field(init=False)  # whether a token may end it before that

    def __post_init__(self):
        self.max_output = self.max_length - len(self.prompt)
        self.may_stop = bool(self.stop_ids or self.text)

    @property
    def num_tokens(self) -> int:
        """Prompt and produced tokens."""
        return len(self.prompt) + len(self.output)

    def tokens(self, start: int, end: int) -> np.ndarray:
        """Prompt and produced tokens [start, end), int32: what a prefill computes."""
        size = len(self.prompt)
        if end <= size:
            return self.prompt[start:end]
        return np.concatenate(
            [self.prompt[start:], np.asarray(self.output[max(start - size, 0) : end - size], np.int32)]
        )

"""The serving loop: plan, submit, collect, account. Scheduling runs on the host, outside jit."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from engine.clock import WallClock
from engine.config import EngineConfig, ModelConfig
from engine.errors import RequestError
from engine.memory.moves import Copy, Move
from engine.metrics import RequestMetrics, StepRecord
from engine.output_text import OutputText
from engine.outputs import RequestOutput
from engine.request import Phase, Request, SamplingParams
from engine.scheduler.plan import Plan, StepResult
from engine.scheduler.policy import make_policy
from engine.scheduler.state import SchedulerState
from engine.stopping import check_stop_strings, end_reason, stop_ids
from engine.tokenizer import prompt_ids

if TYPE_CHECKING:
    from engine.executor.memory_plan import MemoryPlan
    from engine.memory.store import KVStore
    from engine.tokenizer import Tokenizer

Prompt = str | Sequence[int] | np.ndarray
STEP_LOG = 1024  # records kept for whoever takes them away


class Executor(Protocol):
    """Carries plans out: on a device, or on a virtual clock."""

    def submit(self, plan: Plan) -> Any:
        """Starts a step and returns a ticket without waiting for results."""
        ...

    def collect(self, ticket: Any) -> StepResult:
        """Waits for a step's results. A copy in that failed is reported with its step at the latest."""
        ...

    def abandon(self, moves: tuple[Move, ...]) -> tuple[Copy, ...]:
        """A step with these moves failed before or in `submit`: forgets what it began. Returns the copies that have
        ended, and as failed the moves that were not started."""
        ...

    def wait_for_copies(self) -> tuple[Copy, ...]:
        """Waits until a copy in flight has ended."""
        ...

    def drop(self, blocks: tuple[int, ...]) -> None:
        """Lets go of host blocks that nobody will ask for."""
        ...

    def poison(self, mask: np.ndarray) -> None:
        """Fills the pages of `mask` bool [P] with NaN (tests)."""
        ...


@dataclass(slots=True)
class InFlight:
    """A submitted step. Its rows belong to these requests, whatever becomes of their slots before it is collected."""

    plan: Plan
    ticket: Any
    rows: list[tuple[Request, int]]  # of the sampled rows, and how often it had lost its KV then
    prefilled: list[Request]


class Engine:
    """Serves requests with one policy over one store and one executor.

    `from_pretrained` builds one; the constructor takes the parts, for tests and other executors.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        memory: MemoryPlan,
        store: KVStore,
        executor: Executor,
        clock: WallClock,
        tokenizer: Tokenizer | None = None,
        source: str = "the model",
    ):
        self.source = source  # directory or preset, for messages
        self.model_config, self.config, self.memory = model, config, memory
        self.store, self.executor, self.clock, self.tokenizer = store, executor, clock, tokenizer
        self.state = SchedulerState(store, config.scheduler.order)
        self.policy = make_policy(config.scheduler, self.state, memory.max_batched_tokens)
        self.step_log: deque[StepRecord] = deque(maxlen=STEP_LOG)  # `popleft` after each step to see them all
        self.compiled: list[tuple[str, float]] = []
        self._copies: list[Copy] = []  # that ended since the last step record
        self._in_flight: deque[InFlight] = deque()
        self._live: dict[str, Request] = {}
        self._inboxes: dict[str, deque[RequestOutput]] = {}  # of requests that `generate` or `stream` wait for
        self._unclaimed: list[RequestOutput] = []  # of everybody else's, until the next `step`
        self._arrivals = 0

    @classmethod
    def from_pretrained(cls, path_or_preset: str, config: EngineConfig | None = None) -> Engine:
        """An engine for a Hugging Face or Orbax directory; or with seeded random weights for a preset, or for a
        ModelConfig of your own: `package.module:Name` or `path/to/file.py:Name`.

        Raises:
          ConfigError: an unknown model, or settings that do not fit it or the machine.
          WeightsError: a checkpoint that cannot be read; names the file and the tensor.
        """
        from engine.builder import build_engine

        return build_engine(cls, path_or_preset, config or EngineConfig())

    @property
    def max_context(self) -> int:
        """Tokens a sequence may have, prompt and output together."""
        return self.memory.max_context

    @property
    def num_pages(self) -> int:
        """Usable pages of the device tier, all layers."""
        return self.store.num_pages

    def memory_table(self) -> str:
        """Where the device's memory goes, for people."""
        return self.memory.table()

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        arrival: float | None = None,
        priority: int = 0,
        info: dict | None = None,
    ) -> str:
        """Queues a request and returns its id. `arrival`: when it was due, seconds on `clock` (default: now);
        `priority`: lower goes first in the order `priority`.

        Raises:
          RequestError: it can never be served; says why. Nothing is queued.
        """
        params = params or SamplingParams()
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params must be SamplingParams, got {type(params).__name__}")
        if not isinstance(priority, int):
            raise RequestError(f"priority must be an integer, got {priority!r}")
        now = self.clock.now()
        tokens = self._tokens(prompt)
        max_length = min(len(tokens) + params.max_tokens, self.max_context)
        request_id = request_id if request_id is not None else f"request-{self._arrivals}"
        self._refuse_impossible(request_id, tokens, params, max_length)
        seed = params.seed if params.seed is not None else (self.config.seed * 1_000_003 + self._arrivals) % 2**31
        request = Request(
            request_id,
            tokens,
            params,
            arrival=now if arrival is None else arrival,
            number=self._arrivals,
            priority=priority,
            seed=seed,
            max_length=max_length,
            stop_ids=stop_ids(params, self.model_config),
            injected=now,
            info=info or {},
            text=OutputText(self.tokenizer, tuple(params.stop)) if params.stop and self.tokenizer else None,
        )
        self._arrivals += 1
        self._live[request_id] = request
        self.state.waiting.push(request)
        return request_id

    def _tokens(self, prompt: Prompt) -> np.ndarray:
        """A prompt as int32 token ids [T]."""
        ids = prompt_ids(prompt, self.tokenizer, self.source) if isinstance(prompt, str) else prompt
        try:
            tokens = np.asarray(ids)
        except ValueError:  # rows of different lengths
            raise RequestError("a prompt must be a string or one flat list of token ids") from None
        if tokens.ndim != 1 or not len(tokens) or tokens.dtype.kind not in "iu":
            raise RequestError(
                f"a prompt must be a string or a non-empty list of token ids, got {tokens.dtype} {list(tokens.shape)}"
            )
        bad = np.flatnonzero((tokens < 0) | (tokens >= self.model_config.vocab_size))
        if len(bad):
            raise RequestError(
                f"token id {tokens[bad[0]]} at position {bad[0]} is outside the vocabulary of "
                f"{self.model_config.vocab_size}"
            )
        return tokens.astype(np.int32)

    def _refuse_impossible(self, request_id: str, tokens: np.ndarray, params: SamplingParams, max_length: int) -> None:
        if request_id in self._live:
            raise RequestError(f"request id {request_id!r} is in use")
        if len(tokens) >= self.max_context:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens; a context of {self.max_context} takes at most "
                f"{self.max_context - 1}"
            )
        vocab = self.model_config.vocab_size
        for name in ("stop_token_ids", "forced_tokens"):
            bad = [t for t in getattr(params, name) if not 0 <= t < vocab]
            if bad:
                raise RequestError(f"{name} {bad[0]} is outside the vocabulary of {vocab}")
        check_stop_strings(params, self.tokenizer, self.source)
        if (params.logprobs or 0) > vocab:
            raise RequestError(f"logprobs={params.logprobs} is more than the vocabulary of {vocab}")
        if not self.store.can_ever_hold(max_length - 1):  # the last token's KV is never needed
            raise RequestError(
                f"{max_length} tokens (prompt {len(tokens)} + output) never fit the KV pool of {self.num_pages} pages"
            )

    def abort(self, request_id: str) -> bool:
        """Ends a request now, whatever its phase. False if it is unknown or has finished."""
        request = self._live.get(request_id)
        if request is None:
            return False
        if request.text is not None:
            request.text.close()
        self._finish(request, "abort", self.clock.now())
        self._drop_blocks()
        return True

    def has_work(self) -> bool:
        """True while a request waits or runs, a step or a copy is in flight, or an output has not been handed out."""
        return bool(self._live or self._unclaimed or self._in_flight or self.store.copies_in_flight)

    def unfinished(self) -> dict[str, RequestMetrics]:
        """The metrics so far of every request that waits or runs, by id."""
        return {request_id: RequestMetrics.from_request(request) for request_id, request in self._live.items()}

    def step(self) -> list[RequestOutput]:
        """Collects one step, after submitting up to `async_depth` more. Returns an output for every request that got a
        token, in it or in a step that `generate` or `stream` ran meanwhile; their own requests' outputs go to them.
        Nothing when there is no work."""
        self._advance()
        outputs, self._unclaimed = self._unclaimed, []
        return outputs

    def _advance(self) -> None:
        """Collects one step and hands each output to whoever waits for it. Whatever fails or interrupts it, the engine
        stays consistent: sequences whose KV may be half written are recomputed."""
        try:
            while len(self._in_flight) <= self.config.async_depth and self._submit():
                pass
            if not self._in_flight and self.store.copies_in_flight:  # nothing can run before one of them lands
                self._account_copies(self.executor.wait_for_copies())
            if self._in_flight:
                self._account(self._in_flight.popleft())
            while self._in_flight and not self._live:  # only late rows are left
                self._account(self._in_flight.popleft())
        except BaseException:
            self._recover()
            raise
        finally:
            self._drop_blocks()

    def _recover(self) -> None:
        """Forgets the steps in flight and puts every running sequence back in the queue, oldest first. What was swapped
        out stays there: a copy lands only if the steps before it have run."""
        for request in self._live.values():
            request.in_flight = 0
            request.cached = min(request.cached, request.num_tokens - 1)  # a token in flight is sampled again
        self._in_flight.clear()
        for slot in self.state.running[::-1].tolist():
            request = self.state.requests[slot]
            assert request is not None
            if request.id in self._live:
                self.state.preempt(slot)
            else:
                self.state.release(slot)

    def _submit(self) -> bool:
        """Plans and submits one step. False when there is nothing to run before a step in flight is collected."""
        unmapped = self.store.unmapped_pages() if self.config.poison else None
        plan = self.policy.plan(self.clock.now())
        if plan.empty:
            return False
        rows = [(request, request.lost) for request in self.state.owners(plan.sampled_slots)]
        for request, _ in rows:
            request.in_flight += 1
        prefilled = self.state.owners([p.slot for p in plan.prefills])
        try:
            if self.config.debug_checks:
                self.state.check()
            if unmapped is not None:
                unmapped[plan.deltas[:, 3]] = True
                for move in plan.moves:
                    unmapped[move.pages] &= not move.out  # still to be read
                self.executor.poison(np.pad(unmapped, (0, self.config.cache.transient_pages)))
            ticket = self.executor.submit(plan)
        except BaseException:
            self._account_copies(self.executor.abandon(plan.all_moves))
            raise
        self._in_flight.append(InFlight(plan, ticket, rows, prefilled))
        return True

    def _account_copies(self, copies: Iterable[Copy]) -> None:
        """Moves that have ended: what landed may be fetched, what failed is recomputed."""
        for copy in copies:
            self._copies.append(copy)
            for request_id in self.store.copied(copy):
                if request_id in self._live:
                    self.state.lose(self._live[request_id])

    def _drop_blocks(self) -> None:
        """Host blocks that nobody will ask for go at once."""
        blocks = self.store.take_freed_blocks()
        if blocks:
            self.executor.drop(blocks)

    def _account(self, step: InFlight) -> None:
        """Waits for a step; phases, metrics and frees follow, and each output goes to whoever waits for it. A row whose
        request has ended meanwhile is dropped."""
        result = self.executor.collect(step.ticket)
        self._account_copies(result.copies)
        for request in step.prefilled:
            if request.scheduled is None:
                request.scheduled = result.start
        num_outputs = num_finished = 0
        for row, ((request, lost), token) in enumerate(zip(step.rows, result.tokens.tolist(), strict=True)):
            if request.lost > lost:  # computed from KV that never arrived
                continue
            request.in_flight -= 1
            if request.phase is Phase.FINISHED:
                continue
            request.output.append(token)
            request.token_times.append(result.end)
            if result.logits is not None:
                request.logits.append(result.logits[row])
            if result.logprobs is not None and request.params.logprobs is not None:
                request.logprobs.append(result.logprobs[row])
            reason = end_reason(request)
            if reason:
                self._finish(request, reason, result.end)
                num_finished += 1
            output = RequestOutput(request, 1, bool(reason), self.tokenizer)
            self._inboxes.get(request.id, self._unclaimed).append(output)
            num_outputs += 1
        if self.config.debug_checks:
            self.state.check()
        self._log(step, result, num_finished, len(step.rows) - num_outputs)

    def _log(self, step: InFlight, result: StepResult, num_finished: int, num_late: int) -> None:
        plan, (copies, self._copies) = step.plan, (tuple(self._copies), [])
        out, back = [c for c in copies if c.ok and c.out], [c for c in copies if c.ok and not c.out]
        self.step_log.append(
            StepRecord(
                step=plan.step,
                start=result.start,
                end=result.end,
                num_decode=len(plan.decode_slots),
                num_prefill_seqs=len(plan.prefills),
                prefill_tokens=plan.num_prefill_tokens,
                num_waiting=len(self.state.waiting),
                num_running=len(self.state.running),
                num_swapped=len(self.state.swapped),
                free_pages=self.store.num_free_pages,
                num_preempted=plan.num_preempted,
                num_finished=num_finished,
                num_late=num_late,
                bytes_out=sum(c.num_bytes for c in out),
                bytes_in=sum(c.num_bytes for c in back),
                seconds_out=sum(c.end - c.start for c in out),
                seconds_in=sum(c.end - c.start for c in back),
                host_bytes=self.store.num_host_pages * self.memory.page_bytes,
                mapped_pages=self.store.num_mapped_pages,
                copies=copies,
            )
        )

    def _finish(self, request: Request, reason: str, now: float) -> None:
        """Ends a request, whatever its phase, and frees what it holds."""
        self.state.drop(request)
        request.phase, request.finish_reason, request.finished = Phase.FINISHED, reason, now
        del self._live[request.id]

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Serves the prompts together and returns their outputs in the order of the prompts.

        Raises:
          RequestError: a prompt can never be served; nothing is queued then.
        """
        if isinstance(prompts, str):
            raise RequestError("prompts is a string: give a list of prompts")
        each = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts but {len(each)} sampling parameters")
        requests: list[Request] = []
        try:
            for prompt, p in zip(prompts, each, strict=True):
                request = self._live[self.add_request(prompt, p)]
                self._inboxes[request.id] = deque(maxlen=1)
                requests.append(request)
            while any(r.phase is not Phase.FINISHED for r in requests):
                self._advance()
        finally:
            self._forget([r.id for r in requests])
        return [RequestOutput(r, 0, True, self.tokenizer) for r in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Serves one prompt, yielding an output for each of its tokens. Leaving the loop early aborts it; it ends when
        the request is aborted. Streams may be interleaved with each other and with `step`."""
        request = self._live[self.add_request(prompt, params)]
        inbox = self._inboxes[request.id] = deque()
        if self.tokenizer is not None and request.text is None:
            request.text = OutputText(self.tokenizer)
        try:
            while inbox or request.phase is not Phase.FINISHED:
                if not inbox:
                    self._advance()
                    continue
                yield inbox.popleft()
        finally:
            self._forget([request.id])

    def _forget(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.abort(request_id)
            del self._inboxes[request_id]

    def warmup(self) -> list[tuple[str, float]]:
        """Compiles every bucket's programs, so that serving compiles nothing. Returns (bucket, seconds) rows; they
        stay in `compiled`."""
        from engine.builder import warm_up

        self.compiled = warm_up(self)
        return self.compiled

"""The serving loop: plan, submit, collect, account. Scheduling runs on the host, outside jit."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from engine.clock import Clock
from engine.config import EngineConfig, ModelConfig
from engine.errors import PolicyError, RequestError
from engine.executor.protocol import Executor, FastForward
from engine.in_flight import InFlight, step_record
from engine.intake import Intake, Prompt
from engine.memory.moves import Copy
from engine.metrics import RequestMetrics, StepRecord
from engine.output_text import OutputText
from engine.outputs import RequestOutput
from engine.request import Phase, Request, SamplingParams
from engine.scheduler.horizon import repeated
from engine.scheduler.plan import Plan, StepResult
from engine.scheduler.policy import Observed, make_policy
from engine.scheduler.state import SchedulerState
from engine.stopping import end_reason, stop_ids

if TYPE_CHECKING:
    from engine.executor.memory_plan import MemoryPlan
    from engine.memory.store import KVStore
    from engine.tokenizer import Tokenizer

STEP_LOG = 1024  # records kept for whoever takes them away


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
        clock: Clock,
        tokenizer: Tokenizer | None = None,
        source: str = "the model",
    ):
        self.source = source  # directory or preset, for messages
        self.model_config, self.config, self.memory = model, config, memory
        self.store, self.executor, self.clock, self.tokenizer = store, executor, clock, tokenizer
        self.state = SchedulerState(
            store,
            config.scheduler.order,
            memory.page_bytes * config.tensor,
            None if config.sim.pipeline > 1 else getattr(executor, "cost", None),
        )
        self.policy = make_policy(config.scheduler, self.state, memory.max_batched_tokens)
        self.step_log: deque[StepRecord] = deque(maxlen=STEP_LOG)  # `popleft` after each step to see them all
        self.compiled: list[tuple[str, float]] = []
        self._copies: list[Copy] = []  # that ended since the last step record
        self._in_flight: deque[InFlight] = deque()
        self._steps_ahead = 0  # submitted and not collected: as many as `_in_flight` stands for
        self._idle: tuple[int, ...] | None = None  # where the last plan with nothing to run left things
        self._live: dict[str, Request] = {}
        self._inboxes: dict[str, deque[RequestOutput]] = {}  # of requests that `generate` or `stream` wait for
        self._unclaimed: list[RequestOutput] = []  # of everybody else's, until the next `step`
        self._arrivals = 0
        self._intake = Intake(model, store, memory.max_context, source, config.executor == "sim")
        self._fast_forward = executor if isinstance(executor, FastForward) else None
        self._horizon = getattr(self.policy, "horizon", lambda plan: 1)
        told = ("observe", "copied", "ended")
        self._observe, self._tell_copied, self._tell_ended = (getattr(self.policy, name, None) for name in told)
        self._quiet_until, self._ends_bring_requests = -math.inf, False  # see `promise_quiet`
        self.partial_outputs = True  # whether `step` returns outputs of requests that go on, too
        self.reads_prompts = self._fast_forward is None  # a simulation only asks how long they are

    @classmethod
    def from_pretrained(cls, path_or_preset: str, config: EngineConfig | None = None) -> Engine:
        """An engine for a Hugging Face or Orbax directory; or with seeded random weights for a preset, or for a
        ModelConfig of your own: `package.module:Name` or `path/to/file.py:Name`. `executor="sim"`: on a virtual clock.

        Raises:
          ConfigError: an unknown model, or settings that do not fit it or the machine.
          WeightsError: a checkpoint that cannot be read; names the file and the tensor.
        """
        config = config or EngineConfig()
        if config.executor == "sim":
            from engine.simulation import build_simulation

            return build_simulation(cls, path_or_preset, config)
        from engine.builder import build_engine

        return build_engine(cls, path_or_preset, config)

    @property
    def max_context(self) -> int:
        """Tokens a sequence may have, prompt and output together."""
        return self.memory.max_context

    @property
    def num_pages(self) -> int:
        """Usable pages of the device tier, all layers."""
        return self.store.num_pages

    def promise_quiet(self, until: float = -math.inf, *, ends_bring_requests: bool = False) -> None:
        """A driver's word that no request comes and none is aborted before `until` (seconds on `clock`), so that a
        virtual clock may pass many steps at once. It holds until the next one; without arguments it is taken back.

        Args:
          ends_bring_requests: but the end of a request may bring another at any time (a closed loop).
        """
        self._quiet_until, self._ends_bring_requests = until, ends_bring_requests

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
        tokens = self._intake.tokens(prompt, self.tokenizer)
        max_length = min(len(tokens) + params.max_tokens, self.max_context)
        request_id = request_id if request_id is not None else f"request-{self._arrivals}"
        if request_id in self._live:
            raise RequestError(f"request id {request_id!r} is in use")
        self._intake.refuse_impossible(tokens, params, max_length, self.tokenizer)
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
        Nothing when there is no work.

        Raises:
          PolicyError: requests are left, nothing is in flight, and the policy schedules none of them.
        """
        self._advance()
        outputs, self._unclaimed = self._unclaimed, []
        return outputs

    def _advance(self) -> None:
        """Collects one step and hands each output to whoever waits for it. Whatever fails or interrupts it, the engine
        stays consistent: sequences whose KV may be half written are recomputed."""
        try:
            depth = self.config.async_depth
            while self._steps_ahead <= depth and self._submit():
                pass
            if not self._in_flight and self.store.copies_in_flight:  # nothing can run before one of them lands
                self._account_copies(self.executor.wait_for_copies())
            elif not self._in_flight and self._live:
                self._check_progress()
            if self._in_flight and self._in_flight[0].left > 1:
                self._pass_steps(self._in_flight[0])
            elif self._in_flight:
                self._account(self._in_flight.popleft())
            while self._in_flight and not self._live:  # only late rows are left
                self._account(self._in_flight.popleft())
        except BaseException:
            self._recover()
            raise
        finally:
            self._drop_blocks()

    def _check_progress(self) -> None:
        """The plan was empty, though nothing is in flight that could change what the policy sees. It may have preempted
        instead of scheduling; a second one that finds things as the first left them would come for ever."""
        state, store = self.state, self.store
        idle = (state.step, len(state.waiting), len(state.running), len(state.swapped), store.num_free_pages)
        if idle == self._idle:
            _, waiting, running, swapped, free = idle
            raise PolicyError(
                f"policy {self.config.scheduler.policy!r} schedules none of {len(self._live)} requests, though nothing "
                f"is in flight: {waiting} waiting, {running} running, {swapped} swapped out, {free} of "
                f"{store.num_pages} pages free"
            )
        self._idle = idle

    def _recover(self) -> None:
        """Forgets the steps in flight and puts every running sequence back in the queue, oldest first. What was swapped
        out stays there: a copy lands only if the steps before it have run."""
        for request in self._live.values():
            request.in_flight = 0
            request.cached = min(request.cached, request.num_tokens - 1)  # a token in flight is sampled again
        self._in_flight.clear()
        self._steps_ahead = 0
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
        if not isinstance(plan, Plan):
            policy = self.config.scheduler.policy
            raise PolicyError(f"policy {policy!r}: plan must return what state.make_plan returns, got {plan!r}")
        if plan.empty:
            return False
        if self._fast_forward is not None and self.clock.now() < self._quiet_until:
            plan = self._repeated(plan, self._fast_forward)
        rows = []
        for request in self.state.owners(plan.sampled_slots):
            request.in_flight += plan.repeat
            rows.append((request, request.lost))
        prefilled = self.state.owners([p.slot for p in plan.prefills])
        try:
            if self.config.debug_checks:
                self.state.check()
            if unmapped is not None:
                unmapped[plan.deltas[:, 3]] = True
                unmapped[0] = False  # the zero page: table entries of pages that are never on the device point to it
                for move in plan.moves:
                    unmapped[move.pages] &= not move.out  # still to be read
                self.executor.poison(np.pad(unmapped, (0, self.config.cache.num_transient), constant_values=True))
            ticket = self.executor.submit(plan)
        except BaseException:
            self._account_copies(self.executor.abandon(plan.all_moves))
            raise
        self._in_flight.append(InFlight(plan, ticket, rows, prefilled))
        self._steps_ahead += plan.repeat
        return True

    def _repeated(self, plan: Plan, executor: FastForward) -> Plan:
        """The plan for as many steps as are like it, when the policy can tell and the executor can pass them."""
        if self._ends_bring_requests and len(plan.decode_slots) != len(self.state.running):
            return plan  # a request ends with the step in flight
        limit = self._horizon(plan)
        count = executor.repeats(plan, limit, self._quiet_until) if limit > 1 else 1
        return repeated(self.state, plan, count) if count > 1 else plan

    def _pass_steps(self, step: InFlight) -> None:
        """Waits for all but the last of the steps that one plan stands for. They end no request."""
        assert self._fast_forward is not None
        count = step.left - 1
        start, times = self._fast_forward.pass_steps(step.ticket, count)
        tokens = [0] * count
        if self._observe is not None:
            self._observe(Observed(step.plan, step.passed, start, times))
        listened = self.partial_outputs or bool(self._inboxes)
        for request, _ in step.rows:
            request.in_flight -= count
            request.output += tokens
            request.token_times += times
            if listened:
                self._hand_out(request, count, False)
        step.passed += count
        step.since = times[-1]
        self._steps_ahead -= count

    def _account_copies(self, copies: Sequence[Copy]) -> None:
        """Moves that have ended: what landed may be fetched, what failed is recomputed."""
        if copies and self._tell_copied is not None:
            self._tell_copied(copies)
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
        self._steps_ahead -= 1
        result = self.executor.collect(step.ticket)
        self._account_copies(result.copies)
        if self._observe is not None:
            start = result.start if step.since is None else step.since
            self._observe(Observed(step.plan, step.passed, start, [result.end]))
        for request in step.prefilled:
            if request.scheduled is None:
                request.scheduled = result.start
        num_late = num_finished = 0
        end, tokens, finished = result.end, result.tokens.tolist(), Phase.FINISHED
        extras = result.logits is not None or result.logprobs is not None
        eventful = extras or self.partial_outputs or bool(self._inboxes)  # of a row that just goes on, too
        for row, (request, lost) in enumerate(step.rows):
            if request.lost > lost:  # computed from KV that never arrived
                num_late += 1
                continue
            request.in_flight -= 1
            if request.phase is finished:
                num_late += 1
                continue
            output = request.output
            if not output and request.slot >= 0:
                self.state.first_token[request.slot] = end
            output.append(tokens[row])
            request.token_times.append(end)
            may_end = request.may_stop or len(output) >= request.max_output
            if not (may_end or eventful):
                continue
            if extras:
                self._keep_extras(request, result, row)
            reason = end_reason(request) if may_end else None
            if reason:
                self._finish(request, reason, end)
                num_finished += 1
            self._hand_out(request, 1, bool(reason))
        if self.config.debug_checks:
            self.state.check()
        copies, self._copies = tuple(self._copies), []
        page_bytes = self.memory.page_bytes
        self.step_log.append(step_record(step, result, copies, self.state, page_bytes, num_finished, num_late))

    def _keep_extras(self, request: Request, result: StepResult, row: int) -> None:
        """What a row brought besides its token."""
        if result.logits is not None:
            request.logits.append(result.logits[row])
        if result.logprobs is not None and request.params.logprobs is not None:
            request.logprobs.append(result.logprobs[row])

    def _hand_out(self, request: Request, num_new: int, finished: bool) -> None:
        """An output for whoever waits for it."""
        mine = request.id in self._inboxes
        if mine or finished or self.partial_outputs:
            inbox = self._inboxes[request.id] if mine else self._unclaimed
            inbox.append(RequestOutput(request, num_new, finished, self.tokenizer))

    def _finish(self, request: Request, reason: str, now: float) -> None:
        """Ends a request, whatever its phase, and frees what it holds."""
        self.state.drop(request)
        request.phase, request.finish_reason, request.finished = Phase.FINISHED, reason, now
        if self._tell_ended is not None and reason != "abort":
            self._tell_ended(request)
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
            request.text, request.may_stop = OutputText(self.tokenizer), True  # `end_reason` feeds it
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
        if self.config.executor == "jax":
            from engine.builder import warm_up

            self.compiled = warm_up(self)
        return self.compiled

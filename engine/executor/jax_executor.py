"""The real executor: carries a plan out on the device.

Device state is the KV arena and the page table (both donated through every program that changes them) and the last
token sampled into each slot, from which the next decode step reads its input. `submit` dispatches, `collect` waits.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from engine.clock import WallClock
from engine.config import EngineConfig, ModelConfig
from engine.executor.packing import Bucket, Packer, SubBatch
from engine.executor.programs import ARENA, Programs
from engine.executor.step_watch import Finish, StepWatch
from engine.executor.transfers import Transfer, Transfers
from engine.logprobs import ROW_FIELDS
from engine.memory.moves import Copy, Move, Stream
from engine.models import tensors
from engine.scheduler.plan import Plan, StepResult
from engine.scheduler.sampling_rows import FIELDS, ROW, need_logprobs, need_sampler
from pallas_kernels import KVSpec, init_arena

DELTA_SIZES = (256, 4096)  # entries of one page-table scatter; more of them take several
NO_WINDOW = np.iinfo(np.int32).max // 2


@dataclass
class Ticket:
    """A submitted step."""

    plan: Plan
    batches: list[SubBatch]
    last_tokens: jax.Array  # int32 [slots + 1], after the step
    logits: list[jax.Array | None]  # per sub-batch
    logprobs: list[jax.Array | None]  # per sub-batch
    start: float
    dispatched: float  # its first program, past what the host does for the step
    finish: Finish


class JaxExecutor:
    """Implements submit / collect over JAX programs. One per engine."""

    def __init__(
        self,
        model: ModelConfig,
        params: Any,
        config: EngineConfig,
        mesh: Mesh,
        spec: KVSpec,
        arena_pages: int,
        num_slots: int,
        table_width: int,
        clock: WallClock,
        view: str,
    ):
        self.model, self.params, self.config, self.mesh, self.clock = model, params, config, mesh, clock
        self._last_end = self._device_end = clock.now()  # of the step collected last: collected, and on the device
        self._watch = StepWatch(clock)
        self._replicated = NamedSharding(mesh, P())
        sharded = NamedSharding(mesh, ARENA)
        self._kv = init_arena(spec, arena_pages, sharded, poison=config.poison)
        self.transfers: Transfers | None = None  # without a host tier
        if config.cache.host_bytes:
            unit_bytes = (config.link_unit_bytes or 0) * config.tensor
            staging_bytes, gbs = config.cache.staging_bytes, config.link_gbs
            self.transfers = Transfers(sharded, spec.page_bytes, clock, gbs, staging_bytes, unit_bytes)
        self._fetched: deque[Transfer] = deque()  # blocks on their way in
        self._transient = arena_pages - config.cache.num_transient  # the first transient page
        self._nothing_parked = lru_cache(None)(lambda b: self._put(np.zeros((b.rows + b.tiles, 3), np.int32)))
        self._table = self._put(np.zeros((model.num_layers, num_slots, table_width), np.int32))
        self._last_tokens = self._put(np.zeros(num_slots + 1, np.int32))  # the last entry is nobody's
        self._layer_index = [self._put(np.int32(i)) for i in range(model.num_layers)]
        windows = model.windows or (None,) * model.num_layers
        self._windows = [self._put(np.int32(NO_WINDOW if w is None else w)) for w in windows]
        self.packer = Packer(num_slots, config.query_tile, config.max_tiles, config.deterministic)
        self.programs = Programs(
            model, mesh, config.attention_backend, config.deterministic, config.capture_logits, view
        )

    def _put(self, array: Any) -> jax.Array:
        """To every device of the mesh. JAX may alias the buffer: hand over fresh arrays and never change them."""
        return tensors.put(array, self._replicated)

    def submit(self, plan: Plan) -> Ticket:
        """Dispatches the plan's programs without waiting for them (for copies it may wait: see `transfers`)."""
        start = self.clock.now()
        incoming = self._move(plan)
        self._apply_deltas(plan.deltas)
        batches = self.packer.pack(plan)
        packed = [self._put(b.packed) for b in batches]
        dispatched = self.clock.now()
        states = [
            self.programs.embed(b.bucket)(self.params, self._last_tokens, p)
            for b, p in zip(batches, packed, strict=True)
        ]
        xs, ropes = [x for x, _ in states], [rope for _, rope in states]
        streams = {s.layer: s for s in plan.streams}
        layers = zip(self.params["layers"], self._layer_index, self._windows, strict=True)
        for number, (weights, index, window) in enumerate(layers):
            self._land(incoming, number)
            stream = streams.get(number)
            for i, batch in enumerate(batches):
                layer = self.programs.layer(batch.bucket)
                parked = self._parked(batch, stream)
                self._kv, xs[i] = layer(
                    weights, self._kv, xs[i], ropes[i], self._table, packed[i], index, window, parked
                )
            for move in stream.sends if stream else ():  # before the next layer takes the transient pages
                cast(Transfers, self.transfers).send(self._kv, move, self._transient)
        logits, logprobs = [], []
        for x, batch, p in zip(xs, batches, packed, strict=True):
            known = self._tail(batch, x, p, plan.sampling) if len(batch.head_rows) else (None, None)
            logits.append(known[0])
            logprobs.append(known[1])
        finish = self._watch.watch(self._last_tokens)
        return Ticket(plan, batches, self._last_tokens, logits, logprobs, start, dispatched, finish)

    def _move(self, plan: Plan) -> deque[Move]:
        """Starts the plan's copies out, before anything of the step is written. Returns its copies in, by layer."""
        if self.transfers is None:
            return deque()
        for move in plan.moves:
            if move.out:
                self.transfers.send(self._kv, move)
        return deque(sorted((m for m in plan.all_moves if not m.out), key=lambda m: m.layer))

    def _parked(self, batch: SubBatch, stream: Stream | None) -> jax.Array | None:
        """Where a sub-batch's rows and tiles find their parked pages, int32 [rows + tiles, 3]; None: nothing is ever
        parked."""
        if not self.config.cache.num_transient:
            return None
        if stream is None:
            return self._nothing_parked(batch.bucket)
        by_slot = np.zeros((self.packer.num_slots, 3), np.int32)
        by_slot[stream.rows[:, 0]] = stream.rows[:, 1:] + (0, 0, self._transient)
        part = batch.bucket.unpack(batch.packed)
        return self._put(by_slot[np.concatenate([part["row_slot"], part["tile_slot"]])])

    def abandon(self, moves: tuple[Move, ...]) -> tuple[Copy, ...]:
        """A step with these moves failed before or in `submit`: forgets what it began. Returns the copies that have
        ended, and as failed the moves that were not started."""
        self._fetched.clear()
        if self.transfers is None:
            return ()
        self.transfers.abandon(moves)
        return self.transfers.take_ended()

    def drop(self, blocks: tuple[int, ...]) -> None:
        """Lets go of host blocks that nobody will ask for."""
        cast(Transfers, self.transfers).drop(blocks)

    def _land(self, incoming: deque[Move], layer: int) -> None:
        """Brings in what this layer is about to read, and has the blocks of the next layers that read any on their way
        meanwhile."""
        if self.transfers is None:
            return
        ahead = {transfer.move.layer for transfer in self._fetched if transfer.move.layer > layer}
        while incoming:
            next_layer = incoming[0].layer
            if next_layer > layer and next_layer not in ahead and len(ahead) >= self.config.prefetch_depth:
                break
            if next_layer > layer:
                ahead.add(next_layer)
            transfer = self.transfers.fetch(incoming.popleft())
            if transfer is not None:
                self._fetched.append(transfer)
        while self._fetched and self._fetched[0].move.layer <= layer:
            transfer = self._fetched.popleft()
            self._kv = self.transfers.land(self._kv, transfer, self._transient if transfer.move.transient else 0)

    def _tail(self, batch: SubBatch, x: jax.Array, packed: jax.Array, sampling: np.ndarray | None):
        """Samples a sub-batch's next tokens into `_last_tokens`; returns its logits when captured and its
        log-probabilities when asked for."""
        rows, logprobs = None, False  # all greedy: another program, without the sampler
        mine = None if sampling is None else sampling.take(batch.plan_rows)
        if mine is not None and need_sampler(mine):
            rows, logprobs = self._put(pack_sampling(batch, mine)), need_logprobs(mine)
        tail = self.programs.tail(batch.bucket, logprobs)
        self._last_tokens, *known = tail(self.params, x, self._last_tokens, packed, rows)
        return known

    def collect(self, ticket: Ticket) -> StepResult:
        """Waits for a step and returns its tokens."""
        tokens = np.array(ticket.last_tokens)[ticket.plan.sampled_slots]
        device_start = max(ticket.dispatched, self._device_end)
        self._device_end = min(ticket.finish.time, self.clock.now())
        logits = logprobs = None
        if self.config.capture_logits:
            logits = by_plan_row(ticket, ticket.logits, np.zeros((len(tokens), self.model.vocab_size), np.float32))
        if any(x is not None for x in ticket.logprobs):
            logprobs = by_plan_row(ticket, ticket.logprobs, np.zeros((len(tokens), ROW_FIELDS), np.int32))
        start, self._last_end = max(ticket.start, self._last_end), self.clock.now()
        copies = self.transfers.take_ended() if self.transfers else ()
        return StepResult(tokens, logits, start, self._last_end, logprobs, copies, device_start, self._device_end)

    def wait_for_copies(self) -> tuple[Copy, ...]:
        """Waits until a copy has ended; there must be one in flight."""
        return cast(Transfers, self.transfers).take_ended(wait=True)

    def _apply_deltas(self, deltas: np.ndarray) -> None:
        at = 0
        while at < len(deltas):
            size = DELTA_SIZES[0] if len(deltas) - at <= DELTA_SIZES[0] else DELTA_SIZES[1]
            part = np.full((size, 4), -1, np.int32)
            taken = deltas[at : at + size]
            part[: len(taken)] = taken
            self._table = self.programs.apply_deltas(self._table, self._put(part))
            at += size

    def poison(self, mask: np.ndarray) -> None:
        """Fills the pages of `mask` bool [P] with NaN (tests)."""
        self._kv = self.programs.poison(self._kv, self._put(mask))

    def buckets(self, mixed: bool) -> list[Bucket]:
        """Every bucket that plans can need."""
        return self.packer.buckets(mixed)

    def warm_up(self, bucket: Bucket) -> None:
        """Compiles a bucket's programs by running them on padding, which writes nothing."""
        packed = self.packer.padding(bucket)
        p = self._put(packed)
        x, rope = self.programs.embed(bucket)(self.params, self._last_tokens, p)
        weights, index, window = self.params["layers"][0], self._layer_index[0], self._windows[0]
        batch = SubBatch(bucket, packed, np.arange(bucket.outputs), np.arange(bucket.outputs))
        parked = self._parked(batch, None)
        self._kv, x = self.programs.layer(bucket)(weights, self._kv, x, rope, self._table, p, index, window, parked)
        for temperature, logprobs in ((0, 0), (1, 0), (1, 1)):
            sampling = np.zeros(bucket.outputs, ROW)
            sampling["temperature"], sampling["logprobs"] = temperature, logprobs
            self._tail(batch, x, p, sampling)
        jax.block_until_ready(self._last_tokens)

    def warm_up_deltas(self) -> None:
        """Compiles the page-table scatters and the copies."""
        for size in DELTA_SIZES:
            part = self._put(np.full((size, 4), -1, np.int32))
            self._table = self.programs.apply_deltas(self._table, part)
        if self.transfers is not None:
            self._kv = self.transfers.warm_up(self._kv)
        jax.block_until_ready(self._table)


def pack_sampling(batch: SubBatch, sampling: np.ndarray) -> np.ndarray:
    """`ROW`s of a sub-batch's sampled rows -> of all its LM-head rows, int32 [outputs, FIELDS]; the rest is greedy."""
    rows = np.zeros(batch.bucket.outputs, ROW)
    rows[batch.head_rows] = sampling
    return rows.view(np.int32).reshape(-1, FIELDS)


def by_plan_row(ticket: Ticket, parts: list[jax.Array | None], out: np.ndarray) -> np.ndarray:
    """Fills `out` [R, ...] from what each sub-batch computed for its LM-head rows."""
    for batch, part in zip(ticket.batches, parts, strict=True):
        if part is not None:
            out[batch.plan_rows] = np.asarray(part)[batch.head_rows]
    return out

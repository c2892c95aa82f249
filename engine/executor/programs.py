"""The device programs of a step: page-table deltas, embedding, one layer, and the tail (LM head and sampling).

The **single-layer program** is the core: one compiled program per bucket serves every layer, with the layer's weights,
index and window as arguments. The KV arena is donated through it and updated in place. Host code calls the programs L
times; nothing here loops over layers. All integers of a sub-batch come in one packed array (`packing.Bucket`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from engine.config import ModelConfig
from engine.executor.packing import FROM_DEVICE, Bucket
from engine.executor.sampling import log_probabilities, most_likely, sample
from engine.models import llama
from pallas_kernels import (
    ATTENTION_KERNELS,
    KVArena,
    KVView,
    PagedView,
    RunView,
    decode_attention,
    prefill_attention,
    write_kv,
)

NO_PAGE = -1  # write_kv skips the token
ARENA = P(None, None, "tensor")  # pages [P, S, K, D] over kv heads
HEAD_BUCKET = 64  # LM-head rows in deterministic mode: one class of float32 matmul shapes


class Programs:
    """Jitted programs of one engine, made once per bucket and kept. Compilation happens at the first call."""

    def __init__(
        self,
        model: ModelConfig,
        mesh: Mesh,
        backend: str | None,
        deterministic: bool,
        capture: bool,
        view: str = "paged",
    ):
        """`view`: see `KVStore`. Raises ConfigError for a backend that cannot be compiled; an explicit choice is never
        replaced."""
        for kernel in ATTENTION_KERNELS:
            kernel.check(backend)
        self.model, self.mesh, self.backend = model, mesh, backend
        self.deterministic, self.capture, self.view = deterministic, capture, view
        # Activations and tokens are whole on every device; the arena stays sharded over kv heads.
        whole, heads = NamedSharding(mesh, P()), NamedSharding(mesh, ARENA)
        per_shape = lambda f, **kw: lru_cache(None)(lambda *static: jax.jit(partial(f, *static), **kw))  # noqa: E731
        self.embed = per_shape(self._embed, out_shardings=whole)
        self.layer = per_shape(self._layer, donate_argnums=(1, 2), out_shardings=(heads, whole))
        self.tail = per_shape(self._tail, out_shardings=whole)
        self.apply_deltas = jax.jit(_apply_deltas, donate_argnums=0)
        self.poison = jax.jit(_poison, donate_argnums=0, out_shardings=heads)

    def _embed(self, bucket: Bucket, params: Any, last_tokens: jax.Array, packed: jax.Array):
        """-> x [T, M], rope tables [T, D/2] twice. T: decode rows, then the tiles' tokens."""
        b = bucket.unpack(packed)
        tokens = b["tile_tokens"].reshape(bucket.tiles, bucket.tile)
        tokens = jnp.where(tokens == FROM_DEVICE, last_tokens[b["tile_slot"]][:, None], tokens)
        rows = jnp.where(b["row_token"] == FROM_DEVICE, last_tokens[b["row_slot"]], b["row_token"])
        tokens = jnp.concatenate([rows, tokens.reshape(-1)])
        positions = b["tile_start"][:, None] + jnp.arange(bucket.tile)
        positions = jnp.concatenate([jnp.maximum(b["row_position"], 0), positions.reshape(-1)])
        return llama.embed(params, tokens), llama.rope_tables(self.model, positions)

    def _layer(
        self,
        bucket: Bucket,
        weights: Any,
        kv: KVArena,  # donated
        x: jax.Array,  # [T, M], donated
        rope: Any,
        table: jax.Array,  # int32 [L, slots, N]
        packed: jax.Array,
        index: jax.Array,  # int32 scalar: which layer
        window: jax.Array,  # int32 scalar
        parked: jax.Array | None = None,  # int32 [rows + tiles, 3]: what of each is streamed; None: nothing ever is
    ) -> tuple[KVArena, jax.Array]:
        """One layer of a sub-batch -> (kv, x)."""
        local = partial(self._attend, bucket)
        heads = P(None, "tensor")
        attend = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(heads, heads, heads, ARENA, P(), P(), P(), P(), P()),
            out_specs=(heads, ARENA),
            check_vma=False,
        )
        written = []

        def write_and_attend(q, k, v):
            o, new_kv = attend(q, k, v, kv, table, packed, index, window, parked)
            written.append(new_kv)
            return o

        with jax.named_scope("layer"):
            x = llama.layer(weights, self.model, x, rope, write_and_attend)
        return written[0], x

    def _attend(self, bucket: Bucket, q, k, v, kv: KVArena, table, packed, index, window, parked):
        """Writes the sub-batch's K and V, then attends. q [T, H, D], k and v [T, K, D] -> o [T, H, D], kv.

        Under shard_map: heads are this device's.
        """
        b = bucket.unpack(packed)
        size, n = kv.spec.page_size, bucket.rows
        streamed = (None, None) if parked is None else (parked[:n], parked[n:])
        view = partial(self._view, table, index)
        rows, tiles = view(b["row_slot"], streamed[0]), view(b["tile_slot"], streamed[1])
        with jax.named_scope("write_kv"):
            within = jnp.arange(bucket.tile)
            positions = (b["tile_start"][:, None] + within).reshape(-1)
            valid = (within < b["tile_length"][:, None]).reshape(-1)
            by_token = lambda rows, tiles: jnp.concatenate([rows, jnp.repeat(tiles, bucket.tile, 0)])  # noqa: E731
            slots = by_token(b["row_slot"], b["tile_slot"])
            away = None if parked is None else by_token(*streamed)  # what is parked as it is written
            positions = jnp.concatenate([b["row_position"], positions])
            valid = jnp.concatenate([b["row_position"] >= 0, valid])
            safe = jnp.where(valid, positions, 0)
            page = jnp.where(valid, view(slots, away).page_ids(safe // size, 1)[:, 0], NO_PAGE)
            kv = write_kv(kv, k, v, page, safe % size)
        scale = self.model.head_dim**-0.5
        options = {"sm_scale": scale, "window": window, "backend": self.backend}
        outs = []
        if bucket.rows:
            with jax.named_scope("decode_attention"):
                outs.append(cast(jax.Array, decode_attention(q[:n], kv, rows, b["row_position"] + 1, **options)))
        if bucket.tiles:
            with jax.named_scope("prefill_attention"):
                tiled = q[n:].reshape(bucket.tiles, bucket.tile, *q.shape[1:])
                o = prefill_attention(tiled, kv, tiles, b["tile_start"], b["tile_length"], **options)
                outs.append(cast(jax.Array, o).reshape(-1, *q.shape[1:]))
        return jnp.concatenate(outs) if len(outs) > 1 else outs[0], kv

    def _view(self, table: jax.Array, layer: jax.Array, slots: jax.Array, parked: jax.Array | None = None) -> KVView:
        """The pages of `slots` int32 [R] in a layer. With runs the table holds the first page of each, and nothing is
        parked."""
        if self.view == "run":
            return RunView(table[layer, slots, 0])
        return PagedView(table, layer, slots, parked)

    def _tail(
        self,
        bucket: Bucket,
        logprobs: bool,
        params: Any,
        x: jax.Array,  # [T, M]
        last_tokens: jax.Array,  # int32 [slots + 1]
        packed: jax.Array,
        rows: jax.Array | None = None,  # int32 [R, FIELDS], see `sampling.unpack`; None: all greedy
    ):
        """LM head over decode rows and tile ends, then the next tokens -> (last_tokens with them in their slots, logits
        float32 [R, V] when captured, log-probabilities int32 [R, ROW_FIELDS] when asked for)."""
        b = bucket.unpack(packed)
        ends = x[bucket.rows :].reshape(bucket.tiles, bucket.tile, x.shape[-1])
        ends = ends[jnp.arange(bucket.tiles), jnp.maximum(b["tile_length"] - 1, 0)]
        x = jnp.concatenate([x[: bucket.rows], ends])
        if self.deterministic:
            x = jnp.pad(x, ((0, max(0, HEAD_BUCKET - bucket.outputs)), (0, 0)))
        logits = llama.head(params, self.model, x)[: bucket.outputs]
        tokens = most_likely(logits) if rows is None else sample(logits, rows)
        tokens = jnp.where(b["out_forced"] >= 0, b["out_forced"], tokens)
        known = log_probabilities(logits, tokens) if logprobs else None
        return last_tokens.at[b["out_slot"]].set(tokens), logits if self.capture else None, known


def _apply_deltas(table: jax.Array, deltas: jax.Array) -> jax.Array:
    """table int32 [L, slots, N] (donated); deltas int32 [n, 4]: layer, slot, index, page; padding has slot = -1."""
    slot = jnp.where(deltas[:, 1] < 0, table.shape[1], deltas[:, 1])  # out of range: dropped
    return table.at[deltas[:, 0], slot, deltas[:, 2]].set(deltas[:, 3], mode="drop")


def _poison(kv: KVArena, mask: jax.Array) -> KVArena:
    """Fills the pages of mask [P] with NaN: nothing may read them before a step has written them."""
    nan = kv.encode(jnp.float32(jnp.nan))
    fill = lambda pages: jnp.where(mask[:, None, None, None], nan, pages)  # noqa: E731
    return replace(kv, k=fill(kv.k), v=fill(kv.v))

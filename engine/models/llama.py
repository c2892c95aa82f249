"""The Llama-family decoder as pure functions: Llama 2 / 3.x, Yi, Mistral, Qwen2, Qwen3; MHA, GQA and MQA.

Parameters are a plain pytree, not stacked over layers (scanning a stack copies every layer's weights at each step):
`{"embed": [V, M], "layers": [{...}] * L, "norm": [M], "head": [M, V]}`, `head` absent when tied to `embed`.
A layer's weights keep heads as an axis, so that they shard: per kv head its G query heads, then k, then v.

The model knows nothing of pages or batches: a layer calls `attend(q, k, v)`, and whoever runs it decides where K and
V go. Linear layers run in the dtype of the weights; norms, rotations, softmax and logits in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.models.rope import apply_rope, rope_tables
from engine.models.tensors import HFPart, TensorSpec

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # q [T,H,D], k [T,K,D], v [T,K,D] -> o [T,H,D]


def definitions(cfg: ModelConfig, tensor: int = 1) -> dict[str, Any]:
    """The `TensorSpec` of every parameter on `tensor` devices, as a pytree with the structure of the parameters.

    Raises:
      ConfigError: the model does not divide into `tensor` equal parts.
    """
    m, v, dtype = cfg.hidden_size, cfg.vocab_size, cfg.dtype
    repeats = kv_repeats(cfg, tensor)

    def whole(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float) -> TensorSpec:
        return TensorSpec(shape, axes, dtype, 0.0, std, (HFPart(name, shape, lambda w: w),))

    specs: dict[str, Any] = {
        "embed": whole("model.embed_tokens.weight", (v, m), ("vocab", None), m**-0.5 if cfg.tie_embeddings else 1.0),
        "layers": [_layer_definitions(cfg, f"model.layers.{i}.", repeats) for i in range(cfg.num_layers)],
        "norm": _norm("model.norm.weight", m, dtype),
    }
    if not cfg.tie_embeddings:
        part = HFPart("lm_head.weight", (v, m), lambda w: w.T)
        specs["head"] = TensorSpec((m, v), (None, "vocab"), dtype, 0.0, m**-0.5, (part,))
    return specs


def kv_repeats(cfg: ModelConfig, tensor: int) -> int:
    """How many devices hold a copy of the same kv head: 1 while there are kv heads for all `tensor` devices.

    Raises:
      ConfigError: heads, ffn or vocabulary do not divide into `tensor` equal parts.
    """
    for name in ("num_heads", "ffn_size", "vocab_size"):
        size = getattr(cfg, name)
        if size % tensor:
            raise ConfigError(f"tensor={tensor} does not divide {cfg.name}'s {name}={size}")
    if cfg.num_kv_heads % tensor and tensor % cfg.num_kv_heads:
        raise ConfigError(
            f"tensor={tensor} neither divides {cfg.name}'s num_kv_heads={cfg.num_kv_heads} nor is a multiple of it"
        )
    return max(1, tensor // cfg.num_kv_heads)


def repeat_kv_heads(repeats: int, w: Any) -> Any:
    """`[..., K, G + 2, D]` -> `[..., K * repeats, G / repeats + 2, D]`, of NumPy or JAX: every kv head stands `repeats`
    times, each with its share of the query heads."""
    xp = np if isinstance(w, np.ndarray) else jnp
    *lead, k, _, d = w.shape
    q = w[..., :-2, :].reshape(*lead, k * repeats, -1, d)
    return xp.concatenate([q, xp.repeat(w[..., -2:, :], repeats, axis=-3)], axis=-2)


def _norm(name: str, size: int, dtype: str) -> TensorSpec:
    return TensorSpec((size,), (None,), dtype, 1.0, 0.0, (HFPart(name, (size,), lambda w: w),))


def _layer_definitions(cfg: ModelConfig, prefix: str, repeats: int) -> dict[str, TensorSpec]:
    m, h, k, d, f, dtype = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.ffn_size, cfg.dtype
    g = cfg.group_size
    heads = {"q": (slice(0, g), h), "k": (slice(g, g + 1), k), "v": (slice(g + 1, g + 2), k)}  # rows of the G+2 axis

    spread = _repeated(repeats)

    def tensor(shape, axes, std, *parts: tuple[str, tuple[int, ...], Callable]) -> TensorSpec:
        packed = tuple(HFPart(prefix + n, s, view) for n, s, view in parts)
        return TensorSpec(shape, axes, dtype, 0.0, std, packed, spread if "kv_heads" in axes else None)

    def qkv_weight(at: slice) -> Callable:
        return lambda w: w[:, :, at].transpose(1, 2, 3, 0)  # [M, K, g, D] -> [K, g, D, M]

    def qkv_bias(at: slice) -> Callable:
        return lambda w: w[:, at]  # [K, g, D]

    specs = {
        "norm1": _norm(prefix + "input_layernorm.weight", m, dtype),
        "qkv": tensor(
            (m, k, g + 2, d),
            (None, "kv_heads", None, None),
            m**-0.5,
            *((f"self_attn.{n}_proj.weight", (c * d, m), qkv_weight(at)) for n, (at, c) in heads.items()),
        ),
        "o": tensor(
            (h, d, m),
            ("heads", None, None),
            (h * d) ** -0.5,
            ("self_attn.o_proj.weight", (m, h * d), lambda w: w.transpose(2, 0, 1)),
        ),
        "norm2": _norm(prefix + "post_attention_layernorm.weight", m, dtype),
        "gate_up": tensor(
            (m, 2, f),
            (None, None, "ffn"),
            m**-0.5,
            ("mlp.gate_proj.weight", (f, m), lambda w: w[:, 0].T),
            ("mlp.up_proj.weight", (f, m), lambda w: w[:, 1].T),
        ),
        "down": tensor((f, m), ("ffn", None), f**-0.5, ("mlp.down_proj.weight", (m, f), lambda w: w.T)),
    }
    if cfg.qkv_bias:
        biases = ((f"self_attn.{n}_proj.bias", (c * d,), qkv_bias(at)) for n, (at, c) in heads.items())
        specs["qkv_bias"] = tensor((k, g + 2, d), ("kv_heads", None, None), 0.1, *biases)
    if cfg.qk_norm:
        specs["q_norm"] = _norm(prefix + "self_attn.q_norm.weight", d, dtype)
        specs["k_norm"] = _norm(prefix + "self_attn.k_norm.weight", d, dtype)
    return specs


@cache
def _repeated(repeats: int) -> Callable[[Any], Any] | None:
    """One function per number of repeats: programs are cached by it."""
    return partial(repeat_kv_heads, repeats) if repeats > 1 else None


def embed(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """`tokens [T] int32` -> `x [T, M]`."""
    return params["embed"][tokens]


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis (arXiv 1910.07467): float32 inside, rounded to x's dtype before the weight."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return weight * normed.astype(x.dtype)


def layer(
    w: dict[str, jax.Array], cfg: ModelConfig, x: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend
) -> jax.Array:
    """One decoder layer.

    Args:
      w: the layer's weights, `params["layers"][i]`.
      x: `[T, M]`, tokens of any number of sequences.
      rope: `rope_tables` of the tokens' positions.
      attend: called once with `q [T, H, D]`, `k [T, K, D]`, `v [T, K, D]` (rotated); returns `o [T, H, D]`.

    Returns:
      `[T, M]`, in x's dtype.
    """
    t, _, k, g, d = x.shape[0], *w["qkv"].shape  # as these weights have them: devices may share a kv head
    g -= 2  # k and v
    with jax.named_scope("qkv"):
        qkv = jnp.einsum("tm,mkgd->tkgd", rms_norm(x, w["norm1"], cfg.norm_eps), w["qkv"])
        if cfg.qkv_bias:
            qkv += w["qkv_bias"]
        q, key, value = qkv[:, :, :g], qkv[:, :, g], qkv[:, :, g + 1]
        if cfg.qk_norm:
            q, key = rms_norm(q, w["q_norm"], cfg.norm_eps), rms_norm(key, w["k_norm"], cfg.norm_eps)
        q, key = apply_rope(q, rope), apply_rope(key, rope)
    with jax.named_scope("attend"):
        o = attend(q.reshape(t, k * g, d), key, value)  # [T, H, D]
    with jax.named_scope("o"):
        # Flat on purpose: as einsum("tkgd,kgdm->tm") XLA transposes the weights at every call on CPU.
        x = x + o.reshape(t, -1) @ w["o"].reshape(-1, x.shape[1])
    with jax.named_scope("ffn"):
        gate_up = jnp.einsum("tm,mcf->tcf", rms_norm(x, w["norm2"], cfg.norm_eps), w["gate_up"])
        return x + (jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1]) @ w["down"]


def head(params: dict[str, Any], cfg: ModelConfig, x: jax.Array) -> jax.Array:
    """Final norm and LM head: `x [R, M]` -> logits `[R, V] float32`."""
    normed = rms_norm(x, params["norm"], cfg.norm_eps)
    if cfg.tie_embeddings:
        return jnp.einsum("rm,vm->rv", normed, params["embed"], preferred_element_type=jnp.float32)
    return jnp.einsum("rm,mv->rv", normed, params["head"], preferred_element_type=jnp.float32)


def dense_attention(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None = None) -> jax.Array:
    """Causal attention within one sequence, the oracle's: O(T^2) memory.

    Args:
      q: `[T, H, D]`; k, v: `[T, K, D]`; query head h reads kv head h // G.
      window: the query at position p sees positions (p - window, p]; None: all up to p.

    Returns:
      `[T, H, D]` in q's dtype; scores and softmax in float32.
    """
    t, heads, d = q.shape
    grouped = q.reshape(t, k.shape[1], -1, d)
    scores = jnp.einsum("tkgd,skd->kgts", grouped, k, preferred_element_type=jnp.float32) * d**-0.5
    distance = jnp.arange(t)[:, None] - jnp.arange(t)[None, :]
    seen = (distance >= 0) & (distance < (window or t))
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1).astype(q.dtype)
    return jnp.einsum("kgts,skd->tkgd", weights, v).reshape(t, heads, d)


def forward(params: dict[str, Any], cfg: ModelConfig, tokens: jax.Array) -> jax.Array:
    """Logits of a whole sequence, `tokens [T] int32` -> `[T, V] float32`: the dense oracle that tests compare with."""
    rope = rope_tables(cfg, jnp.arange(tokens.shape[0]))
    x = embed(params, tokens)
    for w, window in zip(params["layers"], cfg.windows or (None,) * cfg.num_layers, strict=True):
        x = layer(w, cfg, x, rope, partial(dense_attention, window=window))
    return head(params, cfg, x)

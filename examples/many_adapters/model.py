"""Llama as one pure function: layers under `scan`, grouped queries, a KV cache."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the shapes of the weights do not tell.

    Attributes:
      heads: number of query heads.
      kv_heads: number of key and value heads.
      theta: base of the rotary angles.
      eps: added to the mean square in a norm.
    """

    heads: int
    kv_heads: int
    theta: float
    eps: float


def forward(
    params: Params,
    tokens: Array,
    mask: Array,
    cache: tuple[Array, Array] | None = None,
    start: Any = 0,
    *,
    sizes: Sizes,
    last: int = 1,
) -> tuple[Array, tuple[Array, Array]]:
    """Returns the logits of the last tokens, and the cache with all of them.

    Prompts are padded on the left, so that rows of all lengths end together.

    Args:
      params: `embed` `[vocab, d]`, `norm`, and `layers`, each stacked `[layers, ...]`.
      tokens: `[batch, T]`, the tokens from place `start` on.
      mask: `[batch, length]`, which places hold tokens rather than padding.
      cache: keys and values `[layers, batch, length, kv_heads, head]` of the places
        before; None if these tokens are all there is.
      start: the place of the first of `tokens`.
      sizes: static.
      last: how many logits to compute; the head is the largest product.
    """
    batch, count = tokens.shape
    length = mask.shape[1]
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    own = jax.lax.dynamic_slice_in_dim(positions, start, count, axis=1)
    places = start + jnp.arange(count)
    seen = mask[:, None, :] & (jnp.arange(length)[None, :] <= places[:, None])[None]
    x = params["embed"][tokens]
    head = params["layers"]["k"].shape[-1] // sizes.kv_heads
    if cache is None:
        layers = params["layers"]["k"].shape[0]
        empty = jnp.zeros((layers, batch, length, sizes.kv_heads, head), x.dtype)
        cache = (empty, empty)

    def layer(x: Array, inputs: tuple[Params, Array, Array]) -> Any:
        w, keys, values = inputs
        h = _norm(x, w["attn_norm"], sizes.eps)
        q, k, v = (
            (h @ w[name]).reshape(batch, count, -1, head) for name in ("q", "k", "v")
        )
        q, k = (_rotate(y, own, sizes.theta) for y in (q, k))
        keys = jax.lax.dynamic_update_slice_in_dim(keys, k, start, axis=1)
        values = jax.lax.dynamic_update_slice_in_dim(values, v, start, axis=1)
        x = x + _attend(q, keys, values, seen) @ w["o"]
        h = _norm(x, w["mlp_norm"], sizes.eps)
        x = x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]
        return x, (keys, values)

    x, cache = jax.lax.scan(layer, x, (params["layers"], *cache))
    x = _norm(x[:, count - last :], params["norm"], sizes.eps)
    return (x @ params["embed"].T).astype(jnp.float32), cache


def _norm(x: Array, weight: Array, eps: float) -> Array:
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight


def _rotate(x: Array, positions: Array, theta: float) -> Array:
    """Returns `[batch, T, heads, head]` with each head's two halves rotated."""
    half = x.shape[-1] // 2
    angles = positions[..., None] * theta ** (-jnp.arange(half) / half)
    cos, sin = (f(angles)[:, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    one, two = x[..., :half], x[..., half:]
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)


def _attend(q: Array, keys: Array, values: Array, seen: Array) -> Array:
    """Returns `[batch, T, heads * head]`; each key head serves a group of queries."""
    batch, count, heads, head = q.shape
    q = q.reshape(batch, count, keys.shape[2], -1, head)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, keys).astype(jnp.float32)
    scores = jnp.where(seen[:, None, None], scores * head**-0.5, -1e9)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, values)
    return out.reshape(batch, count, heads * head)

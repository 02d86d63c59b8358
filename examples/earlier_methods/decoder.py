"""SmolLM2, a Llama, as pure functions of stacked layers."""

import functools

import jax
import jax.numpy as jnp

from .hooks import NOTHING, Array, Extra, Hooks, Params, prepended, through

EPSILON, THETA = 1e-5, 1e5


def embed(params: Params, tokens: Array) -> Array:
    """Returns the stream `[B, T, D]` before the first layer."""
    return params["embeddings"][tokens]


def predict(
    params: Params,
    x: Array,
    mask: Array,
    *,
    heads: int,
    last: int,
    extra: Extra = NOTHING,
) -> Array:
    """Returns the logits `[B, last, vocabulary]` of the last tokens.

    Args:
      params: stacked `layers`, all or the upper ones, `norm`, and `embeddings`, which
        is the table of the logits too.
      x: `[B, T, D]`, the stream before the first of these layers.
      mask: `[B, T]` bool, where tokens are; rows are padded on the left.
      heads: how many heads the queries have.
      last: how many tokens.
      extra: what a method adds.
    """
    x = run(params["layers"], x, mask, heads=heads, extra=extra)
    return norm(x[:, -last:], params["norm"]) @ params["embeddings"].T


def block(x: Array, mask: Array, own: Params, hooks: Hooks, heads: int) -> Array:
    """Returns the stream `[B, T, D]` after one layer; norms come before its parts."""
    width = own["query"]["kernel"].shape[-1] // heads
    h = norm(x, own["attention_norm"])
    q, k, v = (
        (h @ own[name]["kernel"]).reshape(*x.shape[:2], -1, width)
        for name in ("query", "key", "value")
    )
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    k, v = hooks.keys_values(rotated(k, positions), v)
    h = attended(rotated(q, positions), k, v, mask)
    x = x + hooks.attention(h @ own["output"]["kernel"])
    h = norm(x, own["mlp_norm"])
    h = jax.nn.silu(h @ own["gate"]["kernel"]) * (h @ own["up"]["kernel"])
    return x + hooks.mlp(hooks.hidden(h) @ own["down"]["kernel"])


run = functools.partial(through, block)


def attended(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Returns `[B, T, D]`: tokens see those before them and what precedes them all."""
    added = k.shape[1] - q.shape[1]
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    scores = jnp.einsum("bqgnd,bkgd->bgnqk", q, k) * q.shape[-1] ** -0.5
    back = jnp.arange(q.shape[1])[:, None] - jnp.arange(-added, q.shape[1])
    seen = (back >= 0)[None] & prepended(mask, added)[:, None]
    seen = seen[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(q.dtype).min))
    mixed = jnp.einsum("bgnqk,bkgd->bqgnd", weights, v)
    return mixed.reshape(*mixed.shape[:2], -1)


def rotated(x: Array, positions: Array) -> Array:
    """Returns `[B, T, heads, K]` with the two halves of each head rotated."""
    half = x.shape[-1] // 2
    angles = positions[..., None] * THETA ** -(jnp.arange(half) / half)
    cos, sin = (f(angles)[:, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    one, two = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)


def norm(x: Array, scale: Array) -> Array:
    """Returns `x` over its root mean square on the last axis, scaled."""
    square = (x**2).mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(square + EPSILON) * scale


def from_chat(params: Params) -> Params:
    """Returns the parameters of a scanned and tied `examples.chat.model`."""
    model = params["model"]
    layers = model["layers"]
    attention, mlp = layers["self_attn"], layers["mlp"]
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    return {
        "embeddings": model["embed_tokens"]["embedding"],
        "layers": {
            **{own: attention[name] for own, name in names.items()},
            **{own: mlp[f"{own}_proj"] for own in ("gate", "up", "down")},
            "attention_norm": layers["input_layernorm"]["scale"],
            "mlp_norm": layers["post_attention_layernorm"]["scale"],
        },
        "norm": model["norm"]["scale"],
    }

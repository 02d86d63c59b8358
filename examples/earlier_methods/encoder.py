"""MiniLM, a BERT encoder with a classifier, as pure functions of stacked layers."""

import functools

import jax
import jax.numpy as jnp

from .hooks import NOTHING, Array, Extra, Hooks, Params, prepended, through

EPSILON = 1e-12


def embed(params: Params, ids: Array) -> Array:
    """Returns the stream `[B, T, D]` before the first layer, of ids `[B, T]`."""
    at = params["embeddings"]
    x = at["word"][ids] + at["position"][: ids.shape[1]] + at["token_type"][0]
    return norm(x, at["norm"])


def classify(
    params: Params, x: Array, mask: Array, *, heads: int, extra: Extra = NOTHING
) -> Array:
    """Returns the logits `[B, C]` of the stream before `params["layers"]`.

    Args:
      params: stacked `layers`, all or the upper ones, and `head`.
      x: `[B, T, D]`, the stream before the first of these layers.
      mask: `[B, T]` bool, where tokens are.
      heads: how many heads attention has.
      extra: what a method adds.
    """
    stream = run(params["layers"], x, mask, heads=heads, extra=extra)
    kept = mask[:, :, None].astype(x.dtype)
    pooled = (stream[:, -x.shape[1] :] * kept).sum(1) / kept.sum(1)
    return dense(pooled, params["head"])


def block(x: Array, mask: Array, own: Params, hooks: Hooks, heads: int) -> Array:
    """Returns the stream `[B, T, D]` after one layer; norms come after the sums."""
    parts = (*x.shape[:2], heads, x.shape[-1] // heads)
    q, k, v = (dense(x, own[name]).reshape(parts) for name in ("query", "key", "value"))
    k, v = hooks.keys_values(k, v)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * parts[-1] ** -0.5
    seen = prepended(mask, k.shape[1] - mask.shape[1])[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(x.dtype).min))
    h = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
    x = norm(x + hooks.attention(dense(h, own["output"])), own["attention_norm"])
    h = hooks.hidden(jax.nn.gelu(dense(x, own["up"]), approximate=False))
    return norm(x + hooks.mlp(dense(h, own["down"])), own["output_norm"])


run = functools.partial(through, block)


def dense(x: Array, own: Params) -> Array:
    """Returns `x @ kernel + bias`."""
    return x @ own["kernel"] + own["bias"]


def norm(x: Array, own: Params) -> Array:
    """Returns `x` with mean 0 and variance 1 over its last axis, scaled and shifted."""
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + EPSILON) * own["scale"] + own["bias"]


def from_linen(params: Params) -> Params:
    """Returns the parameters of `examples.sentiment.model` with layers stacked."""
    tables, encoder = params["embeddings"], params["encoder"]
    layers = []
    for i in range(len(encoder)):
        layer = dict(encoder[f"layer_{i}"])
        layers.append(layer.pop("attention") | layer)
    return {
        "embeddings": {
            **{k: tables[k]["embedding"] for k in ("word", "position", "token_type")},
            "norm": tables["norm"],
        },
        "layers": jax.tree.map(lambda *x: jnp.stack(x), *layers),
        "head": params["head"],
    }

"""Decoders with the shapes of public language models, in plain JAX: RMSNorm, rotary
positions, grouped-query attention, a gated feed-forward part or experts, layers scanned
and rematerialised. Only shapes matter here: weights are never made.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a model."""

    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocab: int
    tied: bool = False
    experts: int = 0  # 0: one feed-forward part for all tokens


SHAPES = {
    "Gemma-2B": Shape(2048, 16384, 18, 8, 1, 256, 256_000, tied=True),
    "Gemma-7B": Shape(3072, 24576, 28, 16, 16, 256, 256_000, tied=True),
    "Llama-3-1B": Shape(2048, 8192, 16, 32, 8, 64, 128_256, tied=True),
    "Llama-3-8B": Shape(4096, 14336, 32, 32, 8, 128, 128_256),
    "Llama-3-70B": Shape(8192, 28672, 80, 64, 8, 128, 128_256),
    "Mixtral-8x7B": Shape(4096, 14336, 32, 32, 8, 128, 32_000, experts=8),
}


def weights(shape: Shape, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    """Returns the shapes of the parameters; layers are stacked."""

    def of(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    n, d, f = shape.layers, shape.width, shape.hidden
    each = (n, shape.experts) if shape.experts else (n,)
    layers = {
        "norm_1": of(n, d),
        "q": of(n, d, shape.heads, shape.head),
        "k": of(n, d, shape.kv_heads, shape.head),
        "v": of(n, d, shape.kv_heads, shape.head),
        "o": of(n, shape.heads, shape.head, d),
        "norm_2": of(n, d),
        "gate": of(*each, d, f),
        "up": of(*each, d, f),
        "down": of(*each, f, d),
    }
    if shape.experts:
        layers["router"] = of(n, d, shape.experts)
    head = {} if shape.tied else {"head": of(d, shape.vocab)}
    return {"embed": of(shape.vocab, d), "layers": layers, "norm": of(d), **head}


def _normed(x: Array, scale: Array) -> Array:
    wide = x.astype(jnp.float32)
    root = lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6)
    return (wide * root).astype(x.dtype) * scale


def _turned(x: Array) -> Array:
    """Returns `[batch, length, heads, head]` with rotary positions."""
    half = x.shape[-1] // 2
    rates = 10_000 ** -(jnp.arange(half) / half)
    angles = jnp.arange(x.shape[1])[:, None] * rates
    sin, cos = (f(angles)[:, None].astype(x.dtype) for f in (jnp.sin, jnp.cos))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def fed(h: Array, w: Any) -> Array:
    """Returns the gated feed-forward part."""
    return (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]


def routed(h: Array, w: Any) -> Array:
    """Returns what two experts of each token give, weighted by the router.

    An expert has room for a quarter more than its share of a row's tokens, and drops
    the others: the dispatch of GShard, https://arxiv.org/abs/2006.16668, algorithm 1.
    """
    rows, length, _ = h.shape
    experts = w["router"].shape[-1]
    room = 5 * length // (2 * experts)
    gates = jax.nn.softmax((h @ w["router"]).astype(jnp.float32))
    gates, chosen = lax.top_k(gates, 2)
    chosen = jax.nn.one_hot(chosen, experts, dtype=jnp.int32)
    queue = jnp.cumsum(chosen.reshape(rows, 2 * length, experts), axis=1) - 1
    seats = jax.nn.one_hot(queue.reshape(chosen.shape), room, dtype=h.dtype)
    seats = seats * chosen[..., None].astype(h.dtype)
    sent = jnp.einsum("btkec,btd->becd", seats, h)
    gated = jax.nn.silu(jnp.einsum("becd,edf->becf", sent, w["gate"]))
    gated = gated * jnp.einsum("becd,edf->becf", sent, w["up"])
    out = jnp.einsum("becf,efd->becd", gated, w["down"])
    return jnp.einsum("btkec,btk,becd->btd", seats, gates.astype(h.dtype), out)


def logits(
    params: Any, ids: Array, place: Callable[[Array], Array] = lambda x: x
) -> Array:
    """Returns `[batch, length, vocab]`; `place` lays out the residual stream."""

    def layer(x: Array, w: Any) -> tuple[Array, None]:
        h = _normed(x, w["norm_1"])
        q, k, v = (jnp.einsum("btd,dnh->btnh", h, w[name]) for name in "qkv")
        a = jax.nn.dot_product_attention(_turned(q), _turned(k), v, is_causal=True)
        x = place(x + jnp.einsum("btnh,nhd->btd", a, w["o"]))
        h = _normed(x, w["norm_2"])
        return place(x + (routed if "router" in w else fed)(h, w)), None

    x = place(params["embed"][ids])
    body = jax.checkpoint(layer, prevent_cse=False)
    x, _ = lax.scan(body, x, params["layers"])
    x = _normed(x, params["norm"])
    if "head" in params:
        return x @ params["head"]
    return x @ params["embed"].T


def loss(logits: Array, targets: Array) -> Array:
    """Returns the mean cross-entropy, a slice of the batch's tokens at a time."""
    wide = logits.astype(jnp.float32)
    top = jax.nn.logsumexp(wide, axis=-1)
    return jnp.mean(top - jnp.take_along_axis(wide, targets[..., None], -1)[..., 0])


def batch(rows: int, length: int) -> tuple[Any, Any]:
    """Returns the shapes of a batch of tokens and of its targets."""
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    return ids, ids


def layout(shape: Shape, data: str | None, model: str | None) -> dict[str, Any]:
    """Returns a `PartitionSpec` for each parameter: FSDP over `data`, heads and hidden
    units, or experts, over `model`.
    """
    p = jax.P
    layers = {
        "norm_1": p(),
        "q": p(None, data, model),
        "k": p(None, data, model),
        "v": p(None, data, model),
        "o": p(None, model, None, data),
        "norm_2": p(),
        "gate": p(None, data, model),
        "up": p(None, data, model),
        "down": p(None, model, data),
    }
    if shape.experts:
        cut = {"router": p(), "down": p(None, model, None, data)}
        layers |= cut | dict.fromkeys(("gate", "up"), p(None, model, data))
    head = {} if shape.tied else {"head": p(data, model)}
    return {"embed": p(model, data), "layers": layers, "norm": p(), **head}

"""The decoders of Llama, Mistral, Qwen, SmolLM and Gemma in one Flax module.

    config = DecoderConfig.from_hub(directory)     # or DecoderConfig(vocab=..., ...)
    params = init(key, config)                     # small random models; hub.load reads
    logits = forward(params, tokens, config=config)
    logits, cache = decode(params, tokens, empty_cache(config, 2, 64), config=config)

Parameters have the Hub's names: `model/embed_tokens/embedding`,
`model/layers/self_attn/q_proj/kernel`, `model/norm/scale`, `lm_head/kernel`. Kernels
are `[in, out]`. With `config.scan`, leaves of layers have a first axis for the layer.

What differs from layer to layer (windows, rotary positions) is data, one row a layer,
so one `scan` runs layers of several kinds.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from .decoder_config import DecoderConfig, Rope

Array = jax.Array
Params = dict[str, Any]
Stream = Callable[[Array], Array]
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}


def forward(
    params: Params,
    tokens: Array,
    positions: Array | None = None,
    segments: Array | None = None,
    *,
    config: DecoderConfig,
    last: int | None = None,
    stream: Stream = lambda x: x,
) -> Array:
    """Returns the logits `[batch, length, vocab]`, float32.

    A token sees those before it in its own segment.

    Args:
      params: of `init` or `hub.load`.
      tokens: `[batch, length]`, integers.
      positions: `[batch, length]`; None counts from the beginning of each segment.
      segments: `[batch, length]`, numbers of the documents in a row, 0 for padding;
        None is one document a row. A mask of booleans is the same for one document.
      config: static.
      last: how many tokens at the end to compute logits of; None is all.
      stream: what the residual stream `[batch, length, width]` goes through between
        layers: a sharding constraint on a mesh.
    """
    segments = _as_segments(segments, tokens)
    if positions is None:
        positions = positions_of(segments)
    model = Decoder(config, stream)
    logits, _ = model.apply({"params": params}, tokens, positions, segments, last=last)
    return logits


class Cache(NamedTuple):
    """What `decode` keeps of the tokens so far.

    Attributes:
      keys, values: `[layers, batch, length, kv_heads, head]`.
      segments: `[batch, length]` int32, 1 where a token is, 0 for padding and room.
      start: int32, where the next tokens go.
    """

    keys: Array
    values: Array
    segments: Array
    start: Array


def empty_cache(
    config: DecoderConfig, batch: int, length: int, dtype: Any = jnp.float32
) -> Cache:
    """Returns a cache with room for `length` tokens."""
    shape = (config.layers, batch, length, config.kv_heads, config.head)
    room = jnp.zeros((batch, length), jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), room, jnp.int32(0))


def decode(
    params: Params,
    tokens: Array,
    cache: Cache,
    segments: Array | None = None,
    *,
    config: DecoderConfig,
    last: int | None = 1,
    stream: Stream = lambda x: x,
) -> tuple[Array, Cache]:
    """Returns the logits `[batch, last, vocab]`, float32, and the cache with `tokens`.

    The first call takes the prompts, those that follow a token a row. Prompts of
    several lengths are padded on the left. Where the cache has no room for the tokens,
    the logits are NaN.

    Args:
      params: see `forward`.
      tokens: `[batch, length]`, the tokens after those in the cache.
      cache: of `empty_cache` or of the call before.
      segments: `[batch, length]`, 1 for tokens, 0 for padding; None is all ones.
      config: static.
      last: see `forward`.
      stream: see `forward`.
    """
    segments = _as_segments(segments, tokens)
    before = (cache.segments > 0).sum(axis=1, keepdims=True)
    positions = before + jnp.maximum(jnp.cumsum(segments > 0, axis=1) - 1, 0)
    model = Decoder(config, stream)
    logits, added = model.apply(
        {"params": params}, tokens, positions, segments, cache, last
    )
    has_room = added.start <= cache.segments.shape[1]
    return jnp.where(has_room, logits, jnp.nan), added


def init(key: Array, config: DecoderConfig, dtype: Any = jnp.float32) -> Params:
    """Returns random parameters: normal with deviation 0.02, norms that change nothing.

    `key` is consumed.
    """
    tokens = jnp.zeros((1, 2), jnp.int32)

    @jax.jit
    def drawn(key: Array) -> Params:
        params = Decoder(config).init(key, tokens, tokens, tokens)["params"]
        return jax.tree.map(lambda x: x.astype(dtype), params)

    return drawn(key)


def shapes(config: DecoderConfig, dtype: Any = jnp.float32) -> Params:
    """Returns the parameters as `jax.ShapeDtypeStruct`s."""
    return jax.eval_shape(lambda: init(jax.random.key(0), config, dtype))


def _as_segments(segments: Array | None, tokens: Array) -> Array:
    if segments is None:
        return jnp.ones(tokens.shape, jnp.int32)
    return jnp.asarray(segments, jnp.int32)


def positions_of(segments: Array) -> Array:
    """Returns `[batch, length]`, the places of tokens counted within their segments."""
    places = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    first = jnp.where(segments != before, places, 0)
    return places - jax.lax.cummax(first, axis=1)


class Shared(NamedTuple):
    """What all layers share; `T` tokens, `S` of them and those in the cache.

    Attributes:
      positions: `[batch, T]`.
      seen: `[batch, T, S]` bool, which tokens one may see.
      distance: `[T, S]`, how far back they are.
      start: where the tokens go in the cache; None without a cache.
    """

    positions: Array
    seen: Array
    distance: Array
    start: Array | None


class Own(NamedTuple):
    """What each layer has of its own; with a first axis for the layer in a scan.

    Attributes:
      rates: `[head / 2]`, angles a position.
      window: how many tokens it sees, None if no layer has a window.
      keys, values: `[batch, S, kv_heads, head]` in the cache; None without a cache.
    """

    rates: Any
    window: Any
    keys: Array | None
    values: Array | None


class Norm(nn.Module):
    """Root mean square norm over the last axis, in float32."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        offset = self.config.unit_offset
        start = nn.initializers.zeros if offset else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(mean + self.config.eps)
        if offset:
            return (wide * (1 + scale.astype(jnp.float32))).astype(x.dtype)
        return wide.astype(x.dtype) * scale.astype(x.dtype)


def _dense(x: Array, features: int, bias: bool, name: str) -> Array:
    normal = nn.initializers.normal(0.02)
    return nn.Dense(features, bias, x.dtype, kernel_init=normal, name=name)(x)


class Attention(nn.Module):
    """Causal attention of grouped queries, with the keys and values it adds."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array, own: Own, shared: Shared) -> tuple[Array, Any]:
        c = self.config
        q, k, v = (
            _dense(x, heads * c.head, c.qkv_bias, name).reshape(
                *x.shape[:2], heads, c.head
            )
            for name, heads in (
                ("q_proj", c.heads),
                ("k_proj", c.kv_heads),
                ("v_proj", c.kv_heads),
            )
        )
        if c.qk_norm:
            q, k = Norm(c, name="q_norm")(q), Norm(c, name="k_norm")(k)
        q, k = (_rotated(y, shared.positions, own.rates) for y in (q, k))
        if own.keys is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(
                    old, new.astype(old.dtype), shared.start, axis=1
                )
                for old, new in ((own.keys, k), (own.values, v))
            )
        seen = shared.seen
        if own.window is not None:
            seen = seen & (shared.distance < own.window)
        out = _attended(q, k.astype(q.dtype), v.astype(q.dtype), seen, c)
        out = _dense(out.reshape(*x.shape[:2], -1), c.width, c.out_bias, "o_proj")
        return out, None if own.keys is None else (k, v)


def _rotated(x: Array, positions: Array, rates: Array) -> Array:
    """Returns `[batch, length, heads, head]` with each head's two halves rotated."""
    angles = positions[..., None].astype(jnp.float32) * rates
    cos, sin = (f(angles)[:, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    one, two = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)


def _attended(
    q: Array, k: Array, v: Array, seen: Array, config: DecoderConfig
) -> Array:
    """Returns `[batch, T, kv_heads, group, head]`; a key head serves a group."""
    q = q.reshape(*q.shape[:2], config.kv_heads, -1, config.head)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = scores * (config.query_scale or config.head**-0.5)
    scores = _capped(scores, config.attention_cap)
    scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v)


def _capped(x: Array, cap: float | None) -> Array:
    return x if cap is None else cap * jnp.tanh(x / cap)


class Mlp(nn.Module):
    """The gated feed-forward part."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        gate, up = (
            _dense(x, c.hidden, c.mlp_bias, name) for name in ("gate_proj", "up_proj")
        )
        h = ACTIVATIONS[c.activation](gate) * up
        return _dense(h, c.width, c.mlp_bias, "down_proj")


class Layer(nn.Module):
    """Attention and feed-forward part, each added to the residual stream."""

    config: DecoderConfig
    stream: Stream

    @nn.compact
    def __call__(self, x: Array, own: Own, shared: Shared) -> tuple[Array, Any]:
        norm = functools.partial(Norm, self.config)
        before, behind = "input_layernorm", None
        mlp = "post_attention_layernorm"
        if self.config.post_norms:
            behind, mlp = "post_attention_layernorm", "pre_feedforward_layernorm"
        h = norm(name=before)(x)
        h, added = Attention(self.config, name="self_attn")(h, own, shared)
        x = x + (norm(name=behind)(h) if behind else h)
        h = Mlp(self.config, name="mlp")(norm(name=mlp)(x))
        if self.config.post_norms:
            h = norm(name="post_feedforward_layernorm")(h)
        return self.stream(x + h), added


class Unrolled(nn.Module):
    """Layers one after the other, each with leaves of its own."""

    config: DecoderConfig
    layer: Callable[..., Any]

    @nn.compact
    def __call__(self, x: Array, own: Own, shared: Shared) -> tuple[Array, Any]:
        added = []
        for i in range(self.config.layers):
            each = jax.tree.map(lambda a, i=i: a[i], own)
            x, new = self.layer(name=str(i))(x, each, shared)
            added.append(new)
        return x, jax.tree.map(lambda *new: jnp.stack(new), *added)


class Body(nn.Module):
    """The embeddings, the layers and the last norm."""

    config: DecoderConfig
    stream: Stream

    def setup(self) -> None:
        c = self.config
        normal = nn.initializers.normal(0.02)
        self.embed_tokens = nn.Embed(c.vocab, c.width, embedding_init=normal)
        layer = nn.remat(Layer, prevent_cse=not c.scan) if c.remat else Layer
        if c.scan:
            layer = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
                length=c.layers,
            )
            self.layers = layer(c, self.stream)
        else:
            self.layers = Unrolled(c, functools.partial(layer, c, self.stream))
        self.norm = Norm(c)

    def __call__(
        self, tokens: Array, positions: Array, segments: Array, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        c = self.config
        x = self.embed_tokens(tokens)
        if c.embed_scale != 1:
            x = x * jnp.asarray(c.embed_scale, x.dtype)
        start = None if cache is None else cache.start
        there = segments
        if cache is not None:
            there = jax.lax.dynamic_update_slice_in_dim(
                cache.segments, segments, start, axis=1
            )
        places = jnp.arange(tokens.shape[1]) + (0 if start is None else start)
        distance = places[:, None] - jnp.arange(there.shape[1])
        seen = (segments[:, :, None] == there[:, None]) & (distance >= 0)
        own = Own(
            rates(c, positions),
            windows(c),
            cache and cache.keys,
            cache and cache.values,
        )
        shared = Shared(positions, seen, distance, start)
        x, added = self.layers(self.stream(x), own, shared)
        if cache is not None:
            cache = Cache(*added, there, start + tokens.shape[1])
        return self.norm(x), cache


class Decoder(nn.Module):
    """The whole model; see `forward` and `decode`."""

    config: DecoderConfig
    stream: Stream = lambda x: x

    def setup(self) -> None:
        self.model = Body(self.config, self.stream)
        if not self.config.tied:
            self.lm_head = nn.Dense(
                self.config.vocab,
                use_bias=False,
                kernel_init=nn.initializers.normal(0.02),
                dot_general=_summed_in_float32,
            )

    def __call__(
        self,
        tokens: Array,
        positions: Array,
        segments: Array,
        cache: Cache | None = None,
        last: int | None = None,
    ) -> tuple[Array, Cache | None]:
        x, cache = self.model(tokens, positions, segments, cache)
        x = x if last is None else x[:, x.shape[1] - last :]
        if self.config.tied:
            table = self.model.embed_tokens.embedding
            logits = _summed_in_float32(x, table, (((2,), (1,)), ((), ())))
        else:
            logits = self.lm_head(x)
        return _capped(logits, self.config.logit_cap), cache


def _summed_in_float32(
    x: Array, w: Array, dimensions: Any, precision: Any = None, **_: Any
) -> Array:
    return jax.lax.dot_general(
        x, w, dimensions, precision, preferred_element_type=jnp.float32
    )


def windows(config: DecoderConfig) -> np.ndarray | None:
    """Returns how many tokens each layer sees, None if all see everything before."""
    if not any(config.windows):
        return None
    each = [w or np.iinfo(np.int32).max for w in config.windows]
    return np.broadcast_to(np.array(each, np.int32), config.layers)


def rates(config: DecoderConfig, positions: Array) -> Array:
    """Returns `[layers, head / 2]`, the angles a position; 0 in layers without."""
    kinds = {rope: _rates(rope, config.head, positions) for rope in {*config.ropes}}
    each = jnp.stack([kinds[rope] for rope in config.ropes])
    return jnp.broadcast_to(each, (config.layers, config.head // 2))


def _rates(rope: Rope | None, head: int, positions: Array) -> Array:
    if rope is None:
        return jnp.zeros(head // 2)
    theta: Any = rope.theta
    if rope.kind == "dynamic":  # the base grows with the longest sequence
        longest = jnp.maximum(positions.max() + 1, rope.trained)
        grown = rope.factor * longest / rope.trained - (rope.factor - 1)
        theta = theta * grown ** (head / (head - 2))
    rates = theta ** -(jnp.arange(0, head, 2, dtype=jnp.float32) / head)
    if rope.kind == "linear":
        return rates / rope.factor
    if rope.kind == "llama3":  # long waves are stretched, those between in part
        waves = rope.trained * rates / (2 * math.pi)  # in the trained length
        kept = jnp.clip((waves - rope.low) / (rope.high - rope.low), 0, 1)
        return rates * (kept + (1 - kept) / rope.factor)
    return rates

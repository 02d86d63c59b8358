"""Sampling with a KV cache: prompts of any lengths in, tokens out, one program."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .model import DecoderConfig, empty_cache

Decode = Callable[..., Any]
MULTIPLE = 32  # prompts are padded to a multiple of this, so that few programs compile


def generate(
    decode: Decode,
    weights: tuple[Any, ...],
    prompts: Sequence[Sequence[int]],
    config: DecoderConfig,
    *,
    count: int,
    end: Sequence[int] = (),
    temperature: float = 0.0,
    key: jax.Array | None = None,
    dtype: Any = jnp.float32,
) -> list[list[int]]:
    """Returns the tokens that follow each prompt, up to an end token or `count`.

    Args:
      decode: `decode(*weights, tokens, cache, segments) -> (logits, cache)`, as
        `functools.partial(model.decode, config=config)` and `jlora.apply_lora` of it.
        Make it once: each new function compiles again.
      weights: `(params,)`, or `(frozen, trainable)`.
      prompts: token ids, at least one each.
      config: the model's.
      count: how many tokens to write at most.
      end: tokens that end an answer; they are not returned.
      temperature: 0 takes the likeliest token, more draws from the softmax of
        `logits / temperature`.
      key: for drawing; it is consumed.
      dtype: of the cache.

    Raises:
      ValueError: if there is no prompt, or one is empty.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or not min(lengths):
        raise ValueError(f"Each prompt needs a token; the lengths are {lengths}.")
    longest = max(lengths)
    shape = (len(prompts), -(-longest // MULTIPLE) * MULTIPLE)
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, shape[1] - len(prompt) :] = prompt
        segments[row, shape[1] - len(prompt) :] = 1
    written = _written(
        weights,
        tokens,
        segments,
        jax.random.key(0) if key is None else key,
        decode=decode,
        config=config,
        count=count,
        end=tuple(end),
        temperature=temperature,
        dtype=jnp.dtype(dtype),
    )
    return [_cut(row, end) for row in np.asarray(written).tolist()]


def _cut(row: list[int], end: Sequence[int]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in end), len(row))]


@functools.partial(
    jax.jit,
    static_argnames=("decode", "config", "count", "end", "temperature", "dtype"),
)
def _written(
    weights: tuple[Any, ...],
    tokens: jax.Array,
    segments: jax.Array,
    key: jax.Array,
    *,
    decode: Decode,
    config: DecoderConfig,
    count: int,
    end: tuple[int, ...],
    temperature: float,
    dtype: Any,
) -> jax.Array:
    """Returns `[batch, count]`; what stands behind an end token means nothing."""
    batch, length = tokens.shape

    def pick(logits: jax.Array, i: Any) -> jax.Array:
        if not temperature:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        own = jax.random.fold_in(key, i)
        return jax.random.categorical(own, logits / temperature).astype(jnp.int32)

    def goes_on(state: Any) -> jax.Array:
        i, _, ended, *_ = state
        return (i < count) & ~ended.all()

    def step(state: Any) -> Any:
        i, logits, ended, out, cache = state
        token = pick(logits[:, -1], i)
        out = out.at[:, i].set(token)
        ended = ended | jnp.isin(token, jnp.array(end, jnp.int32))
        logits, cache = decode(*weights, token[:, None], cache, None)
        return i + 1, logits, ended, out, cache

    cache = empty_cache(config, batch, length + count, dtype)
    logits, cache = decode(*weights, tokens, cache, segments)
    ended, out = jnp.zeros(batch, bool), jnp.zeros((batch, count), jnp.int32)
    state = (jnp.int32(0), logits, ended, out, cache)
    return jax.lax.while_loop(goes_on, step, state)[3]

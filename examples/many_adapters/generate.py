"""Greedy generation with a KV cache in a batch whose rows use different adapters."""

import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.chat.model import Cache

from .data import PROMPT, Examples

Step = Callable[..., Any]
# How `per_row` finds the batch in `decode`'s arguments and results.
_CACHE = Cache(keys=1, values=1, segments=0, start=None)
ROWS = {"in_axes": (0, _CACHE, 0), "out_axes": (0, _CACHE)}


def make_step(run: Callable[..., Any]) -> Step:
    """Returns the jitted step, `-> (next tokens, cache)`, for prompts and for tokens.

    The cache is donated, so it is written in place.
    """

    @functools.partial(jax.jit, donate_argnums=3)
    def step(frozen, adapters, tokens, cache, mask):
        logits, cache = run(frozen, adapters, tokens, cache, mask)
        return jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32), cache

    return step


def generate(
    step: Step,
    frozen: Any,
    adapters: Any,
    prompts: Examples,
    tokens: int,
    cache: Callable[[], Cache],
) -> Iterator[np.ndarray]:
    """Yields the next token of each row, `[batch]`, `tokens` times.

    Args:
      step: from `make_step`.
      frozen: the base.
      adapters: what goes with it: one adapter, or one for each row.
      prompts: tokens and mask with room for the answer.
      tokens: how many to write.
      cache: makes the empty cache.
    """
    asked, mask = (x[:, :PROMPT] for x in prompts)
    token, filled = step(frozen, adapters, asked, cache(), mask)
    for _ in range(tokens - 1):
        yield np.asarray(token)
        one = np.ones_like(mask[:, :1])
        token, filled = step(frozen, adapters, token[:, None], filled, one)
    yield np.asarray(token)


def stream(
    labels: list[str],
    tokens: Iterator[np.ndarray],
    decode: Callable[[list[int]], str],
    end: int,
    width: int = 88,
) -> list[str]:
    """Writes the rows as they grow, side by side with their labels; returns them."""
    rows: list[list[int]] = [[] for _ in labels]
    done = [False] * len(labels)
    live = sys.stdout.isatty()
    texts = [""] * len(labels)
    for i, new in enumerate(tokens):
        for row, token in enumerate(new.tolist()):
            done[row] = done[row] or token == end
            if not done[row]:
                rows[row].append(token)
        texts = [decode(row).replace("\n", " ") for row in rows]
        if live:
            if i:
                print(f"\x1b[{len(labels)}A", end="")
            _show(labels, texts, width)
        if all(done):
            break
    if not live:
        _show(labels, texts, width)
    return texts


def _show(labels: list[str], texts: list[str], width: int) -> None:
    for label, text in zip(labels, texts, strict=True):
        line = f"   {label:>9} | {text}"[:width]
        print(f"{line:<{width}}", flush=True)


def tokens_per_second(
    runs: dict[str, Callable[[], Iterator[np.ndarray]]], rows: int, rounds: int = 3
) -> dict[str, float]:
    """Returns the median of the tokens that all rows write a second, for each run."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            tokens = run()
            next(tokens)  # the prompt
            began, count = time.perf_counter(), 0
            for _ in tokens:
                count += 1
            if i:  # the first round compiles
                times[name].append((time.perf_counter() - began) / count)
    return {name: rows / float(np.median(own)) for name, own in times.items()}

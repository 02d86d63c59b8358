"""Merging that drops entries of the updates: TIES, DARE, magnitude pruning.

The papers prune the dense change of each weight, not its factors: a product of pruned
factors is another matrix, with cross terms. So the change of one weight at a time is
formed, pruned and combined, and cut back to a rank by an SVD.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .._core.algebra import (
    common_dropout,
    dense,
    factor_dtypes,
    largest_rank,
    recompose,
    widest,
)
from .._numerics import key_of_path
from ..errors import ConfigError
from ..factors import Factors, Trainable
from ._fold import combine
from ._several import sequence, weights_for

# From the key of a leaf, changes `[adapters, matrices, entries]` and weights
# `[adapters]` to the combined change `[matrices, entries]`.
Merge = Callable[[jax.Array | None, jax.Array, jax.Array], jax.Array]


def ties(
    trainables: Sequence[Trainable],
    weights: Sequence[Any] | None = None,
    *,
    density: float,
    majority: Literal["total", "frequency"] = "total",
    rank: int | None = None,
    params: Any = None,
) -> Trainable:
    """Returns the adapters merged by TIES: trim, elect signs, mean of those that agree.

    In each weight every adapter keeps the `density` largest entries of its change. Each
    entry's sign is that of the sum over adapters; the result is the sum of the weighted
    entries with that sign, divided by how many they are. PEFT's `ties_svd`.

    Args:
      trainables: adapters of one model; a leaf that an adapter lacks is zero there.
      weights: one number or scalar array each; None means ones.
      density: the part of the entries to keep, in (0, 1].
      majority: elect signs by the sum of the entries, or by the number of signs.
      rank: rank of the result; None means the sum of the ranks. The combined change
        has full rank as a rule and is cut to the nearest of this rank, so
        `min(in, out)` is exact.
      params: the base parameters, needed for DoRA and leaves trained in full.

    Raises:
      ConfigError: for a density outside (0, 1].
      TreeError: if the adapters are not of one model, or lists the leaves that need
        `params`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> x, y = (
      ...     Trainable({"w": Factors(jnp.array([[v], [1.0]]), jnp.ones((1, 2)),
      ...                             Spec(rank=1, alpha=1.0))})
      ...     for v in (4.0, -2.0)
      ... )
      >>> both = ties([x, y], density=1.0).lora["w"]
      >>> (both.a @ both.b).round(4)  # -2 lost the vote against 4
      Array([[4., 4.],
             [1., 1.]], dtype=float32)

    References:
      Yadav et al., 2023, TIES-Merging, section 3, https://arxiv.org/abs/2306.01708
    """
    if majority not in ("total", "frequency"):
        raise ConfigError(f"majority must be 'total' or 'frequency', got {majority!r}.")

    def merge(key: Any, changes: jax.Array, weights: jax.Array) -> jax.Array:
        del key
        kept = _keep_largest(changes, density)
        votes = kept if majority == "total" else jnp.sign(kept)
        elected = jnp.where(jnp.sum(votes, axis=0) >= 0, 1, -1)
        agrees = jnp.sign(kept) == elected.astype(kept.dtype)[None]
        total = jnp.sum(jnp.where(agrees, kept * weights[:, None, None], 0), axis=0)
        return total / jnp.maximum(jnp.sum(agrees, axis=0), 1).astype(total.dtype)

    return _merged("ties", trainables, weights, density, rank, params, None, merge)


def dare(
    trainables: Sequence[Trainable],
    weights: Sequence[Any] | None = None,
    *,
    key: jax.Array,
    density: float,
    rank: int | None = None,
    params: Any = None,
) -> Trainable:
    """Returns the weighted sum with entries dropped at random and the rest rescaled.

    Each entry of each adapter's change is kept with probability `density` and divided
    by it, so the expected sum is that of `linear`. PEFT's `dare_linear_svd`.

    Args:
      trainables: adapters of one model.
      weights: one number or scalar array each; None means ones.
      key: PRNG key, consumed. What is dropped in a leaf depends on it, on the leaf's
        path and on the adapter's place only.
      density: the part of the entries to keep, in (0, 1].
      rank: rank of the result, see `ties`.
      params: the base parameters, needed for DoRA and leaves trained in full.

    Raises:
      ConfigError: for a density outside (0, 1].
      TreeError: see `ties`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> x = Trainable({"w": Factors(jnp.ones((2, 1)), jnp.ones((1, 2)),
      ...                             Spec(rank=1, alpha=1.0))})
      >>> half = dare([x], key=jax.random.key(1), density=0.5, rank=2).lora["w"]
      >>> sorted({round(abs(float(x)), 4) for x in (half.a @ half.b).ravel()})
      [0.0, 2.0]

    References:
      Yu et al., 2024, Language Models are Super Mario (DARE), section 3.2,
      https://arxiv.org/abs/2311.03099
    """

    def merge(key: Any, changes: jax.Array, weights: jax.Array) -> jax.Array:
        kept = jax.random.bernoulli(key, density, changes.shape)
        changes = jnp.where(kept, changes / density, 0)
        return jnp.sum(changes * weights[:, None, None], axis=0)

    return _merged("dare", trainables, weights, density, rank, params, key, merge)


def magnitude_prune(
    trainables: Sequence[Trainable],
    weights: Sequence[Any] | None = None,
    *,
    density: float,
    rank: int | None = None,
    params: Any = None,
) -> Trainable:
    """Returns the weighted sum of the largest entries of each adapter's changes.

    PEFT's `magnitude_prune_svd`.

    Args:
      trainables: adapters of one model.
      weights: one number or scalar array each; None means ones.
      density: the part of the entries to keep, in (0, 1].
      rank: rank of the result, see `ties`.
      params: the base parameters, needed for DoRA and leaves trained in full.

    Raises:
      ConfigError: for a density outside (0, 1].
      TreeError: see `ties`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> x, y = (
      ...     Trainable({"w": Factors(jnp.array([[v], [1.0]]), jnp.ones((1, 2)),
      ...                             Spec(rank=1, alpha=1.0))})
      ...     for v in (4.0, -2.0)
      ... )
      >>> both = magnitude_prune([x, y], density=0.5).lora["w"]
      >>> abs(both.a @ both.b).round(4)
      Array([[2., 2.],
             [0., 0.]], dtype=float32)
    """

    def merge(key: Any, changes: jax.Array, weights: jax.Array) -> jax.Array:
        del key
        kept = _keep_largest(changes, density)
        return jnp.sum(kept * weights[:, None, None], axis=0)

    return _merged(
        "magnitude_prune", trainables, weights, density, rank, params, None, merge
    )


def _keep_largest(changes: jax.Array, density: float) -> jax.Array:
    """Returns `[..., entries]` with zeros but for the largest `density` of them."""
    count = int(density * changes.shape[-1])
    if count == changes.shape[-1]:
        return changes
    if count == 0:
        return jnp.zeros_like(changes)
    size = jnp.abs(changes)
    threshold = jnp.sort(size, axis=-1)[..., -count, None]
    return jnp.where(size >= threshold, changes, 0)


def _merged(
    name: str,
    trainables: Any,
    weights: Any,
    density: float,
    rank: int | None,
    params: Any,
    key: Any,
    merge: Merge,
) -> Trainable:
    if not 0 < density <= 1:
        raise ConfigError(f"density must be in (0, 1], got {density!r}.")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise ConfigError(f"rank must be a positive integer, got {rank!r}.")
    found = sequence(name, trainables)
    weights = weights_for(name, found, weights)

    def key_of(path: str) -> Any:
        if key is None:
            return None
        return key_of_path(key, path)

    def fold(path: str, several: Sequence[Factors], weights: Sequence[Any]) -> Factors:
        first, (a_dtype, b_dtype) = several[0], factor_dtypes(several)
        like = dataclasses.replace(
            first, a=first.a.astype(a_dtype), b=first.b.astype(b_dtype)
        )
        changes = [dense(f) for f in several]
        shape = changes[0].shape
        total = sum(f.rank for f in several) if rank is None else rank
        limit = min(total, largest_rank(like))
        combined = fold_full(path, changes, weights, shape[:-2]).reshape(shape)
        u, s, vt = jnp.linalg.svd(combined, full_matrices=False)
        return recompose(u, s, vt, limit, like, common_dropout(several))

    def fold_full(
        path: str,
        changes: Sequence[jax.Array],
        weights: Sequence[Any],
        batch: tuple[int, ...] = (),
    ) -> jax.Array:
        shape, dtype = changes[0].shape, widest([x.dtype for x in changes])
        flat = jnp.stack(
            [x.astype(dtype).reshape(math.prod(batch), -1) for x in changes]
        )
        shares = jnp.stack([jnp.asarray(w, dtype) for w in weights])
        return merge(key_of(path), flat, shares).reshape(shape)

    return combine(
        name, found, weights, params, fold, fold_full, keep_single=density == 1
    )

"""Merging that drops entries of the updates: TIES, DARE, magnitude pruning.

The papers prune the dense change of each weight, not its factors: the product of pruned
factors is a different matrix, with cross terms. So the dense changes are formed for one
weight at a time. They are pruned and combined, and an SVD cuts the result to a rank.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._checks import check_key
from .._core.algebra import (
    common_settings,
    dense,
    factor_dtypes,
    largest_rank,
    recompose,
    widest,
)
from .._numerics import key_of_path
from ..errors import ConfigError
from ..factors import Array, Factors, PyTree, Trainable
from ._fold import combine
from ._several import check_share, checked_rank, sequence, weights_for

# From the key of a leaf, changes `[adapters, matrices, entries]` and weights
# `[adapters]`, to the combined change `[matrices, entries]`.
Merge = Callable[[jax.Array | None, jax.Array, jax.Array], jax.Array]


def ties(
    trainables: Sequence[Trainable],
    weights: Sequence[ArrayLike] | None = None,
    *,
    density: float,
    majority: Literal["total", "frequency"] = "total",
    rank: int | None = None,
    params: PyTree = None,
) -> Trainable:
    """Returns the adapters merged by TIES: trim, elect signs, average what agrees.

    Of its change of each weight, every adapter keeps only the largest entries, a share
    of `density`. The sum over the adapters elects the sign of each entry. The result is
    the weighted sum of the entries that have the elected sign, divided by their number.
    This is PEFT's `ties_svd`.

    Args:
      trainables: adapters of one model. A leaf that an adapter lacks counts as zero.
      weights: a number or a scalar array for each adapter; None means ones.
      density: the share of the entries to keep, in (0, 1].
      majority: elect signs by the sum of the entries, or by the number of signs.
      rank: rank of the result; None means the sum of the ranks. The combined change
        usually has full rank, and is cut to the nearest one of this rank. Only
        `min(in, out)` is exact.
      params: the base parameters, needed for DoRA and for leaves trained in full.

    Raises:
      ConfigError: for a density outside (0, 1], or a rank that is not positive.
      TreeError: if the adapters are not of one model, or if leaves need `params`; lists
        them.

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

    def merge(
        key: jax.Array | None, changes: jax.Array, weights: jax.Array
    ) -> jax.Array:
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
    weights: Sequence[ArrayLike] | None = None,
    *,
    key: jax.Array,
    density: float,
    rank: int | None = None,
    params: PyTree = None,
) -> Trainable:
    """Returns the weighted sum with entries dropped at random and the rest rescaled.

    Each entry of each adapter's change is kept with probability `density`, and divided
    by it. So the expected sum is that of `linear`. This is PEFT's `dare_linear_svd`.

    Args:
      trainables: adapters of one model.
      weights: a number or a scalar array for each adapter; None means ones.
      key: PRNG key, consumed. Which entries of a leaf are dropped depends only on the
        key, the leaf's path and the adapter's place in `trainables`.
      density: the share of the entries to keep, in (0, 1].
      rank: rank of the result, see `ties`.
      params: the base parameters, needed for DoRA and for leaves trained in full.

    Raises:
      ConfigError: see `ties`; or if `key` is not one PRNG key.
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

    def merge(
        key: jax.Array | None, changes: jax.Array, weights: jax.Array
    ) -> jax.Array:
        assert key is not None  # checked below
        kept = jax.random.bernoulli(key, density, changes.shape)
        changes = jnp.where(kept, changes / density, 0)
        return jnp.sum(changes * weights[:, None, None], axis=0)

    check_key("key", key)
    return _merged("dare", trainables, weights, density, rank, params, key, merge)


def magnitude_prune(
    trainables: Sequence[Trainable],
    weights: Sequence[ArrayLike] | None = None,
    *,
    density: float,
    rank: int | None = None,
    params: PyTree = None,
) -> Trainable:
    """Returns the weighted sum of the largest entries of each adapter's changes.

    This is PEFT's `magnitude_prune_svd`.

    Args:
      trainables: adapters of one model.
      weights: a number or a scalar array for each adapter; None means ones.
      density: the share of the entries to keep, in (0, 1].
      rank: rank of the result, see `ties`.
      params: the base parameters, needed for DoRA and for leaves trained in full.

    Raises:
      ConfigError: see `ties`.
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

    def merge(
        key: jax.Array | None, changes: jax.Array, weights: jax.Array
    ) -> jax.Array:
        del key
        kept = _keep_largest(changes, density)
        return jnp.sum(kept * weights[:, None, None], axis=0)

    return _merged(
        "magnitude_prune", trainables, weights, density, rank, params, None, merge
    )


def _keep_largest(changes: jax.Array, density: float) -> jax.Array:
    """Returns `[..., entries]` with zeros for all but the largest `density` of them."""
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
    trainables: Sequence[Trainable],
    weights: Sequence[ArrayLike] | None,
    density: float,
    rank: int | None,
    params: PyTree,
    key: jax.Array | None,
    merge: Merge,
) -> Trainable:
    """Returns the adapters combined by `merge`, cut to `rank` or the sum of ranks."""
    check_share(density=density)
    rank = None if rank is None else checked_rank(rank)
    found = sequence(name, trainables)
    return combine(
        name,
        found,
        weights_for(name, found, weights),
        params,
        functools.partial(_merged_factors, merge, key, rank),
        functools.partial(_merged_changes, merge, key),
        keep_single=density == 1,
    )


def _merged_factors(
    merge: Merge,
    key: jax.Array | None,
    rank: int | None,
    path: str,
    several: Sequence[Factors],
    weights: Sequence[ArrayLike],
) -> Factors:
    """Returns the combined update of one weight, cut to factors by an SVD."""
    a_dtype, b_dtype = factor_dtypes(several)
    a, b = several[0].a.astype(a_dtype), several[0].b.astype(b_dtype)
    like = dataclasses.replace(several[0], a=a, b=b)
    changes = [dense(f) for f in several]
    combined = _merged_changes(merge, key, path, changes, weights, batch_axes=-2)
    u, s, vt = jnp.linalg.svd(combined, full_matrices=False)
    total = sum(f.rank for f in several) if rank is None else rank
    limit = min(total, largest_rank(like))
    return recompose(u, s, vt, limit, like, **common_settings(several))


def _merged_changes(
    merge: Merge,
    key: jax.Array | None,
    path: str,
    changes: Sequence[Array],
    weights: Sequence[ArrayLike],
    batch_axes: int = 0,
) -> jax.Array:
    """Returns the combined change of one weight; each matrix is pruned by itself.

    The first `batch_axes` axes of the changes count matrices, from the end if negative.
    """
    shape, dtype = changes[0].shape, widest([x.dtype for x in changes])
    n = math.prod(shape[:batch_axes])
    flat = jnp.stack([x.astype(dtype).reshape(n, -1) for x in changes])
    shares = jnp.stack([jnp.asarray(w, dtype) for w in weights])
    own = None if key is None else key_of_path(key, path)
    return merge(own, flat, shares).reshape(shape)

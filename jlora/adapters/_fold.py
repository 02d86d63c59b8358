"""From several adapters to one, leaf by leaf."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._core.algebra import cut, delta, is_one, join, largest_rank, scaled
from .._numerics import at_least_float32
from ..factors import Factors, Trainable
from ._several import (
    DORA,
    FULL,
    Base,
    as_lora,
    base_weight,
    check_base,
    check_fit,
    check_one_base,
    leaves_of,
    rescales,
    union,
)

# From the factors of one weight and their weights to the factors of the result.
Fold = Callable[[str, Sequence[Factors], Sequence[Any]], Factors]
# The same for the differences of a leaf trained in full.
FoldFull = Callable[[str, Sequence[jax.Array], Sequence[Any]], jax.Array]


def weighted_sum(
    path: str, several: Sequence[Factors], weights: Sequence[Any]
) -> Factors:
    """Returns the weighted sum, of no higher rank than the weight can have."""
    del path
    if len(several) == 1:
        return scaled(several[0], weights[0])
    joint = join(several, weights)
    return cut(joint, largest_rank(joint))


def sum_full(
    path: str, changes: Sequence[jax.Array], weights: Sequence[Any]
) -> jax.Array:
    """Returns the weighted sum of the changes of a leaf trained in full."""
    del path
    return sum(
        (x * jnp.asarray(w, x.dtype) for x, w in zip(changes, weights, strict=True)),
        start=jnp.zeros_like(changes[0]),
    )


def combine(
    name: str,
    trainables: Sequence[Trainable],
    weights: Sequence[Any],
    params: Any,
    fold: Fold,
    fold_full: FoldFull = sum_full,
    *,
    keep_single: bool = True,
) -> Trainable:
    """Returns the adapter whose leaves are `fold` of those of the adapters.

    Args:
      name: the public function, for errors.
      trainables: adapters of one model.
      weights: one each.
      params: base parameters or None.
      fold: for leaves with factors; sees plain LoRA, and a single adapter's own method
        where its update is linear in B.
      fold_full: for the changes of leaves trained in full.
      keep_single: whether a leaf of a single adapter with weight 1 is that leaf.
    """
    check_fit(name, trainables)
    if len(trainables) > 1:
        check_one_base(name, trainables)
    base = leaves_of(params)
    leaves = {
        path: _gathered(path, trainables, weights, keep_single)
        for path in union(
            [*(t.lora for t in trainables), *(t.full for t in trainables)]
        )
    }
    cancels = {
        path
        for path, leaf in leaves.items()
        if fold_full is sum_full
        and not leaf.factors
        and _base_cancels(leaf.shares, len(trainables))
    }
    needed = {path: why for path, leaf in leaves.items() if (why := leaf.needs_base())}
    needed = {p: why for p, why in needed.items() if why != FULL or p not in cancels}
    check_base(name, needed, base)

    def own_factors(path: str, leaf: _Leaf) -> Factors:
        if leaf.is_kept:
            return leaf.factors[0]
        single = len(leaf.factors) == 1 and fold is weighted_sum
        if single and not rescales(leaf.factors[0].spec):
            return scaled(leaf.factors[0], leaf.weights[0])
        return fold(path, [as_lora(path, f, base) for f in leaf.factors], leaf.weights)

    def own_value(path: str, leaf: _Leaf) -> jax.Array:
        if leaf.is_kept:
            return leaf.values[0]
        dtype = leaf.values[0].dtype
        if path not in needed:
            wide = [x.astype(at_least_float32(x.dtype)) for x in leaf.values]
            return fold_full(path, wide, leaf.shares).astype(dtype)
        wide, changes = _changes(path, leaf, base)
        total = wide + fold_full(path, changes, [*leaf.shares, *leaf.weights])
        return total.astype(dtype)

    lora = {p: own_factors(p, x) for p, x in leaves.items() if not x.values}
    return Trainable(lora, {p: own_value(p, x) for p, x in leaves.items() if x.values})


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """What the adapters that have a leaf hold: factors or values, each with a weight.

    `is_kept` says that it is that of a single adapter, and stays as it is.
    """

    factors: list[Factors]
    weights: list[Any]
    values: list[Any]
    shares: list[Any]
    is_kept: bool

    def needs_base(self) -> str:
        """Returns why the base weight is needed to combine these, or nothing."""
        if self.is_kept:
            return ""
        if any(rescales(f.spec) for f in self.factors):
            return DORA
        return FULL if self.values else ""


def _gathered(
    path: str,
    trainables: Sequence[Trainable],
    weights: Sequence[Any],
    keep_single: bool,
) -> _Leaf:
    pairs = list(zip(trainables, weights, strict=True))
    lora = [(t.lora[path], w) for t, w in pairs if path in t.lora]
    full = [(t.full[path], w) for t, w in pairs if path in t.full]
    several = [*lora, *full]
    return _Leaf(
        [x for x, _ in lora],
        [w for _, w in lora],
        [x for x, _ in full],
        [w for _, w in full],
        keep_single and len(several) == 1 and is_one(several[0][1]),
    )


def _changes(path: str, leaf: _Leaf, base: Base) -> tuple[jax.Array, list[jax.Array]]:
    """Returns the base weight in at least float32, and the change of each adapter."""
    w = base_weight(base, path)
    dtype = at_least_float32(w.dtype)
    wide = w.astype(dtype)
    changes = [x.astype(dtype) - wide for x in leaf.values]
    changes += [delta(as_lora(path, f, base), dtype) for f in leaf.factors]
    return wide, changes


def _base_cancels(weights: Sequence[Any], count: int) -> bool:
    """Returns whether a weighted sum of values equals that of their changes."""
    return (
        len(weights) == count
        and all(isinstance(w, int | float) for w in weights)
        and abs(sum(weights) - 1) < 1e-9
    )

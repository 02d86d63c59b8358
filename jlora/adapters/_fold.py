"""From several adapters to one, leaf by leaf."""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.algebra import cut, delta, is_one, join, largest_rank, scaled
from .._numerics import at_least_float32
from ..factors import Array, Factors, PyTree, Trainable
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

# From a path, the factors of several adapters there and a weight for each, to the
# factors of the result.
Fold = Callable[[str, Sequence[Factors], Sequence[ArrayLike]], Factors]
# The same for the changes of a leaf trained in full.
FoldFull = Callable[[str, Sequence[Array], Sequence[ArrayLike]], Array]


def weighted_sum(
    path: str, several: Sequence[Factors], weights: Sequence[ArrayLike]
) -> Factors:
    """Returns the weighted sum of updates, cut to the largest rank that it can have."""
    del path
    if len(several) == 1:
        return scaled(several[0], weights[0])
    joint = join(several, weights)
    return cut(joint, largest_rank(joint))


def sum_full(
    path: str, changes: Sequence[Array], weights: Sequence[ArrayLike]
) -> Array:
    """Returns the weighted sum of the changes of a leaf trained in full."""
    del path
    return sum(
        (x * jnp.asarray(w, x.dtype) for x, w in zip(changes, weights, strict=True)),
        start=jnp.zeros_like(changes[0]),
    )


def combine(
    name: str,
    trainables: Sequence[Trainable],
    weights: Sequence[ArrayLike],
    params: PyTree,
    fold: Fold,
    fold_full: FoldFull = sum_full,
    *,
    keep_single: bool = True,
) -> Trainable:
    """Returns one adapter, each leaf of which is `fold` of the adapters' leaves.

    Args:
      name: the public function, for errors.
      trainables: adapters of one model.
      weights: one for each adapter.
      params: base parameters or None.
      fold: for leaves with factors, which it is given as plain LoRA.
      fold_full: for the changes of leaves trained in full.
      keep_single: whether a leaf that only one adapter has, with a weight of 1, comes
        back as it is.
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

    def own_value(path: str, leaf: _Leaf) -> Array:
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
    """What the adapters hold at one path: factors or values, each with a weight.

    `weights` are those of `factors`, and `shares` those of `values`. `is_kept` says
    that only one adapter has the leaf, and that it stays as it is.
    """

    factors: list[Factors]
    weights: list[ArrayLike]
    values: list[Array]
    shares: list[ArrayLike]
    is_kept: bool

    def needs_base(self) -> str:
        """Returns why the leaf needs its base weight, or an empty text."""
        if self.is_kept:
            return ""
        if any(rescales(f.spec) for f in self.factors):
            return DORA
        return FULL if self.values else ""


def _gathered(
    path: str,
    trainables: Sequence[Trainable],
    weights: Sequence[ArrayLike],
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


def _changes(path: str, leaf: _Leaf, base: Base) -> tuple[Array, list[Array]]:
    """Returns the base weight in at least float32, and the change of each adapter."""
    w = base_weight(base, path)
    dtype = at_least_float32(w.dtype)
    wide = w.astype(dtype)
    changes = [x.astype(dtype) - wide for x in leaf.values]
    changes += [delta(as_lora(path, f, base), dtype) for f in leaf.factors]
    return wide, changes


def _base_cancels(weights: Sequence[ArrayLike], count: int) -> bool:
    """Returns whether the base drops out of the sum of `count` weighted changes."""
    numbers = [w for w in weights if isinstance(w, int | float)]
    return len(numbers) == len(weights) == count and abs(sum(numbers) - 1) < 1e-9

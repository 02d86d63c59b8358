"""Adds factors to weights for good, and takes them off again."""

import functools

import jax

from .. import paths
from .._numerics import add_rounded, at_least_float32
from .._tables import listed
from ..errors import TreeError
from ..factors import Factors, Leaf, Trainable
from ..methods import method_of
from ..methods.dora import dense_gain
from ..transform.compat import placed_like
from .algebra import delta
from .tree import (
    MISSING,
    Tree,
    check,
    check_trainable,
    combine,
    flatten_frozen,
    placed_as,
)


def merge(frozen: Tree, trainable: Trainable) -> Tree:
    """Returns plain parameters: `w + scale * a @ b` at each adapted weight.

    With DoRA it is `magnitude * (w + scale * a @ b) / ‖w + scale * a @ b‖`. The sum is
    computed in float32 (float64 for float64 weights) and rounded once to the weight's
    dtype. Tree, dtypes and shardings are those of the original parameters, so
    `fn(merge(frozen, trainable), ...)` costs what `fn` costs.

    Args:
      frozen: from `split`.
      trainable: from `split`, trained.

    Raises:
      TreeError: if the two do not fit together; lists every misfit.

    Examples:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 2))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]
      >>> config = jlora.LoraConfig(rank=2, targets="w")
      >>> plan = jlora.plan(fn, params, jnp.ones((1, 4)), config=config)
      >>> frozen, trainable = jlora.split(jax.random.key(0), params, plan)
      >>> bool((jlora.merge(frozen, trainable)["w"] == params["w"]).all())
      True
    """
    return _shift(combine(frozen, trainable), trainable, sign=1)


def unmerge(params: Tree, trainable: Trainable) -> Tree:
    """Returns `frozen` from merged parameters: the inverse of `merge`.

    Each adapted weight is rounded once more, so in low precision keep the original
    `frozen` instead.

    Args:
      params: from `merge`.
      trainable: what was merged, unchanged.

    Raises:
      TreeError: if `trainable` does not fit `params`, or holds DoRA: its merged weights
        do not determine the norms that their columns had.

    Examples:
      >>> import jax.numpy as jnp, jlora
      >>> head = jlora.Trainable(full={"head": jnp.ones(2)})
      >>> unmerge({"w": jnp.ones(1), "head": jnp.ones(2)}, head)
      {'head': Missing(), 'w': Array([1.], dtype=float32)}
    """
    check_trainable(trainable)
    leaves, treedef = paths.flatten(params)
    unknown = [path for path in trainable.full if path not in leaves]
    if unknown:
        raise TreeError(
            f"params has no leaf {listed(map(repr, unknown), separator=', ')}."
        )
    frozen = treedef.unflatten(
        MISSING if path in trainable.full else leaf for path, leaf in leaves.items()
    )
    check(flatten_frozen(frozen)[0], trainable)
    rescaled = [p for p, f in trainable.lora.items() if method_of(f.spec).gain]
    if rescaled:
        raise TreeError(
            f"{listed(map(repr, rescaled), 3, ', ')} have a magnitude (DoRA), so the "
            "merged weights do not determine the original ones. Keep frozen from "
            "jlora.split."
        )
    return _shift(frozen, trainable, sign=-1)


def _shift(tree: Tree, trainable: Trainable, *, sign: int) -> Tree:
    """Returns `tree` with `sign * delta` added to each adapted weight."""
    leaves, treedef = flatten_frozen(tree)
    for path, factors in trainable.lora.items():
        leaves[path] = _add_delta(leaves[path], factors, sign)
    return treedef.unflatten(leaves.values())


def _add_delta(w: Leaf, factors: Factors, sign: int) -> jax.Array:
    wide = at_least_float32(w.dtype)
    gain = method_of(factors.spec).gain

    def rescale(total: jax.Array) -> jax.Array:
        return total if gain is None else total * dense_gain(factors, total)

    own = placed_like(w, functools.partial(delta, dtype=wide), factors)
    return placed_as(w, add_rounded(w, [sign * own], rescale))

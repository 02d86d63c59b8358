"""Adds factors to weights for good, and takes them off again."""

import functools
import math
import warnings

import jax
import jax.numpy as jnp

from .. import paths
from .._numerics import add_rounded, at_least_float32, not_finite, wider
from .._tables import listed
from ..errors import MergeError, TreeError
from ..factors import Factors, Leaf, PyTree, Trainable
from ..methods import method_of
from ..methods.dora import dense_gain
from ..quantised import is_quantized
from ..transform.compat import is_staging, placed_like
from .algebra import delta
from .tree import (
    MISSING,
    Tree,
    check,
    check_trainable,
    coded_as,
    combine,
    flatten_frozen,
    placed_as,
    widened,
)


def merge(
    frozen: Tree,
    trainable: Trainable,
    *,
    check: bool = False,
    requantize: bool = False,
) -> Tree:
    """Returns plain parameters: `w + scale * a @ b` at each adapted weight.

    With DoRA it is `magnitude * (w + scale * a @ b) / ‖w + scale * a @ b‖`. The sum is
    computed in float32 (float64 for float64 weights) and rounded once to the weight's
    dtype. Tree, dtypes and shardings are those of the original parameters, so
    `fn(merge(frozen, trainable), ...)` costs what `fn` costs.

    Quantised leaves become dense arrays, adapted or not, in the dtype that they stand
    for. With `requantize` they stay quantised: those without factors are the same, and
    the sum of an adapted one gets new codes of the same kind, blocks and storage. Four
    bits seldom hold the update of an adapter: read the warning.

    Args:
      frozen: from `split`.
      trainable: from `split`, trained.
      check: raise an error where a sum is too large for the weight's dtype, or the
        adapter holds NaN. It compares numbers, so it does not work under `jit`.
      requantize: whether quantised leaves stay quantised.

    Raises:
      TreeError: if the two do not fit together; lists every misfit.
      MergeError: for activated LoRA. With `check`, also if a number of a weight was
        finite and is no longer; lists the leaves.

    Warns:
      UserWarning: names weights of eight bits or fewer, with the share of the update
        that their rounding loses; of quantised ones also the relative error of the sum.

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
    whole = combine(frozen, trainable)
    gated = [repr(path) for path, f in trainable.lora.items() if f.spec.invocation]
    if gated:
        raise MergeError(
            f"{listed(gated, 3, ', ')} are activated LoRA: they act only from some "
            "tokens on, so no merged weight equals them. Keep the adapter beside the "
            "base, and call jlora.apply_lora(fn) with lora_gate=."
        )
    merged = _shift(whole, trainable, sign=1, dense=not requantize)
    if check:
        _check_finite(whole, merged, trainable)
    coarse, coded = _coarse(whole, merged, trainable)
    told = []
    if coarse:
        told.append(
            "These weights hold too few digits for the sum, so the merge loses part of "
            f"the update: {listed(coarse, 5, ', ')}. Merge into bfloat16 or float32."
        )
    if coded:
        told.append(
            "These weights are quantised again, which rounds the sum: "
            f"{listed(coded, 100, ', ')}. Leave out requantize for dense weights, or "
            "keep the adapter beside the codes."
        )
    if told:
        warnings.warn("\n".join(told), stacklevel=2)
    return merged


def _coarse(
    before: PyTree, after: PyTree, trainable: Trainable
) -> tuple[list[str], list[str]]:
    """Returns the merged leaves of at most eight bits, with what they lost of it.

    They are the arrays of a narrow dtype, and those that were quantised again.
    """
    olds, _ = paths.flatten(before)
    news, _ = paths.flatten(after)
    found: tuple[list[str], list[str]] = [], []
    for path, factors in trainable.lora.items():
        new = news[path]
        is_coded = is_quantized(new)
        name = new.kind if is_coded else new.dtype
        if not is_coded and jnp.finfo(new.dtype).bits > 8:
            continue
        if is_staging(new):
            found[is_coded].append(f"{path!r} ({name})")
            continue
        share, error = _lost(widened(olds[path]), widened(new), factors)
        if share == 0:
            continue
        if is_coded:
            off = f"off by {error:.4f} of its norm"
            lost = f", {share:.0%} of the update lost" if math.isfinite(share) else ""
            found[1].append(f"{path!r} ({name}, {off}{lost})")
        else:
            told = f"{share:.0%}" if share < 0.995 else "all"
            found[0].append(f"{path!r} ({name}, {told} of it)")
    return found


def _lost(w: Leaf, new: Leaf, factors: Factors) -> tuple[float, float]:
    """Returns the error of a merged weight: as share of the update, and of the sum."""
    w = jnp.asarray(w).astype(jnp.float32)
    total = _add_delta(w, factors, sign=1)
    lost = jnp.linalg.norm((total - new.astype(jnp.float32)).ravel())
    change, size = (jnp.linalg.norm(x.ravel()) for x in (total - w, total))
    if lost == 0 or size == 0:
        return 0.0, 0.0
    return float(lost / change) if change else math.inf, float(lost / size)


def _check_finite(before: PyTree, after: PyTree, trainable: Trainable) -> None:
    """Raises a MergeError that lists where the merge made NaN or infinity."""
    olds, _ = paths.flatten(before)
    news, _ = paths.flatten(after)
    if any(is_staging(x) for x in news.values()):
        raise MergeError("check=True compares numbers: call merge outside jit.")
    wrong = [f"{p!r} has NaN or infinity" for p in not_finite(trainable.full)]
    for path, factors in trainable.lora.items():
        old, new = widened(olds[path]), widened(news[path])
        if not not_finite({path: new}):
            continue
        w, new = (jnp.asarray(x).astype(jnp.float32) for x in (old, new))
        if not bool((jnp.isfinite(w) & ~jnp.isfinite(new)).any()):
            continue  # the base has it already
        w = old.astype(at_least_float32(news[path].dtype))
        total = _add_delta(w, factors, sign=1)
        finite = bool(jnp.isfinite(total).all())
        dtype = news[path].dtype
        wrong.append(
            f"{path!r} would hold {float(jnp.abs(total).max()):.6g}, but {dtype} holds "
            f"at most {float(jnp.finfo(dtype).max):.6g}: convert the base to "
            f"{wider(dtype)}"
            if finite
            else f"the factors of {path!r} give NaN or infinity"
        )
    if wrong:
        raise MergeError(f"Not merged: {listed(wrong)}.")


def unmerge(params: Tree, trainable: Trainable) -> Tree:
    """Returns `frozen` from merged parameters: the inverse of `merge`.

    Each adapted weight is rounded once more, so in low precision keep the original
    `frozen` instead.

    Args:
      params: from `merge`.
      trainable: what was merged, unchanged.

    Raises:
      TreeError: if `trainable` does not fit `params`, or holds DoRA: its merged weights
        do not determine the norms that their columns had. Or if an adapted weight of
        `params` is quantised, as `merge` with `requantize` left it.

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
    coded = [
        p
        for p, w in flatten_frozen(frozen)[0].items()
        if is_quantized(w) and p in trainable.lora
    ]
    if coded:
        raise TreeError(
            f"{listed(map(repr, coded), 3, ', ')} are quantised, so the update cannot "
            "be taken off again: codes rounded the sum. Keep frozen from jlora.split, "
            "or merge without requantize."
        )
    rescaled = [p for p, f in trainable.lora.items() if method_of(f.spec).gain]
    if rescaled:
        raise TreeError(
            f"{listed(map(repr, rescaled), 3, ', ')} have a magnitude (DoRA), so the "
            "merged weights do not determine the original ones. Keep frozen from "
            "jlora.split."
        )
    return _shift(frozen, trainable, sign=-1)


def _shift(tree: Tree, trainable: Trainable, *, sign: int, dense: bool = False) -> Tree:
    """Returns `tree` with `sign * delta` added to each adapted weight.

    A quantised weight is quantised again, unless all leaves are made `dense`.
    """
    leaves, treedef = flatten_frozen(tree)
    for path, w in leaves.items():
        if path not in trainable.lora:
            leaves[path] = widened(w) if dense else w
            continue
        leaves[path] = _add_delta(widened(w), trainable.lora[path], sign)
        if is_quantized(w) and not dense:
            leaves[path] = coded_as(w, leaves[path])
    return treedef.unflatten(leaves.values())


def _add_delta(w: Leaf, factors: Factors, sign: int) -> jax.Array:
    """Returns `w + sign * delta`, rounded once."""
    wide = at_least_float32(w.dtype)
    gain = method_of(factors.spec).gain

    def rescale(total: jax.Array) -> jax.Array:
        return total if gain is None else total * dense_gain(factors, total)

    own = placed_like(w, functools.partial(delta, dtype=wide), factors)
    return placed_as(w, add_rounded(w, [sign * own], rescale))

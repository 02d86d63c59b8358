"""Adds factors to weights for good, and takes them off again."""

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import paths
from .._numerics import (
    add_rounded,
    at_least_float32,
    not_finite,
    root_of_squares,
    wider,
)
from .._tables import listed
from ..errors import MergeError, TreeError
from ..factors import Factors, Leaf, PyTree, Trainable
from ..methods import low_rank_pair, method_of
from ..methods.dora import dense_gain
from ..quantised import is_quantized, typed_as
from ..transform.compat import is_staging
from ..transform.kept import one_at_a_time
from .algebra import delta, spread
from .donation import Donation
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
    donate: bool = False,
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

    With `donate`, as in `jax.device_put`, an array of `frozen` that the result does not
    hold is deleted as soon as its sum is made. So memory holds one model and the update
    of one leaf at most, in place of two models. JAX raises `RuntimeError: Array has
    been deleted` where such an array is used again, also through another tree: `params`
    of `split` has the same arrays. These stay: leaves without factors, which the result
    holds, all of `trainable`, and NumPy arrays. An array that stands in the tree twice
    is deleted if the result holds it nowhere. If the trees do not fit, or a check
    fails, nothing is deleted. Under `jit` donate the argument:
    `jax.jit(jlora.merge, donate_argnums=0)`.

    Args:
      frozen: from `split`.
      trainable: from `split`, trained.
      check: raise an error where a sum is too large for the weight's dtype, or the
        adapter holds NaN. It compares numbers, so it does not work under `jit`.
      requantize: whether quantised leaves stay quantised.
      donate: whether arrays of `frozen` may be deleted.

    Raises:
      TreeError: if the two do not fit together; lists every misfit.
      MergeError: for activated LoRA. With `check`, also if a number of a weight was
        finite and is no longer; lists the leaves. With `donate` or `check`, under
        `jit`.

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
    leaves, treedef = flatten_frozen(combine(frozen, trainable))
    gated = [repr(path) for path, f in trainable.lora.items() if f.spec.invocation]
    if gated:
        raise MergeError(
            f"{listed(gated, 3, ', ')} are activated LoRA: they act only from some "
            "tokens on, so no merged weight equals them. Keep the adapter beside the "
            "base, and call jlora.apply_lora(fn) with lora_gate=."
        )
    if (donate or check) and is_staging(leaves, trainable):
        raise MergeError(
            "check=True compares numbers: call merge outside jit."
            if check
            else "donate=True deletes arrays, and under jit there are none yet. Write "
            "jax.jit(jlora.merge, donate_argnums=0), or call merge outside jit."
        )
    sums = functools.partial(_sum_of, leaves, trainable, dense=not requantize)
    if donate:
        if check:
            _check_finite(leaves, sums, trainable)
        merged, lost = _consume(frozen, leaves, trainable, sums)
    else:
        merged = {path: sums(path) for path in leaves}
        if check:
            _check_finite(leaves, merged.__getitem__, trainable)
        lost = [_loss(p, leaves[p], merged[p], f) for p, f in trainable.lora.items()]
    _warn(lost)
    return treedef.unflatten(merged.values())


def _consume(
    frozen: PyTree,
    leaves: Mapping[str, Leaf],
    trainable: Trainable,
    sum_of: Callable[[str], Leaf],
) -> tuple[dict[str, Leaf], list["_Loss | None"]]:
    """Returns the merged `leaves`, and what they lost; deletes arrays of `frozen`."""
    donation = Donation(frozen, trainable)
    olds, _ = flatten_frozen(frozen)
    merged, lost = {}, []
    for path, w in leaves.items():
        factors = trainable.lora.get(path)
        if factors is not None and donation.has(w) and not _is_coarse(w):
            # One after the other: each takes memory for its update as it starts.
            add = _sum_in_place(w.sharding)
            new = add(w, factors, sign=1, pieces=_pieces(w, factors))
            merged[path] = jax.block_until_ready(new)
        else:
            merged[path] = sum_of(path)
            if factors is not None:
                lost.append(_loss(path, w, merged[path], factors))
        if merged[path] is not olds[path]:
            donation.release(olds[path])
    return merged, lost


class _Loss(NamedTuple):
    """What a merged weight of few bits lost of the update, in words."""

    is_coded: bool
    text: str


def _is_coarse(w: Leaf) -> bool:
    """Returns whether a leaf has eight bits or fewer, or is quantised."""
    return is_quantized(w) or jnp.finfo(w.dtype).bits <= 8


def _loss(path: str, old: Leaf, new: Leaf, factors: Factors) -> _Loss | None:
    """Returns what a merged leaf lost; None of a leaf that is fine enough."""
    if not _is_coarse(new):
        return None
    is_coded = is_quantized(new)
    name = new.kind if is_coded else new.dtype
    if is_staging(new):
        return _Loss(is_coded, f"{path!r} ({name})")
    share, error = _lost(widened(old), widened(new), factors)
    if share == 0:
        return None
    if is_coded:
        off = f"off by {error:.4f} of its norm"
        lost = f", {share:.0%} of the update lost" if math.isfinite(share) else ""
        return _Loss(is_coded, f"{path!r} ({name}, {off}{lost})")
    told = f"{share:.0%}" if share < 0.995 else "all"
    return _Loss(is_coded, f"{path!r} ({name}, {told} of it)")


def _warn(lost: Iterable[_Loss | None]) -> None:
    """Warns the caller of `merge` of what was lost."""
    found = [loss for loss in lost if loss is not None]
    coarse = [loss.text for loss in found if not loss.is_coded]
    coded = [loss.text for loss in found if loss.is_coded]
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
        warnings.warn("\n".join(told), stacklevel=3)


def _lost(w: Leaf, new: Leaf, factors: Factors) -> tuple[float, float]:
    """Returns the error of a merged weight: as share of the update, and of the sum."""
    w = jnp.asarray(w).astype(jnp.float32)
    total = _add_delta(w, factors, sign=1)
    lost = root_of_squares(total - new.astype(jnp.float32))
    change, size = map(root_of_squares, (total - w, total))
    if lost == 0 or size == 0:
        return 0.0, 0.0
    return float(lost / change) if change else math.inf, float(lost / size)


def _check_finite(
    leaves: Mapping[str, Leaf], sum_of: Callable[[str], Leaf], trainable: Trainable
) -> None:
    """Raises a MergeError that lists where the merge makes NaN or infinity."""
    wrong = [f"{p!r} has NaN or infinity" for p in not_finite(trainable.full)]
    for path, factors in trainable.lora.items():
        old, new = widened(leaves[path]), widened(sum_of(path))
        dtype = new.dtype
        if not not_finite({path: new}):
            continue
        w, new = (jnp.asarray(x).astype(jnp.float32) for x in (old, new))
        if not bool((jnp.isfinite(w) & ~jnp.isfinite(new)).any()):
            continue  # the base has it already
        w = old.astype(at_least_float32(dtype))
        total = _add_delta(w, factors, sign=1)
        finite = bool(jnp.isfinite(total).all())
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
      TreeError: if `trainable` does not fit `params`, or is activated LoRA, which
        `merge` refuses too, or holds DoRA: its merged weights do not determine the
        norms that their columns had. Or if an adapted weight of `params` is quantised,
        as `merge` with `requantize` left it.

    Examples:
      >>> import jax.numpy as jnp, jlora
      >>> head = jlora.Trainable(full={"head": jnp.ones(2)})
      >>> unmerge({"w": jnp.ones(1), "head": jnp.ones(2)}, head)
      {'head': Missing(), 'w': Array([1.], dtype=float32)}
    """
    check_trainable(trainable)
    gated = [repr(path) for path, f in trainable.lora.items() if f.spec.invocation]
    if gated:
        raise TreeError(
            f"{listed(gated, 3, ', ')} are activated LoRA, which merge never adds: the "
            "weights in params are already those of frozen."
        )
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
    leaves, treedef = flatten_frozen(frozen)
    return treedef.unflatten(_sum_of(leaves, trainable, p, sign=-1) for p in leaves)


def _sum_of(
    leaves: Mapping[str, Leaf],
    trainable: Trainable,
    path: str,
    *,
    sign: int = 1,
    dense: bool = False,
) -> Leaf:
    """Returns a leaf with `sign * delta` added, if it is adapted.

    A quantised leaf is quantised again, unless all leaves are made `dense`.
    """
    w = leaves[path]
    if path not in trainable.lora:
        return widened(w) if dense else w
    new = _add_delta(widened(w), trainable.lora[path], sign=sign)
    return coded_as(w, new) if is_quantized(w) and not dense else new


def _add_delta(w: Leaf, factors: Factors, *, sign: int) -> jax.Array:
    """Returns `w + sign * delta`, rounded once.

    Under `jit` one sum is made after the other: XLA's CPU compiler would otherwise hold
    the updates of all weights at once.
    """
    if is_staging(w, factors):
        return one_at_a_time(_SIGNED[sign], w, factors)
    pieces = _pieces(w, factors)
    return placed_as(w, _added_now(w, factors, sign=sign, pieces=pieces))


@functools.lru_cache(maxsize=64)
def _sum_in_place(sharding: jax.sharding.Sharding) -> Any:
    """Returns `_added` as a program that takes the memory of `w`."""
    return jax.jit(
        _added,
        static_argnames=("sign", "pieces"),
        donate_argnames="w",
        out_shardings=sharding,
    )


def _pieces(w: Leaf, factors: Factors) -> int:
    """Returns in how many pieces along the first axis a sum is made.

    A piece takes little memory for its update. An array on several devices is one
    piece, since they may divide that axis, and so is one whose sum is rescaled whole.
    """
    method = method_of(factors.spec)
    if method.dense is not None or method.gain is not None:
        return 1
    if isinstance(w, jax.Array) and len(w.sharding.device_set) > 1:
        return 1
    return math.gcd(w.shape[0], 16) if w.size >= 2**16 else 1


def _added(w: Leaf, factors: Factors, *, sign: int, pieces: int = 1) -> jax.Array:
    """Returns `w + sign * delta`, rounded once."""
    if pieces > 1:
        return _added_in_pieces(w, factors, sign, pieces)
    wide = at_least_float32(w.dtype)
    gain = method_of(factors.spec).gain

    def rescale(total: jax.Array) -> jax.Array:
        return total if gain is None else total * dense_gain(factors, total)

    own = typed_as(w, functools.partial(delta, dtype=wide), factors)
    return add_rounded(w, [sign * own], rescale)


def _added_in_pieces(w: Leaf, factors: Factors, sign: int, pieces: int) -> jax.Array:
    """Returns `_added`, made in a loop over slices of the first axis.

    The loop carries numbers of 16 bits as integers: XLA's CPU compiler would widen the
    whole array at each step.
    """
    a, b = low_rank_pair(factors)
    axes, wide = factors.spec.axes, at_least_float32(w.dtype)
    carried = jnp.uint16 if w.dtype.itemsize == 2 else w.dtype
    n_batch, n_in = len(axes.batch), len(axes.fan_in)
    place = axes.order.index(0)
    size = w.shape[0] // pieces

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        def piece(x: jax.Array, axis: int) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)

        own_a = piece(a, place) if place < n_batch + n_in else a
        own_b = b
        if place < n_batch:
            own_b = piece(b, place)
        elif place >= n_batch + n_in:
            own_b = piece(b, place - n_in + 1)
        change = sign * spread(own_a, own_b, factors, wide)
        new = add_rounded(piece(total, 0).view(w.dtype), [change]).view(carried)
        return jax.lax.dynamic_update_slice_in_dim(total, new, i * size, 0)

    total = jax.lax.fori_loop(0, pieces, step, jnp.asarray(w).view(carried))
    return total.view(w.dtype)


_SIGNED = {sign: functools.partial(_added, sign=sign) for sign in (1, -1)}
_added_now = jax.jit(_added, static_argnames=("sign", "pieces"))

"""Many adapters as one, with a new leading axis for `jax.vmap`."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from .._core.algebra import common_settings, factor_dtypes, lora_spec, widest
from .._core.merge import merge
from .._core.rebase import changed_base
from .._core.tree import Missing, widened
from .._numerics import at_least_float32
from .._tables import listed
from ..errors import TreeError
from ..factors import Axes, Factors, Leaf, PyTree, Trainable
from ..methods.dora import column_norms
from ..transform.compat import is_staging
from ._several import (
    DORA,
    FULL,
    Base,
    as_lora,
    base_weight,
    check_base,
    check_fit,
    check_one_base,
    is_lora,
    leaves_of,
    rescales,
    sequence,
    union,
)


def stack(trainables: Sequence[Trainable], *, params: PyTree = None) -> Trainable:
    """Returns one adapter whose leaves have a leading axis, one index for each adapter.

    `jax.vmap(apply, (None, 0, 0))` runs all adapters at once on one base; `select`
    picks some. The adapters may differ in rank: smaller factors are padded with zeros
    at the end. They may differ in alpha and rsLoRA: B is multiplied by the scale, and
    the scale becomes 1. They may also adapt different weights: an adapter is zero where
    it has no factors.

    A leaf that is DoRA in some adapters is DoRA in all; every other method becomes
    plain LoRA. A leaf keeps its drop rate if the adapters agree on it; otherwise it
    is 0.

    Args:
      trainables: adapters of one model, of JAX or NumPy arrays.
      params: the base parameters (those that `split` was given), needed for a leaf that
        only some of the adapters train in full, and for one that is DoRA in only some.

    Returns:
      A `Trainable` of leaves `[len(trainables), ...]`.

    Raises:
      TreeError: if the adapters are not of one model; if their inits changed the base
        (PiSSA) in different ways; if leaves need `params`; or if some adapters train a
        leaf in full and others by factors. Lists the leaves.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> def adapter(rank):
      ...     spec = Spec(rank=rank, alpha=2.0 * rank)
      ...     own = Factors(jnp.ones((3, rank)), jnp.ones((rank, 4)), spec)
      ...     return Trainable({"w": own})
      >>> both = stack([adapter(1), adapter(2)]).lora["w"]
      >>> both.a.shape, both.b.shape, both.scale
      ((2, 3, 2), (2, 2, 4), 1.0)
    """
    found = sequence("stack", trainables)
    check_fit("stack", found)
    if len({_changes_of_base(t) for t in found}) > 1:  # else one frozen side fits all
        check_one_base("stack", found)
    base = leaves_of(params)
    paths = union([t.lora for t in found])
    full = union([t.full for t in found])
    clash = [path for path in paths if path in full]
    if clash:
        raise TreeError(
            f"Some adapters train {listed(map(repr, clash), separator=', ')} in full "
            "and others by factors. Leave the full leaves out, or extract factors "
            "from them."
        )
    needed = {p: FULL for p in full if any(p not in t.full for t in found)}
    for path in paths:
        dora = [path in t.lora and rescales(t.lora[path].spec) for t in found]
        if any(dora) and not all(dora):
            needed[path] = DORA
    check_base("stack", needed, base)
    return Trainable(
        {path: _stack_factors(path, found, base) for path in paths},
        {path: _stack_full(path, found, base) for path in full},
    )


def _changes_of_base(trainable: Trainable) -> frozenset[tuple[str, str]]:
    """Returns the leaves whose initialisation changed the base, each with its init."""
    lora = trainable.lora.items()
    return frozenset((path, f.spec.init) for path, f in lora if changed_base(f))


def _stack_full(path: str, found: Sequence[Trainable], base: Base) -> jax.Array:
    own = [t.full[path] if path in t.full else base_weight(base, path) for t in found]
    dtype = widest([x.dtype for x in own])
    return jnp.stack([jnp.asarray(x, dtype) for x in own])


def _stack_factors(path: str, found: Sequence[Trainable], base: Base) -> Factors:
    own = [t.lora.get(path) for t in found]
    axes = next(f.spec.axes for f in own if f is not None)
    magnitude = None
    if any(f is not None and rescales(f.spec) for f in own):
        magnitude = jnp.stack([_magnitude(path, f, axes, base) for f in own])
    plain = [f if f is None else _without_magnitude(path, f) for f in own]
    present = [f for f in plain if f is not None]
    rank = max(f.rank for f in present)
    a_dtype, b_dtype = factor_dtypes(present)
    like = padded(present[0], rank, a_dtype, b_dtype)
    empty = Factors(jnp.zeros_like(like.a), jnp.zeros_like(like.b), like.spec)
    each = [empty if f is None else padded(f, rank, a_dtype, b_dtype) for f in plain]
    spec = lora_spec(present[0].spec, rank, **common_settings(present))
    if magnitude is not None:
        spec = dataclasses.replace(spec, method="dora")
    if changed_base(present[0]):
        spec = dataclasses.replace(spec, init=present[0].spec.init)
    return Factors(
        jnp.stack([f.a for f in each]),
        jnp.stack([f.b for f in each]),
        spec,
        magnitude,
    )


def padded(
    factors: Factors, rank: int, a_dtype: DTypeLike, b_dtype: DTypeLike
) -> Factors:
    """Returns plain LoRA padded with zeros to `rank`; B is multiplied by the scale."""
    n = len(factors.spec.axes.batch)
    missing = rank - factors.rank
    wide = at_least_float32(b_dtype)
    b = (jnp.asarray(factors.b).astype(wide) * factors.scale).astype(b_dtype)
    a = jnp.asarray(factors.a).astype(a_dtype)
    return Factors(
        jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)]),
        jnp.pad(b, [(0, missing) if i == n else (0, 0) for i in range(b.ndim)]),
        lora_spec(factors.spec, rank),
    )


def _without_magnitude(path: str, factors: Factors) -> Factors:
    if rescales(factors.spec):
        spec = dataclasses.replace(factors.spec, method="lora")
        return Factors(factors.a, factors.b, spec)
    return as_lora(path, factors, None)


def _magnitude(path: str, factors: Factors | None, axes: Axes, base: Base) -> jax.Array:
    """Returns DoRA's magnitude; for plain LoRA the one with which DoRA equals it."""
    if factors is not None and rescales(factors.spec):
        return jnp.asarray(factors.magnitude)
    w = jnp.asarray(base_weight(base, path))
    w = w.astype(at_least_float32(w.dtype))
    if factors is not None:
        (w,) = merge([w], Trainable({"0": factors}))
    return column_norms(w, axes)


def select(stacked: Trainable, ids: ArrayLike, *, params: PyTree = None) -> Trainable:
    """Returns adapter `ids` of a stack, or one adapter for each id of an array.

    The id -1 is the base model: its factors are zero. An id that the stack does not
    have raises an error. Under `jit` and `vmap`, where ids are not known, it gives NaN
    in place of an adapter: that spoils its own batch row and cannot pass unnoticed.

    Args:
      stacked: from `stack`.
      ids: an integer, or an integer array `[batch]`.
      params: the base parameters. The id -1 needs them if the stack has leaves trained
        in full or DoRA magnitudes. Without them it raises an error, or gives NaN in
        these leaves under `jit` and `vmap`.

    Returns:
      A `Trainable` of leaves `[...]`, or `[batch, ...]` for `jax.vmap`.

    Raises:
      TreeError: for ids that the stack does not have, for ids that are not integers,
        and for -1 where `params` is needed.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jlora.adapters import scale
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> x = Trainable({"w": Factors(jnp.ones((3, 1)), jnp.ones((1, 4)),
      ...                             Spec(rank=1, alpha=1.0))})
      >>> rows = select(stack([x, scale(x, -1)]), jnp.array([1, -1, 0]))
      >>> rows.lora["w"].b[:, 0, 0]
      Array([-1.,  0.,  1.], dtype=float32)
    """
    (stacked,) = sequence("select", [stacked])
    ids = jnp.asarray(ids)
    base = leaves_of(params)
    if not is_staging(ids):
        _check_integers(ids)
        _check_ids(ids, count(stacked), stacked, base)
    return pick(stacked, ids, base)


def pick(stacked: Trainable, ids: jax.Array, base: Base) -> Trainable:
    """Returns what `select` does, with NaN for every id that cannot be served."""
    _check_integers(ids)
    size = count(stacked)
    places = jnp.where(ids < 0, size, ids)

    def gather(x: jax.Array, of_base: ArrayLike | None) -> jax.Array:
        nothing = _nothing(x.dtype)
        own = jnp.take(x, places, axis=0, mode="fill", fill_value=nothing)
        of_base = jnp.asarray(nothing if of_base is None else of_base, x.dtype)
        is_base = (ids == -1).reshape(ids.shape + (1,) * (x.ndim - 1))
        return jnp.where(is_base, jnp.broadcast_to(of_base, own.shape), own)

    def weight(path: str) -> Leaf:
        w = None if base is None else base.get(path)
        return None if isinstance(w, Missing) else w

    def factors(path: str, f: Factors) -> Factors:
        of_base: dict[str, ArrayLike | None] = {"a": 0, "b": 0, "magnitude": 0}
        if rescales(f.spec):
            w = weight(path)
            of_base["magnitude"] = None if w is None else column_norms(w, f.spec.axes)
        leaves = {k: x for k in of_base if (x := getattr(f, k)) is not None}
        own = {k: gather(x, of_base[k]) for k, x in leaves.items()}
        return dataclasses.replace(f, **own)

    return Trainable(
        {path: factors(path, f) for path, f in stacked.lora.items()},
        {path: gather(x, widened(weight(path))) for path, x in stacked.full.items()},
    )


def _nothing(dtype: DTypeLike) -> float | int:
    """Returns the number that marks a missing value: NaN, or the lowest integer."""
    inexact = jnp.issubdtype(dtype, jnp.inexact)
    return jnp.nan if inexact else jnp.iinfo(dtype).min


def _check_integers(ids: jax.Array) -> None:
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TreeError(f"ids must be integers, got {ids.dtype}.")


def _check_ids(ids: jax.Array, size: int, stacked: Trainable, base: Base) -> None:
    wrong = sorted({int(i) for i in ids.ravel() if not -1 <= int(i) < size})
    if wrong:
        raise TreeError(
            f"The stack has {size} adapters, so ids go from -1 (the base model) to "
            f"{size - 1}, but got {listed(map(str, wrong), separator=', ')}."
        )
    if bool((ids < 0).any()):
        needed = {p: DORA for p, f in stacked.lora.items() if rescales(f.spec)}
        needed |= dict.fromkeys(stacked.full, FULL)
        check_base("select with an id of -1", needed, base)
        for path in needed:
            base_weight(base, path)


def count(stacked: Trainable) -> int:
    """Returns how many adapters a stack has.

    Raises:
      TreeError: if its leaves differ in the size of their first axis, or have none.
    """
    sizes = {tuple(x.shape)[:1] for x in jax.tree.leaves(stacked)}
    if len(sizes) != 1 or sizes == {()}:
        raise TreeError(
            "This is not a stack of adapters: the leading axes of its leaves are "
            f"{sorted(sizes)}. Make one with jlora.adapters.stack([x, y])."
        )
    wrong = [
        path
        for path, f in stacked.lora.items()
        if (is_lora(f.spec) or rescales(f.spec))
        and f.a.ndim != len(f.spec.axes.batch) + len(f.spec.axes.fan_in) + 2
    ]
    if wrong:
        raise TreeError(
            "These leaves have no axis of adapters: "
            f"{listed(map(repr, wrong), separator=', ')}. Make a stack with "
            "jlora.adapters.stack([x, y])."
        )
    return sizes.pop()[0]


def unstack(stacked: Trainable, *, trim: bool = True) -> list[Trainable]:
    """Returns the adapters of a stack, the inverse of `stack`.

    B keeps the scale that `stack` multiplied into it. Trailing ranks that are zero in
    both factors are cut off, and leaves that are zero throughout are left out. So ranks
    and targets are those before `stack`.

    Args:
      stacked: from `stack`, trained or not.
      trim: whether to cut zeros off. Must be False under `jit` and `vmap`, where the
        values are not known.

    Raises:
      TreeError: if `trim` is True under `jit` or `vmap`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> def adapter(rank):
      ...     own = Factors(jnp.ones((3, rank)), jnp.ones((rank, 4)),
      ...                   Spec(rank=rank, alpha=rank))
      ...     return Trainable({"w": own})
      >>> [x.lora["w"].rank for x in unstack(stack([adapter(1), adapter(2)]))]
      [1, 2]
    """
    size = count(stacked)
    if trim and any(is_staging(x) for x in jax.tree.leaves(stacked)):
        raise TreeError(
            "unstack finds ranks from values, which are not known under jit or vmap. "
            "Call it outside, or with trim=False."
        )
    each = [jax.tree.map(lambda x: x[i], stacked) for i in range(size)]  # noqa: B023
    return [_trimmed(x) for x in each] if trim else each


def _trimmed(trainable: Trainable) -> Trainable:
    found = {path: _trim(f) for path, f in trainable.lora.items()}
    lora = {path: f for path, f in found.items() if f is not None}
    return Trainable(lora, trainable.full)


def _trim(factors: Factors) -> Factors | None:
    """Returns the factors without trailing zero ranks, or None if all are zero."""
    spec = factors.spec
    if not (is_lora(spec) or rescales(spec)):
        return factors
    n = len(spec.axes.batch)
    a, b = np.asarray(factors.a), np.asarray(factors.b)
    used = (a != 0).any(axis=tuple(range(a.ndim - 1)))
    used |= (b != 0).any(axis=tuple(i for i in range(b.ndim) if i != n))
    rank = int(np.flatnonzero(used).max(initial=-1)) + 1
    if rank == 0 and factors.magnitude is None:
        return None
    rank = max(rank, 1)
    if rank == spec.rank:
        return factors
    own = dataclasses.replace(
        spec, rank=rank, alpha=spec.scale * (math.sqrt(rank) if spec.rslora else rank)
    )
    b = jax.lax.slice_in_dim(factors.b, 0, rank, axis=n)
    return Factors(factors.a[..., :rank], b, own, factors.magnitude)

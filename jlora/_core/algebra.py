"""Low-rank algebra: matrices of factors, joins, truncation, norms, inner products.

The update of a leaf is `scale * a @ b`. Only `delta` and `dense` form it. A sum of
updates has a longer rank axis. Its singular values are those of a small core between
two orthogonal factors: QR of A, QR of B, then an SVD of rank x rank numbers.
"""

import dataclasses
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from .._numerics import HIGHEST, at_least_float32, sqrt_halves
from ..factors import Array, Axes, Factors, Leaf, Spec
from ..methods import low_rank_pair, method_of
from ..quantised import whole
from ..transform.compat import is_staging


def delta(factors: Factors, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Returns the dense update `scale * a @ b` of a weight, computed in `dtype`.

    Shapes: A `[*batch, *fan_in, rank]` and B `[*batch, rank, *fan_out]` give an array
    with the axes of the weight, in the weight's order.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jlora.factors import Spec
      >>> f = Factors(jnp.ones((3, 2)), jnp.ones((2, 4)), Spec(rank=2, alpha=1))
      >>> delta(f).shape, float(delta(f)[0, 0])
      ((3, 4), 1.0)
    """
    dense = method_of(factors.spec).dense
    if dense is not None:
        return dense(factors, dtype)
    return spread(*low_rank_pair(factors), factors, dtype)


def spread(a: jax.Array, b: jax.Array, factors: Factors, dtype: DTypeLike) -> jax.Array:
    """Returns `scale * a @ b` in `dtype`, with axes in the order of the weight's.

    `a` and `b` are those of `factors`, or slices of them.
    """
    axes = factors.spec.axes
    batch = a.shape[: len(axes.batch)]
    fan_in = a.shape[len(axes.batch) : -1]
    fan_out = b.shape[len(axes.batch) + 1 :]
    rows = a.astype(dtype).reshape(*batch, math.prod(fan_in), factors.rank)
    columns = b.astype(dtype).reshape(*batch, factors.rank, math.prod(fan_out))
    product = jnp.matmul(rows, columns, precision=jax.lax.Precision.HIGHEST)
    product = (factors.scale * product).reshape(*batch, *fan_in, *fan_out)
    return jnp.transpose(product, [axes.order.index(i) for i in range(product.ndim)])


def lora_spec(like: Spec, rank: int, **changes: Any) -> Spec:
    """Returns the spec of plain LoRA with a scale of 1, for the weight of `like`."""
    names = ("op", "axes", "dropout", "form", "invocation")
    kept = {name: getattr(like, name) for name in names}
    return Spec(rank=rank, alpha=float(rank), **{**kept, **changes})


def matrices(factors: Factors) -> tuple[Array, Array]:
    """Returns A `[*batch, in, rank]` and `scale * B` `[*batch, rank, out]`.

    They have at least float32. They are JAX or NumPy arrays, as the leaves are.
    """
    n = len(factors.spec.axes.batch)
    a, b = map(whole, low_rank_pair(factors))
    wide = at_least_float32(a.dtype, b.dtype)
    batch, rank = a.shape[:n], a.shape[-1]
    rows = a.astype(wide).reshape(*batch, math.prod(a.shape[n:-1]), rank)
    columns = b.astype(wide).reshape(*batch, rank, math.prod(b.shape[n + 1 :]))
    return rows, columns * factors.scale


def on_host(factors: Factors) -> Factors:
    """Returns factors of plain LoRA with the same update, as float64 on the host.

    They leave out what a DoRA magnitude does.
    """
    a, b = map(as_float64, low_rank_pair(factors))
    return Factors(a, b * factors.scale, lora_spec(factors.spec, a.shape[-1]))


def as_float64(x: Leaf) -> np.ndarray:
    """Returns an array as float64 on the host."""
    return np.asarray(jax.device_get(x)).astype(np.float64)


def weight_sizes(factors: Factors) -> tuple[int, ...]:
    """Returns the sizes of a weight's axes in the order batch, fan-in, fan-out."""
    n = len(factors.spec.axes.batch)
    return (*factors.a.shape[:-1], *factors.b.shape[n + 1 :])


def largest_rank(factors: Factors) -> int:
    """Returns the highest rank that an update of this weight can have."""
    n = len(factors.spec.axes.batch)
    return min(math.prod(factors.a.shape[n:-1]), math.prod(factors.b.shape[n + 1 :]))


def scaled(factors: Factors, weight: ArrayLike) -> Factors:
    """Returns the factors with B times `weight`; A, spec and dtypes stay.

    The update of every method without a magnitude over the weight is linear in B.
    """
    if is_one(weight):
        return factors
    wide = at_least_float32(factors.b.dtype)
    b = (factors.b.astype(wide) * jnp.asarray(weight, wide)).astype(factors.b.dtype)
    return dataclasses.replace(factors, b=b)


def is_one(weight: object) -> bool:
    """Returns whether a weight is the number 1, which changes nothing."""
    return isinstance(weight, int | float) and weight == 1


def join(several: Sequence[Factors], weights: Sequence[ArrayLike]) -> Factors:
    """Returns factors of plain LoRA whose update is the weighted sum; ranks add up."""
    spec = several[0].spec
    n = len(spec.axes.batch)
    a_dtype, b_dtype = factor_dtypes(several)
    wide = at_least_float32(b_dtype)
    columns = [
        f.b.astype(wide) * (jnp.asarray(weight, wide) * f.scale)
        for f, weight in zip(several, weights, strict=True)
    ]
    rank = sum(f.rank for f in several)
    return Factors(
        jnp.concatenate([f.a.astype(a_dtype) for f in several], axis=-1),
        jnp.concatenate(columns, axis=n).astype(b_dtype),
        lora_spec(spec, rank, **common_settings(several)),
    )


def factor_dtypes(several: Sequence[Factors]) -> tuple[DTypeLike, DTypeLike]:
    """Returns the dtypes that hold every A and every B."""
    return widest([f.a.dtype for f in several]), widest([f.b.dtype for f in several])


def widest(dtypes: Sequence[DTypeLike]) -> DTypeLike:
    """Returns the dtype that all share, else float64 if present, else float32."""
    return dtypes[0] if len(set(dtypes)) == 1 else at_least_float32(*dtypes)


def common_settings(several: Sequence[Factors]) -> dict[str, Any]:
    """Returns the drop rate and the form, each its default unless all agree."""
    found: dict[str, Any] = {"dropout": 0.0, "form": "auto"}
    for name in found:
        values = {getattr(f.spec, name) for f in several}
        if len(values) == 1:
            (found[name],) = values
    return found


def with_axes(factors: Factors, axes: Axes) -> Factors:
    """Returns factors of plain LoRA over other axes, whose update is the same.

    A factor that lacks a batch axis is repeated along it. An axis of fan-in that is in
    B, or of fan-out that is in A, goes into the rank, which it multiplies; it is left
    out instead where all entries along it are equal, which cannot be seen under `jit`.

    Examples:
      One A for each of 4 heads, as the operation that keeps heads apart needs it:

      >>> import jax.numpy as jnp
      >>> spec = Spec(rank=2, alpha=2.0, axes=Axes(fan_in=(0, 1), fan_out=(2,)))
      >>> f = Factors(jnp.arange(64.0).reshape(8, 4, 2), jnp.ones((2, 5)), spec)
      >>> with_axes(f, Axes(fan_in=(0,), fan_out=(1, 2)))
      Factors(a=float32[8,8], b=float32[8,4,5], rank=8, alpha=8.0, axes=...)
    """
    old = factors.spec.axes
    if old == axes:
        return factors
    a, names_a = factors.a, [*old.batch, *old.fan_in, _RANK]
    b, names_b = factors.b, [*old.batch, _RANK, *old.fan_out]
    shape = old.weight_shape(a.shape, b.shape)
    for i in axes.order:
        wanted = i not in axes.fan_out, i not in axes.fan_in
        if wanted == (i in names_a, i in names_b):
            continue
        if i not in names_a:
            a, names_a = _repeated(a, names_a, i, shape[i])
        if i not in names_b:
            b, names_b = _repeated(b, names_b, i, shape[i])
        if not wanted[1] and _is_constant(b, names_b.index(i)):
            b, names_b = _first(b, names_b, i)
        elif not wanted[1]:
            a, names_a = _diagonal(a, names_a, i)
            b, names_b = _in_rank(b, names_b, i)
        elif not wanted[0] and _is_constant(a, names_a.index(i)):
            a, names_a = _first(a, names_a, i)
        elif not wanted[0]:
            a, names_a = _in_rank(a, names_a, i)
            b, names_b = _diagonal(b, names_b, i)
    order_a = [*axes.batch, *axes.fan_in, _RANK]
    order_b = [*axes.batch, _RANK, *axes.fan_out]
    a = jnp.transpose(a, [names_a.index(name) for name in order_a])
    b = jnp.transpose(b, [names_b.index(name) for name in order_b])
    changes: dict[str, Any] = {"axes": axes}
    if a.shape[-1] != factors.rank:
        rank = a.shape[-1]
        changes |= {"rank": rank, "alpha": factors.scale * rank, "rslora": False}
    return Factors(a, b, dataclasses.replace(factors.spec, **changes))


_RANK = -1  # the name of the rank axis; axes of the weight have their numbers


def _repeated(x: Leaf, names: list[int], i: int, n: int) -> tuple[Leaf, list[int]]:
    return jnp.broadcast_to(x, (n, *x.shape)), [i, *names]


def _first(x: Leaf, names: list[int], i: int) -> tuple[Leaf, list[int]]:
    at = names.index(i)
    return jax.lax.index_in_dim(x, 0, at, keepdims=False), [n for n in names if n != i]


def _is_constant(x: Leaf, axis: int) -> bool:
    """Returns whether it is known that all entries along `axis` are equal."""
    if is_staging(x):
        return False
    return bool(jnp.all(x == jax.lax.slice_in_dim(x, 0, 1, axis=axis)))


def _in_rank(x: Leaf, names: list[int], i: int) -> tuple[Leaf, list[int]]:
    """Returns `x` with the axis `i` as the outer part of the rank axis."""
    rest = [name for name in names if name not in (i, _RANK)]
    x = jnp.transpose(x, [names.index(name) for name in (i, _RANK, *rest)])
    return x.reshape(-1, *x.shape[2:]), [_RANK, *rest]


def _diagonal(x: Leaf, names: list[int], i: int) -> tuple[Leaf, list[int]]:
    """Returns `x` with ranks of its own for each entry of the axis `i`."""
    rest = [name for name in names if name not in (i, _RANK)]
    x = jnp.transpose(x, [names.index(name) for name in (i, _RANK, *rest)])
    n, rank, *sizes = x.shape
    own = jnp.eye(n, dtype=x.dtype).reshape(n, n, *[1] * (x.ndim - 1)) * x[:, None]
    return own.reshape(n, n * rank, *sizes), [i, _RANK, *rest]


def decompose(factors: Factors) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns `(u, s, vt)`, the SVD of the update of each matrix, up to its rank.

    Shapes: `[*batch, in, k]`, `[*batch, k]`, `[*batch, k, out]`, where `k` is the
    smallest of the rank, `in` and `out`.
    """
    qa, core, qb = _core(factors)
    u, s, vt = jnp.linalg.svd(core, full_matrices=False)
    right = jnp.matmul(vt, jnp.swapaxes(qb, -1, -2), precision=HIGHEST)
    return jnp.matmul(qa, u, precision=HIGHEST), s, right


def singular_values(factors: Factors, xp: ModuleType = jnp) -> Array:
    """Returns the singular values of each matrix's update, `[*batch, k]`, descending.

    `k` is as in `decompose`. `xp` is `numpy` for factors from `on_host`.
    """
    _, core, _ = _core(factors, xp)
    return xp.linalg.svd(core, compute_uv=False)


def _core(factors: Factors, xp: ModuleType = jnp) -> tuple[Array, Array, Array]:
    """Returns `(qa, core, qb)`: the update is `qa core qbᵀ`, `qa`, `qb` orthonormal."""
    a, b = matrices(factors)
    qa, ra = xp.linalg.qr(a)
    qb, rb = xp.linalg.qr(xp.swapaxes(b, -1, -2))
    return qa, _dot(ra, xp.swapaxes(rb, -1, -2)), qb


def _dot(x: Array, y: Array) -> Array:
    if isinstance(x, np.ndarray):
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity pass
            return x @ y
    return jnp.matmul(x, y, precision=HIGHEST)


def cut(factors: Factors, rank: int) -> Factors:
    """Returns the nearest factors of at most `rank`: `factors` itself if it fits."""
    if factors.rank <= rank:
        return factors
    return recompose(*decompose(factors), rank, factors)


def recompose(
    u: jax.Array,
    s: jax.Array,
    vt: jax.Array,
    rank: int,
    like: Factors,
    **settings: Any,
) -> Factors:
    """Returns the leading `rank` terms of an SVD as factors of plain LoRA.

    A and B share the singular values evenly. Axes, dtypes and the settings that are not
    given are those of `like`.
    """
    n = len(like.spec.axes.batch)
    batch, fan_in, fan_out = like.a.shape[:n], like.a.shape[n:-1], like.b.shape[n + 1 :]
    a, b = sqrt_halves(u[..., :rank], s[..., :rank], vt[..., :rank, :])
    return Factors(
        a.reshape(*batch, *fan_in, rank).astype(like.a.dtype),
        b.reshape(*batch, rank, *fan_out).astype(like.b.dtype),
        lora_spec(like.spec, rank, **settings),
    )


def dense(factors: Factors) -> jax.Array:
    """Returns the update as matrices `[*batch, in, out]`."""
    return jnp.matmul(*matrices(factors), precision=HIGHEST)


def norm(factors: Factors, xp: ModuleType = jnp) -> Any:
    """Returns the Frobenius norm of the update; terms that cancel leave no residue.

    `|A B| = |R B|` with `A = Q R`: terms cancel before anything is squared.
    `xp` is `numpy` for factors from `on_host`.
    """
    a, b = matrices(factors)
    return xp.linalg.norm(_dot(xp.linalg.qr(a, mode="r"), b))


def inner(x: Factors, y: Factors) -> jax.Array:
    """Returns the inner product of two updates, from Gram matrices."""
    ax, bx = matrices(x)
    ay, by = matrices(y)
    wide = widest([ax.dtype, ay.dtype])
    ax, bx, ay, by = (m.astype(wide) for m in (ax, bx, ay, by))
    left = _dot(jnp.swapaxes(ax, -1, -2), ay)
    right = _dot(bx, jnp.swapaxes(by, -1, -2))
    return jnp.sum(left * right)

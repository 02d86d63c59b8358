"""`thin_dot`: a product with a factor whose derivative transposes no wide array.

In `y = x . b` one of `x` and `y` has the rank axis and is small. JAX's own derivative
with respect to `b` is `x^T dy`, and JAX or XLA transposes the wide one of the two. That
is a copy as large as a layer's activations, or a slow kernel. Here the small one is
transposed: `db = x^T dy` or `db = (dy^T x)^T`. All other derivatives are the usual
ones, so forward mode and higher orders work.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching, mlir
from jax.typing import DTypeLike

from .._numerics import cast, dtype_of_sums
from .compat import Primitive, has_typed_placement, policies_see, shaped_beside
from .kept import product_of_roots
from .trail import Source

Pair = tuple[Sequence[int], Sequence[int]]
Dims = tuple[Pair, Pair]
PrecisionLike = str | lax.Precision | tuple[lax.Precision, lax.Precision] | None


def thin_dot(
    x: jax.Array,
    b: jax.Array,
    numbers: Dims,
    *,
    dtype: DTypeLike,
    precision: PrecisionLike,
    x_first: bool = True,
    source: Source | None = None,
) -> jax.Array:
    """Returns the product of `x` and `b`, in the dtype of `x`, summed in `dtype`.

    The derivative with respect to `b` is summed in the dtype of `b`, and not rounded
    before. That of a real `b` is the real part, if `x` is complex.

    Args:
      x: an activation, or its product with the other factor.
      b: a factor.
      numbers: `dot_general`'s dimension numbers for `(x, b)`.
      dtype: dtype of the result.
      precision: as in `dot_general`.
      x_first: whether the free axes of `x` stand before those of `b` in the result.
      source: how `x` follows from its roots, if that is known.
    """
    (cx, cb), (bx, bb) = numbers
    numbers = (
        (tuple(map(int, cx)), tuple(map(int, cb))),
        (tuple(map(int, bx)), tuple(map(int, bb))),
    )
    params = {"dtype": jnp.dtype(dtype), "precision": precision, "x_first": x_first}
    if has_typed_placement(x) or has_typed_placement(b):
        return _dot(x, b, numbers=numbers, **params)
    product = _ThinDot(tuple({"numbers": numbers, **params}.items()))
    return product_of_roots(product, x, b, source, product.seen)


@dataclasses.dataclass(frozen=True)
class _ThinDot:
    """The product with these parameters of the primitive."""

    params: tuple[tuple[str, Any], ...]

    def __call__(self, x: jax.Array, b: jax.Array) -> jax.Array:
        return thin_dot_p.bind(x, b, **dict(self.params))

    def seen(self, types: Sequence[Any], out: Any) -> Any:
        return _seen(types, out, **dict(self.params))


def _dot(x, b, *, numbers, dtype, precision, x_first):
    (cx, cb), (bx, bb) = numbers
    b = b.astype(x.dtype)
    if not x_first:
        x, b, cx, cb, bx, bb = b, x, cb, cx, bb, bx
    return lax.dot_general(
        x, b, ((cx, cb), (bx, bb)), precision=precision, preferred_element_type=dtype
    )


def _abstract(x, b, *, numbers, dtype, precision, x_first):
    (cx, cb), (bx, bb) = numbers
    free = [x.shape[i] for i in _free(x.ndim, cx, bx)]
    free_b = [b.shape[i] for i in _free(b.ndim, cb, bb)]
    free = [*free, *free_b] if x_first else [*free_b, *free]
    return shaped_beside(x, [*(x.shape[i] for i in bx), *free], dtype)


def _free(ndim: int, *used: Sequence[int]) -> list[int]:
    return [i for i in range(ndim) if not any(i in axes for axes in used)]


def _layout(x, b, numbers, x_first):
    """Returns the axes of the result that are batch, free in `x` and free in `b`."""
    (cx, cb), (bx, _) = numbers
    n_batch = len(bx)
    n_x, n_b = x.ndim - n_batch - len(cx), b.ndim - n_batch - len(cb)
    first, second = (n_x, n_b) if x_first else (n_b, n_x)
    head = list(range(n_batch, n_batch + first))
    tail = list(range(n_batch + first, n_batch + first + second))
    return list(range(n_batch)), *((head, tail) if x_first else (tail, head))


def _transpose_x(dy, x, b, *, numbers, dtype, precision, x_first):
    (cx, cb), (bx, bb) = numbers
    x = x.aval  # the operand to transpose with respect to has no value
    batch, _, free_b = _layout(x, b, numbers, x_first)
    dx = lax.dot_general(
        dy.astype(x.dtype),
        b.astype(x.dtype),
        ((free_b, _free(b.ndim, cb, bb)), (batch, bb)),
        precision=precision,
        preferred_element_type=x.dtype,
    )  # [batch, free in x, contracted in the order of b]
    contracted = [c for _, c in sorted(zip(cb, cx, strict=True))]
    axes = [*bx, *_free(x.ndim, cx, bx), *contracted]
    return lax.transpose(dx, [axes.index(i) for i in range(x.ndim)])


def _transpose_b(dy, x, b, *, numbers, dtype, precision, x_first):
    (cx, cb), (bx, bb) = numbers
    b = b.aval
    batch, free_x, _ = _layout(x, b, numbers, x_first)
    dy = dy.astype(x.dtype)
    dtype = dtype_of_sums(x.dtype, b.dtype)
    params = {"precision": precision, "preferred_element_type": dtype}
    rows = _free(x.ndim, cx, bx)
    contracted = [c for _, c in sorted(zip(cx, cb, strict=True))]
    free = _free(b.ndim, cb, bb)
    if x.size <= dy.size:
        db = _over_rows(x, dy, ((rows, free_x), (bx, batch)), **params)
        axes = [*bb, *contracted, *free]
    else:
        db = _over_rows(dy, x, ((free_x, rows), (batch, bx)), **params)
        db = _unfolded(db, len(batch), len(free_x))
        axes = [*bb, *free, *contracted]
    db = cast(db, b.dtype)
    return lax.transpose(db, [axes.index(i) for i in range(b.ndim)])


def _over_rows(x, y, numbers, *, preferred_element_type, precision):
    """Returns the product of `x` and `y`, `y` the wide one, that sums over rows.

    XLA's CPU compiler (JAX 0.10) cannot sum bfloat16 in float32 over one axis if the
    second operand has several others. It can over two axes, so one of length 1 is added
    to the rows.
    """
    ((rx, ry), (bx, by)) = numbers
    several = y.ndim - len(ry) - len(by) > 1
    if len(rx) == 1 and several and x.dtype != preferred_element_type:
        (at_x,), (at_y,) = rx, ry
        x, y = lax.expand_dims(x, [at_x]), lax.expand_dims(y, [at_y])
        rx, ry = (at_x, at_x + 1), (at_y, at_y + 1)
        bx, by = [i + (i >= at_x) for i in bx], [i + (i >= at_y) for i in by]
    return lax.dot_general(
        x,
        y,
        ((rx, ry), (bx, by)),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )


def _unfolded(db, n_batch, n_free):
    """Returns `db` behind a barrier: else XLA folds its transpose into the product.

    With one batch axis the barrier is around a matrix of `[batch * free, ...]`. Around
    `db` itself XLA could choose a layout that its CPU compiler, in JAX 0.10, aborts on.
    With more batch axes that would move a sharded axis, so there is no barrier.
    """
    if n_batch == 0:
        return lax.optimization_barrier(db)
    if n_batch > 1:
        return db
    kept = 1 + n_free
    flat = lax.reshape(db, (math.prod(db.shape[:kept]), *db.shape[kept:]))
    return lax.reshape(lax.optimization_barrier(flat), db.shape)


def _batch(operands, axes, *, numbers, x_first, **params):
    (cx, cb), (bx, bb) = numbers
    x, b = (
        operand if axis is None else jnp.moveaxis(operand, axis, 0)
        for operand, axis in zip(operands, axes, strict=True)
    )
    in_x, in_b = (axis is not None for axis in axes)
    cx, bx = ([i + in_x for i in axes] for axes in (cx, bx))
    cb, bb = ([i + in_b for i in axes] for axes in (cb, bb))
    if in_x and in_b:
        bx, bb, at = [0, *bx], [0, *bb], 0
    else:
        numbers = ((tuple(cx), tuple(cb)), (tuple(bx), tuple(bb)))
        _, free_x, free_b = _layout(x, b, numbers, x_first)
        at = (free_x if in_x else free_b)[0]
    return thin_dot(x, b, ((cx, cb), (bx, bb)), x_first=x_first, **params), at


def _seen(types, out, **params):
    """Returns what a policy sees: a product, if the result is the thin array.

    A wide result is a summand of the base product's, which a policy saves or not.
    Saving both would take twice the memory.
    """
    if math.prod(out.shape) > math.prod(types[0].shape):
        return thin_dot_p, types, params
    return (
        lax.dot_general_p,
        types,
        {
            "dimension_numbers": params["numbers"],
            "precision": params["precision"],
            "preferred_element_type": params["dtype"],
            "out_sharding": None,
        },
    )


thin_dot_p = Primitive("thin_dot")
policies_see(
    thin_dot_p,
    lambda eqn: _seen([v.aval for v in eqn.invars], eqn.outvars[0].aval, **eqn.params),
)
thin_dot_p.def_impl(_dot)
thin_dot_p.def_abstract_eval(_abstract)
mlir.register_lowering(thin_dot_p, mlir.lower_fun(_dot, multiple_results=False))
ad.defbilinear(thin_dot_p, _transpose_x, _transpose_b)
batching.primitive_batchers[thin_dot_p] = _batch

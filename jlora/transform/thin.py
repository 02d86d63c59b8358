"""`thin_dot`: a `dot_general` whose derivative never transposes a wide array.

In `y = t . b`, `t` has the rank axis and `b` is a factor. JAX's own transpose of a dot
product computes `db = (dy^T t)^T` and so copies `dy`, which is as large as the layer's
output. Here it is `db = t^T dy`, and only `t`, which is rank-sized, is turned. All
other derivatives are the usual ones, so forward mode and higher orders work.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching, mlir

from .compat import Primitive, has_typed_placement, shaped

Dims = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]


def thin_dot(
    t: Any, b: Any, numbers: Dims, *, dtype: Any, precision: Any, t_first: bool = True
) -> jax.Array:
    """Returns the product of `t` and `b`, summed in float32 or wider.

    Args:
      t: the operand with few entries, an activation times the other factor.
      b: a factor.
      numbers: `dot_general`'s dimension numbers for `(t, b)`.
      dtype: dtype of the result.
      precision: as in `dot_general`.
      t_first: whether the free axes of `t` stand before those of `b` in the result.
    """
    (ct, cb), (bt, bb) = numbers
    numbers = (
        (tuple(map(int, ct)), tuple(map(int, cb))),
        (
            tuple(map(int, bt)),
            tuple(map(int, bb)),
        ),
    )
    params = {"dtype": jnp.dtype(dtype), "precision": precision, "t_first": t_first}
    if has_typed_placement(t) or has_typed_placement(b):
        return _dot(t, b, numbers=numbers, **params)
    return thin_dot_p.bind(t, b, numbers=numbers, **params)


def _dot(t, b, *, numbers, dtype, precision, t_first):
    (ct, cb), (bt, bb) = numbers
    if not t_first:
        t, b, ct, cb, bt, bb = b, t, cb, ct, bb, bt
    return lax.dot_general(
        t, b, ((ct, cb), (bt, bb)), precision=precision, preferred_element_type=dtype
    )


def _abstract(t, b, **params):
    out = jax.eval_shape(lambda t, b: _dot(t, b, **params), t, b)
    return shaped(out.shape, out.dtype)


def _free(ndim: int, *used: Sequence[int]) -> list[int]:
    return [i for i in range(ndim) if not any(i in axes for axes in used)]


def _layout(t, b, numbers, t_first):
    """Returns the axes of the result that are batch, free in `t` and free in `b`."""
    (ct, cb), (bt, _) = numbers
    n_batch = len(bt)
    n_t, n_b = t.ndim - n_batch - len(ct), b.ndim - n_batch - len(cb)
    first, second = (n_t, n_b) if t_first else (n_b, n_t)
    head = list(range(n_batch, n_batch + first))
    tail = list(range(n_batch + first, n_batch + first + second))
    return list(range(n_batch)), *((head, tail) if t_first else (tail, head))


def _transpose_t(dy, t, b, *, numbers, dtype, precision, t_first):
    (ct, cb), (bt, bb) = numbers
    t = t.aval  # what the transpose is with respect to has no value
    batch, _, free_b = _layout(t, b, numbers, t_first)
    dt = lax.dot_general(
        dy.astype(b.dtype),
        b,
        ((free_b, _free(b.ndim, cb, bb)), (batch, bb)),
        precision=precision,
        preferred_element_type=t.dtype,
    )  # [batch, free in t, contracted in the order of b]
    contracted = [c for _, c in sorted(zip(cb, ct, strict=True))]
    axes = [*bt, *_free(t.ndim, ct, bt), *contracted]
    return lax.transpose(dt, [axes.index(i) for i in range(t.ndim)])


def _transpose_b(dy, t, b, *, numbers, dtype, precision, t_first):
    (ct, cb), (bt, bb) = numbers
    b = b.aval
    batch, free_t, _ = _layout(t, b, numbers, t_first)
    db = lax.dot_general(
        t,
        dy.astype(t.dtype),
        ((_free(t.ndim, ct, bt), free_t), (bt, batch)),
        precision=precision,
        preferred_element_type=b.dtype,
    )  # [batch, contracted in the order of t, free in b]
    contracted = [c for _, c in sorted(zip(ct, cb, strict=True))]
    axes = [*bb, *contracted, *_free(b.ndim, cb, bb)]
    return lax.transpose(db, [axes.index(i) for i in range(b.ndim)])


def _batch(operands, axes, *, numbers, t_first, **params):
    (ct, cb), (bt, bb) = numbers
    t, b = (
        x if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    )
    in_t, in_b = (axis is not None for axis in axes)
    ct, bt = ([i + in_t for i in axes] for axes in (ct, bt))
    cb, bb = ([i + in_b for i in axes] for axes in (cb, bb))
    if in_t and in_b:
        bt, bb, at = [0, *bt], [0, *bb], 0
    else:
        numbers = ((tuple(ct), tuple(cb)), (tuple(bt), tuple(bb)))
        _, free_t, free_b = _layout(t, b, numbers, t_first)
        at = (free_t if in_t else free_b)[0]
    return thin_dot(t, b, ((ct, cb), (bt, bb)), t_first=t_first, **params), at


thin_dot_p = Primitive("thin_dot")
thin_dot_p.def_impl(_dot)
thin_dot_p.def_abstract_eval(_abstract)
mlir.register_lowering(thin_dot_p, mlir.lower_fun(_dot, multiple_results=False))
ad.defbilinear(thin_dot_p, _transpose_t, _transpose_b)
batching.primitive_batchers[thin_dot_p] = _batch

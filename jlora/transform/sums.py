"""`added`: the sum of a base product and a low-rank term, times a gain if there is one.

XLA's CPU compiler would keep both summands for the gradient, and each reader would add
them again. A call that it does not take apart makes them one array (see `kept`).

With a gain `g` the sum is `g (y + z)`. All products of the gradient read `g dy`, as
without a gain they read `dy`. The derivative with respect to `g` needs `y + z`, which
is the result divided by `g`. So the result is kept, which later operations often keep
anyway.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching, mlir
from jax.typing import DTypeLike

from .compat import Primitive, has_typed_placement, kept_call
from .views import View


class Spread(NamedTuple):
    """How a gain lies along a sum.

    Attributes:
      shape: shape of the sum, with an axis for each atom.
      axes: the axes of it that the gain has, in its order.
      view: how later operations keep the sum; None if as it is.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    view: View | None = None

    def rows(self, n: int, axes: tuple[int, ...]) -> "Spread":
        """Returns the same for `n` sums stacked in front, and a gain of these axes."""
        view = self.view and self.view.rows(n)
        return Spread((n, *self.shape), axes, view)


def times(x: jax.Array, gain: jax.Array, spread: Spread | None) -> jax.Array:
    """Returns `x` times the gain, computed in the dtype of the gain.

    The derivative keeps `x` and the gain, and no array of the size of `x` beside.
    """
    assert spread is not None
    if has_typed_placement(x) or has_typed_placement(gain):
        return _times(x, gain, spread=spread)
    return times_p.bind(x, gain, spread=spread)


def _times(x: jax.Array, gain: jax.Array, *, spread: Spread) -> jax.Array:
    wide = lax.broadcast_in_dim(gain, spread.shape, spread.axes)
    parted = lax.reshape(x, spread.shape).astype(gain.dtype)
    return lax.reshape((parted * wide).astype(x.dtype), x.shape)


def _times_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, spread: Spread):
    (x, gain), (dx, dgain) = primals, tangents
    out = times(x, gain, spread)
    parts = []
    if type(dx) is not ad.Zero:
        parts.append(times(dx, gain, spread))
    if type(dgain) is not ad.Zero:
        parts.append(times(x, dgain, spread))
    return out, functools.reduce(operator.add, parts)


def _times_transpose(ct: Any, x: Any, gain: Any, *, spread: Spread) -> Any:
    if ad.is_undefined_primal(x):
        return times(ct, gain, spread), None
    wide, view = gain.aval.dtype, spread.view
    if view is None:
        product = ct.astype(wide) * x.astype(wide)
    else:
        product = view.of(ct).astype(wide) * view.of(x).astype(wide)
        product = view.back(product, x.shape)
    others = [i for i in range(len(spread.shape)) if i not in spread.axes]
    return None, jnp.sum(lax.reshape(product, spread.shape), axis=others)


def _times_batch(operands: Sequence[Any], axes: Sequence[Any], *, spread: Spread):
    pairs = list(zip(operands, axes, strict=True))
    n = next(v.shape[axis] for v, axis in pairs if axis is not None)
    x, gain = operands
    x = batching.bdim_at_front(x, axes[0], n)
    gain, spread = _batched(gain, axes[1], spread, n)
    return times_p.bind(x, gain, spread=spread), 0


def _batched(
    gain: jax.Array, axis: int | None, spread: Spread, n: int
) -> tuple[jax.Array, Spread]:
    """Returns the gain of `n` sums stacked in front, perhaps one for each."""
    along = tuple(i + 1 for i in spread.axes)
    if axis is not None:
        gain, along = jnp.moveaxis(gain, axis, 0), (0, *along)
    return gain, spread.rows(n, along)


def added(
    y: jax.Array,
    z: jax.Array,
    gain: jax.Array | None = None,
    spread: Spread | None = None,
    *,
    kept: bool = False,
) -> jax.Array:
    """Returns `y + z` of two arrays of one shape and dtype, times `gain`.

    No entry of `gain` may be zero. The result is one array where a derivative is taken,
    or if `kept`. A value alone is a plain sum, which XLA may fuse with what follows.
    """
    if has_typed_placement(y) or has_typed_placement(z):
        return _sum(y, z, *_some(gain), spread=spread)
    return added_p.bind(y, z, *_some(gain), spread=spread, kept=kept)


def _some(gain: jax.Array | None) -> tuple[jax.Array, ...]:
    return () if gain is None else (gain,)


def not_zero(gain: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns `gain`, moved away from zero by an amount that is negligible in `dtype`.

    So the derivative can divide by it, and a column of length zero can grow again.
    """
    least = jnp.asarray(jnp.finfo(dtype).smallest_normal ** (2 / 3), gain.dtype)
    near = jnp.where(gain < 0, -least, least) - gain
    is_near = jnp.abs(gain) < least
    return gain + lax.stop_gradient(jnp.where(is_near, near, jnp.zeros_like(gain)))


def _sum(
    y: jax.Array, z: jax.Array, *gain: jax.Array, spread: Any, **_: Any
) -> jax.Array:
    return times(y + z, gain[0], spread) if gain else y + z


def _sum_kept(*operands: jax.Array, spread: Spread | None, kept: bool) -> jax.Array:
    if not kept:
        return _sum(*operands, spread=spread)
    return kept_call(_Sum(spread), *operands)


@dataclasses.dataclass(frozen=True)
class _Sum:
    """The sum as a function; two of one spread are equal."""

    spread: Spread | None

    def __call__(self, *operands: jax.Array) -> jax.Array:
        return _sum(*operands, spread=self.spread)


def _jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, spread: Any, kept: bool
) -> Any:
    out = added_p.bind(*primals, spread=spread, kept=True)
    dy, dz, *dgain = tangents
    summed = ad.add_tangents(dy, dz)
    summed = None if type(summed) is ad.Zero else summed
    dgain = None if not dgain or type(dgain[0]) is ad.Zero else dgain[0]
    return out, tangent(out, summed, *primals[2:], dgain=dgain, spread=spread)


def tangent(
    out: jax.Array,
    summed: jax.Array | None,
    gain: jax.Array | None = None,
    dgain: jax.Array | None = None,
    spread: Spread | None = None,
) -> jax.Array:
    """Returns the tangent of `out`, a sum times `gain`.

    Args:
      out: the result.
      summed: the tangent of the sum; None if it is zero.
      gain: as in `added`.
      dgain: the tangent of the gain; None if it is zero.
      spread: as in `added`.
    """
    parts = []
    if summed is not None:
        # So its cotangent is one array, which several products read. Else XLA, on other
        # platforms than a CPU, may make it anew for each of them.
        once = lax.optimization_barrier(summed)
        parts.append(once if gain is None else times(once, gain, spread))
    if gain is not None and dgain is not None:
        parts.append(times(out, dgain / gain, spread))
    return functools.reduce(operator.add, parts or [jnp.zeros_like(out)])


def _transpose(
    ct: Any, y: Any, z: Any, *gain: Any, spread: Spread | None, kept: bool
) -> Any:
    if gain:
        assert spread is not None
        ct = times(ct, gain[0], spread)
    both = [ct if ad.is_undefined_primal(v) else None for v in (y, z)]
    return (*both, *(None for _ in gain))


def _batch(
    operands: Sequence[Any], axes: Sequence[Any], *, spread: Any, kept: bool
) -> Any:
    pairs = list(zip(operands, axes, strict=True))
    n = next(v.shape[axis] for v, axis in pairs if axis is not None)
    y, z = (batching.bdim_at_front(v, axis, n) for v, axis in pairs[:2])
    gain = operands[2:]
    if gain:
        own, spread = _batched(gain[0], axes[2], spread, n)
        gain = [own]
    return added_p.bind(y, z, *gain, spread=spread, kept=kept), 0


times_p = Primitive("times")
times_p.def_impl(_times)
times_p.def_abstract_eval(lambda x, gain, spread: x)
mlir.register_lowering(times_p, mlir.lower_fun(_times, multiple_results=False))
ad.primitive_jvps[times_p] = _times_jvp
ad.primitive_transposes[times_p] = _times_transpose
batching.primitive_batchers[times_p] = _times_batch

added_p = Primitive("added")
added_p.def_impl(_sum)
added_p.def_abstract_eval(lambda y, *_, **__: y)
ad.primitive_jvps[added_p] = _jvp
ad.primitive_transposes[added_p] = _transpose
batching.primitive_batchers[added_p] = _batch
mlir.register_lowering(added_p, mlir.lower_fun(_sum, multiple_results=False))
mlir.register_lowering(
    added_p, mlir.lower_fun(_sum_kept, multiple_results=False), platform="cpu"
)

"""DoRA: the length of each column of a weight is trained apart from its direction.

References:
  Liu et al., 2024, DoRA, https://arxiv.org/abs/2402.09353
"""

import dataclasses
import string
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from .._numerics import at_least_float32
from ..factors import Array, Axes, Factors, Leaf, Spec
from ..quantised import (
    Quantized,
    has_own_entries,
    is_quantized,
    rearranged,
    typed_as,
)
from .method import LeafAxes, Method, lora_axes

TINY = 1e-30  # a column of zeros has no direction: it stays zero


def norm(factors: Factors, w: Leaf) -> jax.Array:
    """Returns `‖w + s a b‖` over the fan-in axes, `[*batch, *fan_out]`, float32.

    From `‖w‖²`, `aᵀ w`, `aᵀ a` and `b`: the sum itself is never formed. Of a quantised
    stack of matrices one is widened at a time.
    """
    if is_quantized(w):
        if _is_stack(w, factors.spec.axes):
            stack, axes = _along_batch(w, factors.spec.axes)
            spec = dataclasses.replace(factors.spec, axes=axes)
            return lax.map(
                lambda own: norm(Factors(own[0], own[1], spec), own[2]),
                (factors.a, factors.b, stack),
            )
        return lax.platform_dependent(
            factors.a,
            factors.b,
            w,
            cpu=_called(factors.spec),
            default=_of(factors.spec),
        )
    wide = at_least_float32(w.dtype)
    axes = factors.spec.axes
    letter = dict(zip(range(w.ndim), string.ascii_letters, strict=False))
    batch, fan_in, fan_out = (
        "".join(letter[i] for i in role)
        for role in (axes.batch, axes.fan_in, axes.fan_out)
    )
    own = "".join(letter.values())
    column = batch + fan_out
    exact = {"precision": lax.Precision.HIGHEST, "preferred_element_type": wide}
    a, b = factors.a.astype(wide), factors.scale * factors.b.astype(wide)
    squares = jnp.einsum(f"{own}->{column}", jnp.square(w.astype(wide)))
    down = jnp.einsum(
        f"{batch}{fan_in}Y,{own}->{batch}Y{fan_out}", a, w.astype(wide), **exact
    )
    gram = jnp.einsum(f"{batch}{fan_in}Y,{batch}{fan_in}Z->{batch}YZ", a, a, **exact)
    up = jnp.einsum(f"{batch}YZ,{batch}Z{fan_out}->{batch}Y{fan_out}", gram, b, **exact)
    crossed = b * (2 * down + up)
    total = squares + jnp.sum(crossed, axis=len(axes.batch))
    return _length(total)


def _of(spec: Spec) -> Callable[..., jax.Array]:
    """Returns `norm` of a quantised weight, which is widened."""
    return lambda a, b, w: norm(Factors(a, b, spec), w.dense())


def _called(spec: Spec) -> Callable[..., jax.Array]:
    """Returns `_of` as a call that XLA does not inline.

    XLA-CPU widens what depends only on parameters before all else: of a model whose
    layers are not stacked it would hold all dense weights.
    """

    def called(*operands: Leaf) -> jax.Array:
        with set_xla_metadata(inlineable="false"):
            return jax.jit(_of(spec))(*operands)

    return called


def _along_batch(w: Quantized, axes: Axes) -> tuple[Quantized, Axes]:
    """Returns `w` with its first batch axis in front, and the axes of one entry."""
    first = axes.batch[0]
    origin = [first, *(i for i in range(w.ndim) if i != first)]
    stack = rearranged(w, lambda x, _: jnp.moveaxis(x, first, 0), [first], origin)
    batch, fan_in, fan_out = (
        tuple(i - (i > first) for i in role)
        for role in (axes.batch[1:], axes.fan_in, axes.fan_out)
    )
    return stack, Axes(batch, fan_in, fan_out)


def _is_stack(w: Quantized, axes: Axes) -> bool:
    return bool(axes.batch) and has_own_entries(w, axes.batch[0])


def _length(squares: jax.Array) -> jax.Array:
    """Returns the root of a sum of squares; NaN where the sum is too large.

    Divided by infinity, a column would be zero, and nothing would tell.
    """
    root = jnp.sqrt(jnp.maximum(squares, TINY))
    return jnp.where(jnp.isinf(root), jnp.nan, root)


def gain(factors: Factors, w: Leaf) -> jax.Array:
    """Returns `m / ‖w + s a b‖`, `[*batch, *fan_out]`.

    Only `m` is differentiated: section 4.3 of the paper takes the norm as a constant.
    """
    length = typed_as(factors.magnitude, norm, *lax.stop_gradient((factors, w)))
    return factors.magnitude.astype(length.dtype) / length


def column_norms(w: Leaf, axes: Axes) -> jax.Array:
    """Returns the lengths of `w` over its fan-in axes, `[*batch, *fan_out]`.

    They have at least float32.
    """
    if is_quantized(w):
        if _is_stack(w, axes):
            stack, own = _along_batch(w, axes)
            return lax.map(lambda w: column_norms(w, own), stack)
        w = w.dense()
    w = jnp.asarray(w).astype(at_least_float32(w.dtype))
    squares = jnp.sum(jnp.square(w), axis=axes.fan_in)
    kept = [i for i in range(w.ndim) if i not in axes.fan_in]
    order = [kept.index(i) for i in (*axes.batch, *axes.fan_out)]
    return _length(jnp.transpose(squares, order))


def dense_gain(factors: Factors, total: Array) -> jax.Array:
    """Returns `m / ‖total‖`, to multiply `total = w + s a b` itself, as `gain`."""
    return typed_as(total, _dense_gain, factors, total)


def _dense_gain(factors: Factors, total: Array) -> jax.Array:
    axes = factors.spec.axes
    own = (*axes.batch, *axes.fan_out)
    length = lax.stop_gradient(column_norms(total, axes))
    gain = factors.magnitude.astype(total.dtype) / length
    gain = jnp.transpose(gain, [own.index(i) for i in sorted(own)])
    return jnp.broadcast_to(jnp.expand_dims(gain, axes.fan_in), total.shape)


def _axes(spec: Spec) -> LeafAxes:
    axes = spec.axes
    return {**lora_axes(spec), "magnitude": (*axes.batch, *axes.fan_out)}


def _finish(factors: Factors, w: Leaf) -> Factors:
    return dataclasses.replace(factors, magnitude=norm(factors, w))


dora = Method(
    axes=_axes,
    finish=_finish,
    gain=gain,
)

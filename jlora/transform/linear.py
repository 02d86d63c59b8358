"""Linear uses of a weight: matrix products and convolutions.

Every rule adds the low-rank term to the original product, which is bound as it was:
`y = op(x, w) + s * ((x . a) . b)`. The activation is the left operand of the first
product and keeps the order of its axes.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from .._numerics import (
    at_least_float32,
    cast,
    dtype_of_activation,
    dtype_of_sums,
    is_inexact,
)
from ..quantised import typed_as
from . import cost
from .adapted import has_forms
from .atoms import BROADCAST, OTHER, RANK, Atom, Group, regroup, size
from .compat import Equation, kind
from .gate import no_gate
from .interpret import Context
from .kept import product_of_roots
from .low_rank import join_groups
from .products import adapted_product, meet
from .quantised_linear import base_product
from .sums import added
from .thin import thin_dot
from .trail import Source, cast_both
from .values import Derived, Operand, Term, Value, Weight, with_terms


def dot_general(
    ctx: Context, eqn: Equation, lhs: Operand, rhs: Operand
) -> list[jax.Array]:
    """`x . (w + s a b) = x . w + s (x . a) . b` for any dimension numbers.

    The weight may be on either side. Where the contracted axes are those of B (a tied
    weight that is used transposed) the factors change places. Where both hold
    contracted axes, the first product leaves those of B.
    A weight without a fan-in or a fan-out is merged: it is as small as its factors.
    """
    (contracted, batch) = eqn.params["dimension_numbers"]
    operands: list[Any] | None = [
        ctx.materialise(v, eqn)
        if isinstance(v, Weight) and v.looked_up and not _indexes_batch(v, axes)
        else v
        for v, axes in zip((lhs, rhs), batch, strict=True)
    ]
    operands = _one_weight(ctx, eqn, operands)
    if operands is None:
        return NotImplemented
    sides = [i for i, v in enumerate(operands) if isinstance(v, Weight)]
    if not sides:
        return ctx.run.bind(eqn, *operands)
    if not is_inexact(kind(eqn.outvars[0]).dtype):
        return NotImplemented  # each of several products would be rounded to integers
    (side,) = sides
    if is_elementwise(eqn, operands):
        return NotImplemented
    weight, x = operands[side], operands[1 - side]
    met = meet(eqn, weight, x, side) if weight.terms else None
    if weight.terms and met is None:
        return NotImplemented
    summed = contracted[1 - side]
    tokens, fan_in = (
        math.prod(n for i, n in enumerate(x.shape) if (i in summed) is is_summed)
        for is_summed in (False, True)
    )
    ctx.used(
        weight,
        "dot_general",
        fan_in=[atom for i in contracted[side] for atom in weight.dims[i]],
        batch=[atom for i in batch[side] for atom in weight.dims[i]],
        eqn=eqn,
        forms=cost.forms(tokens, fan_in, x.dtype)
        if has_forms(x, weight.w, kind(eqn.outvars[0]).dtype)
        else (),
    )
    if met is None:
        operands[side] = weight.w
        return [base_product(ctx.run, eqn, operands, side, weight.dims)]
    return [adapted_product(ctx, eqn, *met, weight.dims)]


def _one_weight(
    ctx: Context, eqn: Equation, operands: Sequence[Any]
) -> list[Any] | None:
    """Returns `operands` with one weight; None where two may be the weight.

    Of two weights the activation is the vector, or what an array was added to, or what
    is repeated along new axes (learned queries for each entry of a batch).
    """
    operands = list(operands)
    sides = [i for i, v in enumerate(operands) if isinstance(v, Weight)]
    if len(sides) < 2:
        return operands
    for is_activation in (_is_vector, _is_mixed, _is_repeated):
        found = [i for i in sides if is_activation(operands[i])]
        if len(found) == 1:
            operands[found[0]] = ctx.materialise(operands[found[0]], eqn)
            return operands
    return None


def _is_vector(weight: Weight) -> bool:
    return not weight.is_matrix


def _is_mixed(weight: Weight) -> bool:
    return bool(weight.mixed)


def _is_repeated(weight: Weight) -> bool:
    return any(atom.root == BROADCAST for group in weight.dims for atom in group)


def is_elementwise(eqn: Equation, operands: Sequence[Value]) -> bool:
    """Returns whether a parameter in a product has no fan-in, or no fan-out.

    It then scales or weighs activations: a norm's scale in `einsum("bd,d->bd")`, the
    vector of a pooling. It is not the weight of a linear operation.
    """
    if eqn.primitive.name != "dot_general":
        return False
    (contracted, batch) = eqn.params["dimension_numbers"]
    for v, summed, shared in zip(operands, contracted, batch, strict=True):
        if not isinstance(v, Weight | Derived):
            continue
        axes = [i for i in range(v.w.ndim) if i not in shared]
        if isinstance(v, Weight):
            axes = [i for i in axes if any(atom.root >= 0 for atom in v.dims[i])]
        if {i in summed for i in axes} != {True, False}:
            return True
    return False


def conv_general_dilated(
    ctx: Context, eqn: Equation, x: Operand, weight: Operand
) -> list[jax.Array]:
    """`conv(x, w + s a b) = conv(x, w) + s (conv(x, a) . b)`.

    A is a kernel of the same window with `rank` output channels, and B mixes these as a
    1x1 kernel. Feature groups share A. `vmap` puts the kernels of a stack side by side
    as output channels: then each kernel has its own A.
    """
    params = eqn.params
    out_dim, *in_dims = params["dimension_numbers"].rhs_spec
    x, weight = _one_weight(ctx, eqn, (x, weight)) or (x, weight)
    if not isinstance(weight, Weight) or isinstance(x, Weight):
        return NotImplemented
    if weight.looked_up or params["batch_group_count"] != 1:
        return NotImplemented
    if not is_inexact(kind(eqn.outvars[0]).dtype):
        return NotImplemented
    outs = weight.dims[out_dim]
    ins = tuple(weight.dims[i] for i in in_dims)
    groups = params["feature_group_count"]
    if not set(weight.gain_labels) <= set(outs):
        return NotImplemented
    factors = []
    for term in weight.terms:
        pair = _conv_factors(term, outs, ins, groups)
        if pair is None:
            return NotImplemented
        factors.append((term, *pair))
    ctx.used(
        weight,
        "conv_general_dilated",
        fan_in=[atom for group in ins for atom in group],
        batch=_stacked_kernels(outs, groups),
        eqn=eqn,
    )
    base = base_product(ctx.run, eqn, (x, weight.w), 1, weight.dims)
    if not factors:
        return [base]
    if ctx.gate is not None:
        raise no_gate(weight, eqn, "mixes positions")
    compute = dtype_of_activation(x.dtype, weight.w.dtype, base.dtype)
    x, source = cast_both(x, ctx.source(x), compute)
    channels = params["dimension_numbers"].out_spec[1]
    shown = [
        atom
        for i, n in enumerate(base.shape)
        for atom in (outs if i == channels else (Atom((OTHER, i), n),))
    ]
    zs = []
    for term, a, b in factors:
        kept, own = ctx.drop(x, term.dropout, eqn.invars[0], source)
        settings = {"scale": term.scale, "dtype": base.dtype, "params": params}
        product = functools.partial(_conv_product, source=own, **settings)
        zs.append(typed_as(base, product, kept, a, b))
    return [with_terms(base, zs, weight, shown)]


def _stacked_kernels(outs: Group, groups: int) -> Group:
    """Returns the leading atoms of the output channels that also divide the inputs."""
    n = 0
    while n < len(outs) - 1 and groups > 1 and groups % size(outs[: n + 1]) == 0:
        n += 1
    return outs[:n]


def ragged_dot_general(
    ctx: Context,
    eqn: Equation,
    x: Operand,
    weight: Operand,
    sizes: Any,
    *offset: Any,
) -> list[jax.Array]:
    """`r(x, w + s a b) = r(x, w) + s r(r(x, a), b)` for a ragged product `r`.

    Each row of `x` is multiplied by the matrix of its group, which has its A and B.
    """
    x, weight = _one_weight(ctx, eqn, (x, weight)) or (x, weight)
    if isinstance(x, Weight) or any(isinstance(v, Weight) for v in (sizes, *offset)):
        return NotImplemented
    if not isinstance(weight, Weight) or weight.looked_up or not _is_grouped(eqn):
        return NotImplemented
    joined = join_groups(weight)
    if any(len(group) != 1 for group in joined.dims):
        return NotImplemented
    group, ins, outs = (g[0] for g in joined.dims)
    pairs = [_grouped_factors(term, group, ins, outs) for term in joined.terms]
    factors = [pair for pair in pairs if pair is not None]
    if len(factors) < len(pairs):
        return NotImplemented
    gain = joined.gain
    if gain is not None:
        has_offset = offset or eqn.params["group_offset"] is not None
        if has_offset or set(joined.gain_labels) != {group, outs}:
            return NotImplemented
        gain = regroup(gain, joined.gain_labels, [(group,), (outs,)])
    ctx.used(
        weight,
        eqn.primitive.name,
        fan_in=weight.dims[1],
        batch=weight.dims[0],
        eqn=eqn,
    )
    base = base_product(ctx.run, eqn, (x, weight.w, sizes, *offset), 1, weight.dims)
    if not factors:
        return [base]
    if ctx.gate is not None:
        raise no_gate(weight, eqn, "meets tokens in another order")
    groups = (sizes, *offset)
    if not offset and eqn.params["group_offset"] is not None:
        groups = (sizes, eqn.params["group_offset"])
    precision = eqn.params["precision"]
    compute = dtype_of_activation(x.dtype, weight.w.dtype, base.dtype)
    wide, sums = at_least_float32(compute), dtype_of_sums(compute, base.dtype)
    x, source = cast_both(x, ctx.source(x), compute)
    thin, back = (_RaggedDot(precision, dtype) for dtype in (wide, sums))
    for term, (a, b) in zip(joined.terms, factors, strict=True):
        kept, own = ctx.drop(x, term.dropout, eqn.invars[0], source)
        t = product_of_roots(thin, kept, a.astype(compute), own, more=groups)
        t = (t * term.scale).astype(compute)
        y = back(t, b.astype(compute), *groups)
        base = added(base, cast(y, base.dtype))
    if gain is not None:
        rows = jnp.repeat(gain, sizes, axis=0, total_repeat_length=base.shape[0])
        wide = at_least_float32(base.dtype, rows.dtype)
        base = (base.astype(wide) * rows.astype(wide)).astype(base.dtype)
    return [base]


@dataclasses.dataclass(frozen=True)
class _RaggedDot:
    """`lax.ragged_dot` with these settings."""

    precision: Any
    dtype: DTypeLike

    def __call__(
        self, x: jax.Array, w: jax.Array, sizes: jax.Array, *offset: jax.Array
    ) -> jax.Array:
        return lax.ragged_dot(
            x,
            w,
            sizes,
            precision=self.precision,
            preferred_element_type=self.dtype,
            group_offset=offset[0] if offset else None,
        )


def _is_grouped(eqn: Equation) -> bool:
    """Returns whether each row is multiplied by a matrix of `[group, in, out]`.

    Integers are not: each of several products would be rounded.
    """
    if not is_inexact(kind(eqn.outvars[0]).dtype):
        return False
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    return (
        _tuples(numbers.dot_dimension_numbers) == (((1,), (1,)), ((), ()))
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and tuple(numbers.rhs_group_dimensions) == (0,)
    )


def _grouped_factors(
    term: Term, group: Atom, ins: Atom, outs: Atom
) -> tuple[jax.Array, jax.Array] | None:
    """Returns the factors as `[group, in, rank]` and `[group, rank, out]`, or None."""
    own = term if ins in term.a_labels else term.swapped()
    if set(own.a_labels) != {group, ins, RANK}:
        return None
    if set(own.b_labels) != {group, RANK, outs}:
        return None
    return (
        regroup(own.a, own.a_labels, [(group,), (ins,), (RANK,)]),
        regroup(own.b, own.b_labels, [(group,), (RANK,), (outs,)]),
    )


def _tuples(nested: Any) -> Any:
    return tuple(map(_tuples, nested)) if isinstance(nested, list | tuple) else nested


def _conv_factors(term: Term, outs: Group, ins: tuple[Group, ...], groups: int):
    """Returns the factors as `[stack, rank, *ins]` and `[stack, rank, outs]`, or None.

    Output channels run over the stack first. `stack` is 1 where A is one kernel. A
    stack that only A has (kernels modulated for each example) repeats B.
    """
    flat = [atom for group in ins for atom in group]
    for own in (term, term.swapped()):
        n = sum(atom in own.a_labels for atom in outs)
        stack = outs[:n]
        lacking = [atom for atom in stack if atom not in own.b_labels]
        b_labels = (*lacking, *own.b_labels)
        if (
            set(own.a_labels) == {RANK, *stack, *flat}
            and set(b_labels) == {RANK, *outs}
            and (groups == 1 or groups % size(stack) == 0)
        ):
            b = jnp.broadcast_to(own.b, (*(s.size for s in lacking), *own.b.shape))
            return (
                regroup(own.a, own.a_labels, [stack, (RANK,), *ins]),
                regroup(b, b_labels, [stack, (RANK,), outs[n:]]),
            )
    return None


@dataclasses.dataclass(frozen=True)
class _ThinConv:
    """The convolution with these parameters of the primitive."""

    params: tuple[tuple[str, Any], ...]

    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated_p.bind(x, kernel, **dict(self.params))

    def seen(self, types: Sequence[Any], _: Any) -> Any:
        return lax.conv_general_dilated_p, types, dict(self.params)


def _conv_product(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    *,
    scale: float,
    dtype: DTypeLike,
    params: Mapping[str, Any],
    source: Source | None,
) -> jax.Array:
    """Returns `scale * conv(x, a) . b`."""
    numbers = params["dimension_numbers"]
    stack, rank, *window = a.shape
    groups = params["feature_group_count"]  # of the inputs: stack, groups of a kernel
    repeats = max(groups // stack, 1)
    compute, wide = x.dtype, at_least_float32(x.dtype)
    sums = dtype_of_sums(compute, dtype)
    place = [numbers.rhs_spec.index(i) for i in range(len(window) + 1)]
    kernel = jnp.broadcast_to(a[:, None], (stack, repeats, rank, *window))
    kernel = lax.transpose(kernel.reshape(-1, *window), place).astype(compute)
    thin = _ThinConv(tuple({**params, "preferred_element_type": wide}.items()))
    # XLA's CPU compiler has no fast convolution in a call that it keeps.
    t = product_of_roots(thin, x, kernel, source, thin.seen, inside=False)
    t = (t * scale).astype(compute)
    channels = numbers.out_spec[1]
    if stack * repeats == 1 and channels == t.ndim - 1:
        out = thin_dot(
            t,
            b[0],
            (([channels], [0]), ([], [])),
            dtype=sums,
            precision=params["precision"],
        )
        return cast(out, dtype)
    ones = (1,) * (t.ndim - 2)
    mixing = lax.reshape(b.swapaxes(1, 2), (b.shape[0] * b.shape[2], rank, *ones))
    out = lax.conv_general_dilated(
        t,
        lax.transpose(mixing, place).astype(compute),
        window_strides=ones,
        padding="VALID",
        dimension_numbers=lax.ConvDimensionNumbers(
            numbers.out_spec, numbers.rhs_spec, numbers.out_spec
        ),
        preferred_element_type=sums,
        precision=params["precision"],
        feature_group_count=stack * repeats,
    )
    return cast(out, dtype)


def _indexes_batch(weight: Weight, batch: Sequence[int]) -> bool:
    """Returns whether each entry of the batch is multiplied by a looked-up matrix.

    Otherwise rows were looked up, as in an embedding, and they are activations.
    """
    in_batch = {atom for i in batch for atom in weight.dims[i]}
    rest = [g for i, g in enumerate(weight.dims) if i not in batch and g]
    return weight.index_atoms <= in_batch and len(rest) >= 2

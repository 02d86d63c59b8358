"""`quantised_linear`: an operation that is linear in `x`, with a quantised weight.

The weight is widened inside, where it is used. The derivative with respect to `x` is
the transposed operation on the same codes: it widens once more, so that nothing widened
is kept between the passes. JAX's own derivative keeps every widened weight.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.interpreters import ad, batching, mlir

from .atoms import STACKED, Atom, Group
from .coded import Coded, widened
from .compat import (
    Equation,
    Primitive,
    Type,
    bind,
    has_typed_placement,
    kind,
    partitions,
    policies_see,
    shaped,
)
from .running import Run


@dataclasses.dataclass(frozen=True, eq=False)
class Static:
    """The static settings of one use.

    Attributes:
      fun: `fun(x, w, *rest)`, linear in `x`.
      eqn: the equation that it comes from, which policies see.
      tree: the structure of the `Coded`.
      dims: the groups of the weight's axes.
      x: type of `x`.
      out: type of the result of `fun`.
      transposed: whether this is the transpose of `fun` in `x`: from `out` to `x`.
    """

    fun: Callable[..., Any]
    eqn: Equation
    tree: Any
    dims: tuple[Group, ...]
    x: Any
    out: Any
    transposed: bool = False


def base_product(
    run: Run, eqn: Equation, operands: Sequence[Any], side: int, dims: Sequence[Group]
) -> jax.Array:
    """Returns the result of `eqn`, whose operand `side` is a weight.

    Args:
      run: what runs equations.
      eqn: a product, linear in the other one of the first two operands.
      operands: its operands; the weight an array or `Coded`.
      side: 0 or 1.
      dims: the groups of the weight's axes.
    """
    w, x = operands[side], operands[1 - side]
    if not isinstance(w, Coded) or isinstance(w.q.codes, Type):
        return run.bind(eqn, *operands)[0]

    def fun(x: jax.Array, w: jax.Array, *rest: jax.Array) -> jax.Array:
        return bind(eqn, *((w, x) if side == 0 else (x, w)), *rest)[0]

    rest = operands[2:]
    leaves, tree = jax.tree.flatten(w)
    if has_typed_placement(x) or any(map(has_typed_placement, leaves)):
        # A type that names mesh axes is inferred by JAX's own primitives only.

        def again(x: jax.Array, *operands: jax.Array) -> jax.Array:
            leaves, rest = operands[: tree.num_leaves], operands[tree.num_leaves :]
            leaves = after_p.bind(x, *leaves)
            return fun(x, widened(tree.unflatten(leaves), dims), *rest)

        return jax.checkpoint(again)(x, *leaves, *rest)
    out = kind(eqn.outvars[0])
    out = shaped(out.shape, out.dtype)
    x_type = shaped(jnp.shape(x), jnp.result_type(x))
    static = Static(fun, eqn, tree, tuple(dims), x_type, out)
    return quantised_linear_p.bind(x, *leaves, *rest, static=static)


def _run(
    x: jax.Array, *operands: Any, static: Static, barrier: bool = True
) -> jax.Array:
    n = static.tree.num_leaves
    leaves, rest = operands[:n], operands[n:]
    if barrier:
        # A compiler that sees both passes, or a loop, would widen once and keep it.
        x, *leaves = lax.optimization_barrier((x, *leaves))
    w = widened(static.tree.unflatten(leaves), static.dims)
    if not static.transposed:
        return static.fun(x, w, *rest)
    transpose = jax.linear_transpose(lambda x: static.fun(x, w, *rest), static.x)
    return transpose(x)[0]


def _jvp(primals: Any, tangents: Any, *, static: Static) -> Any:
    out = quantised_linear_p.bind(*primals, static=static)
    dx, *others = tangents
    parts = []
    if type(dx) is not ad.Zero:
        parts.append(quantised_linear_p.bind(dx, *primals[1:], static=static))
    moving = [i for i, d in enumerate(others) if _moves(d)]
    if moving:  # the scales are differentiated

        def run(values: Sequence[jax.Array]) -> jax.Array:
            operands = list(primals)
            for i, value in zip(moving, values, strict=True):
                operands[i + 1] = value
            return _run(*operands, static=static)

        values, rates = ([v[i] for i in moving] for v in (primals[1:], others))
        parts.append(jax.jvp(run, (values,), (rates,))[1])
    total = parts[0] if parts else ad.Zero(jax.typeof(out))
    for part in parts[1:]:
        total = total + part
    return out, total


def _moves(tangent: Any) -> bool:
    if type(tangent) is ad.Zero:
        return False
    return jax.dtypes.float0 != getattr(tangent, "dtype", None)


def _transpose(ct: Any, x: Any, *operands: Any, static: Static) -> list[Any]:
    none = [None for _ in operands]
    if type(ct) is ad.Zero:
        return [None, *none]
    flipped = dataclasses.replace(static, transposed=not static.transposed)
    return [quantised_linear_p.bind(ct, *operands, static=flipped), *none]


def _batch(operands: Any, axes: Any, *, static: Static) -> Any:
    """A batch of activations, of weights, or of both is one operation."""
    n = static.tree.num_leaves
    (size,) = {v.shape[a] for v, a in zip(operands, axes, strict=True) if a is not None}
    of_weight = any(axis is not None for axis in axes[1 : n + 1])
    # The transpose of a function of one `x` for all examples would add them up.
    of_x = axes[0] is not None or static.transposed

    def first(v: jax.Array, axis: int | None, has_it: bool) -> jax.Array:
        if axis is not None:
            return jnp.moveaxis(v, axis, 0)
        return jnp.broadcast_to(v, (size, *v.shape)) if has_it else v

    x, *rest = operands
    x = first(x, axes[0], of_x)
    leaves = [first(v, a, of_weight) for v, a in zip(rest[:n], axes[1:], strict=False)]
    more = [first(v, a, False) for v, a in zip(rest[n:], axes[n + 1 :], strict=True)]
    tree, dims = static.tree, static.dims
    if of_weight:
        tree, dims = _stacked(static, size)
    batched = [None if a is None else 0 for a in axes[n + 1 :]]
    batched = [0 if of_x else None, 0 if of_weight else None, *batched]
    fun = jax.vmap(static.fun, tuple(batched))
    out = shaped((size, *static.out.shape), static.out.dtype)
    x_type = static.x
    if of_x:
        x_type = shaped((size, *static.x.shape), static.x.dtype)
    now = dataclasses.replace(static, fun=fun, tree=tree, dims=dims, x=x_type, out=out)
    return quantised_linear_p.bind(x, *leaves, *more, static=now), 0


def _stacked(static: Static, size: int) -> tuple[Any, tuple[Group, ...]]:
    """Returns the structure of a stack of weights, and its dims."""
    names = [a.name[1] for g in static.dims for a in g if a.root == STACKED]
    new: Group = (Atom((STACKED, max(names, default=-1) + 1), size),)
    coded = static.tree.unflatten(range(static.tree.num_leaves))
    shape = (size, *coded.shape)
    coded = coded.replace(labels=(new, *coded.labels), shape=shape)
    return jax.tree.structure(coded), (new, *static.dims)


def _base_product(eqn: Any) -> tuple[Primitive, Sequence[Any], dict[str, Any]]:
    """Returns what a policy sees: the product of the dense model."""
    base = eqn.params["static"].eqn
    return base.primitive, [v.aval for v in base.invars], base.params


def _barrier(*operands: jax.Array) -> list[jax.Array]:
    return list(lax.optimization_barrier(operands)[1:])


# `(x, *leaves) -> leaves`, which are not known before `x` is: so no loop, of which they
# are constants, widens them before its first step. A TPU's compiler does not anyway.
after_p = Primitive("after")
after_p.multiple_results = True
after_p.def_impl(lambda _, *leaves: list(leaves))
after_p.def_abstract_eval(lambda _, *leaves: list(leaves))
ad.primitive_jvps[after_p] = lambda primals, tangents: (
    after_p.bind(*primals),
    list(tangents[1:]),
)
batching.primitive_batchers[after_p] = lambda operands, axes: (
    after_p.bind(*operands),
    list(axes[1:]),
)
mlir.register_lowering(after_p, mlir.lower_fun(_barrier, multiple_results=True))
mlir.register_lowering(
    after_p,
    mlir.lower_fun(lambda _, *leaves: list(leaves), multiple_results=True),
    platform="tpu",
)

quantised_linear_p = Primitive("quantised_linear")
policies_see(quantised_linear_p, _base_product)
quantised_linear_p.def_impl(_run)
quantised_linear_p.def_abstract_eval(
    lambda *_, static: static.x if static.transposed else static.out
)
ad.primitive_jvps[quantised_linear_p] = _jvp
ad.primitive_transposes[quantised_linear_p] = _transpose
batching.primitive_batchers[quantised_linear_p] = _batch
mlir.register_lowering(quantised_linear_p, mlir.lower_fun(_run, multiple_results=False))


def _on_cpu(ctx: Any, *operands: Any, static: Static) -> Any:
    """Lowers to a call that XLA does not inline, on one device.

    XLA-CPU widens what depends only on parameters before all else, and shares it
    between the passes: an unrolled model would hold the dense weights of all layers.
    Where XLA divides the work over devices, such a call costs collectives.
    """
    run = functools.partial(_run, static=static)

    def called(*operands: Any) -> jax.Array:
        with set_xla_metadata(inlineable="false"):
            return jax.jit(run)(*operands)

    fun = called if partitions(ctx) == 1 else run
    return mlir.lower_fun(fun, multiple_results=False)(ctx, *operands)


mlir.register_lowering(quantised_linear_p, _on_cpu, platform="cpu")
# The TPU's compiler widens inside each product, and writes nothing widened to memory.
mlir.register_lowering(
    quantised_linear_p,
    mlir.lower_fun(functools.partial(_run, barrier=False), multiple_results=False),
    platform="tpu",
)

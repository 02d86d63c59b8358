"""Code inside code: calls, rematerialisation, loops and branches.

The inner jaxpr is interpreted under the JAX function that made it. Weights go in as
pytrees. Weights that a loop or a branch returns are materialised first.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from . import compat
from .atoms import Labels
from .coded import Coded, holds, layer_of, placed, relabelled, stacked_first
from .compat import Equation
from .gate import no_gate
from .interpret import Context, Rule, interpret, is_special
from .primitives import CALLS
from .shards import varied_axes
from .values import Value, Weight, array_of, is_coded


def call(ctx: Context, eqn: Equation, *values: Value) -> list[Value]:
    """A nested `jit` keeps its name and shardings, and stays one where called twice."""
    code = compat.inner_code(eqn)
    if not ctx.run.stages(values):
        return interpret(ctx, code, values)
    signature = (id(code.jaxpr), jax.tree.structure(values))
    if signature not in ctx.calls:

        def inner(key: jax.Array | None, *values: Value) -> list[Value]:
            return interpret(ctx.within(key), code, values)

        # The jaxpr is kept alive, so that no other object gets its id.
        ctx.calls[signature] = (ctx.run.jit(eqn, inner), code)
    return ctx.calls[signature][0](ctx.next_key(), *values)


def closed_call(ctx: Context, eqn: Equation, *values: Value) -> list[Value]:
    """A call that has no settings is inlined."""
    return interpret(ctx, compat.inner_code(eqn), values)


def remat(ctx: Context, eqn: Equation, *values: Value) -> list[Value]:
    """`jax.checkpoint` with the same policy."""
    code = compat.inner_code(eqn)

    def inner(key: jax.Array | None, *values: Value) -> list[Value]:
        return interpret(ctx.within(key), code, values)

    return ctx.run.checkpoint(eqn, inner)(ctx.next_key(), *values)


def scan(ctx: Context, eqn: Equation, *values: Value) -> list[Any]:
    """`lax.scan`: constant weights stay whole, stacked ones are read layer by layer.

    Of a stacked weight, those of `w`, `a` and `b` that have the stacked axis are
    scanned and the others are constants. A carry that the body returns unchanged is a
    constant. A stack whose layers the body returns unchanged is returned as it is.
    """
    code = compat.inner_code(eqn)
    n_consts, n_carry = compat.scan_counts(eqn)
    materialised = _merge_before(ctx, eqn, scan, values, n_consts + n_carry)
    consts, carry, xs = _cut(materialised, n_consts, n_carry)
    fixed = _hoist(ctx, eqn, code, carry, n_consts)
    init = [None if i in fixed else v for i, v in enumerate(carry)]
    xs = [_scannable(ctx, eqn, x) for x in xs]
    for j in range(n_carry, len(code.outvars)):
        i = source(code.jaxpr, j)
        if i is not None and i >= n_consts + n_carry:
            stack = xs[i - n_consts - n_carry]
            if is_special(stack):
                fixed[j] = stack
    key = ctx.next_key()
    keys = None if key is None else jax.random.split(key, eqn.params["length"])

    def body(state: list[Any], slices: tuple[Any, Any]) -> tuple[list[Any], list[Any]]:
        key, scanned = slices
        inner = ctx.within(key)
        layers = [
            _layer(x, part) if isinstance(x, Weight) else part
            for x, part in zip(xs, scanned, strict=True)
        ]
        state = [fixed.get(i, v) for i, v in enumerate(state)]
        out = interpret(inner, code, [*consts, *state, *layers])
        plain = [
            None if i in fixed else inner.materialise(v, eqn) for i, v in enumerate(out)
        ]
        return plain[:n_carry], plain[n_carry:]

    scanned = [_unstack(x) if isinstance(x, Weight) else x for x in xs]
    final, ys = ctx.run.scan(eqn, body, init, (keys, scanned))
    return [fixed.get(i, v) for i, v in enumerate([*final, *ys])]


def while_loop(ctx: Context, eqn: Equation, *values: Value) -> list[Any]:
    """`lax.while_loop`: constant weights, and unchanged carries, stay factored.

    `vmap` gives the loop a predicate for each example. It goes on while one holds, and
    an example whose own does not hold keeps its state.
    """
    cond = compat.inner_code(eqn, "cond_jaxpr")
    body = compat.inner_code(eqn, "body_jaxpr")
    materialised = _merge_before(ctx, eqn, while_loop, values, len(values))
    cond_consts, body_consts, carry = _cut(
        materialised, eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    )
    fixed = _hoist(ctx, eqn, body, carry, len(body_consts))
    init = [None if i in fixed else v for i, v in enumerate(carry)]

    def fill(state: Sequence[Any]) -> list[Any]:
        return [fixed.get(i, v) for i, v in enumerate(state)]

    def step(loop: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        key, state = loop
        following, now, _ = _split(key)
        inner = ctx.within(now)
        out = interpret(inner, body, [*body_consts, *fill(state)])
        return following, [
            None if i in fixed else inner.materialise(v, eqn) for i, v in enumerate(out)
        ]

    def goes_on(loop: tuple[Any, list[Any]]) -> jax.Array:
        key, state = loop
        inner = ctx.within(_split(key)[2])
        (out,) = interpret(inner, cond, [*cond_consts, *fill(state)])
        return inner.materialise(out, eqn)

    of_each = compat.kind(cond.outvars[0]).ndim > 0
    loop = ctx.run.while_loop_of_each if of_each else ctx.run.while_loop
    _, final = loop(goes_on, step, (ctx.next_key(), init))
    return [fixed.get(i, v) for i, v in enumerate(final)]


def _split(key: jax.Array | None) -> Sequence[jax.Array | None]:
    """Returns the keys of the next step, of this step and of its predicate."""
    return (None, None, None) if key is None else tuple(jax.random.split(key, 3))


def cond(ctx: Context, eqn: Equation, index: Value, *values: Value) -> list[Value]:
    """`lax.cond` and `lax.switch`: every branch gets the weights with their factors."""
    index = ctx.materialise(index, eqn)
    key = ctx.next_key()

    def branch(code: compat.Code) -> Any:
        def run(key: jax.Array | None, *values: Value) -> list[Value]:
            inner = ctx.within(key)
            return [inner.materialise(v, eqn) for v in interpret(inner, code, values)]

        return run

    branches = [branch(compat.code(closed)) for closed in eqn.params["branches"]]
    return ctx.run.switch(index, branches, key, *values)


def _merge_before(
    ctx: Context, eqn: Equation, rule: Rule, values: Sequence[Value], n: int
) -> Sequence[Value]:
    """Returns `values`; of the first `n`, those that the loop would merge are merged.

    Otherwise each step of the loop would merge them again. Tracing the loop once more
    tells what it would merge. Codes are widened in each step: before the loop, the
    array would be kept all through it.
    """
    mergeable = [v for v in values[:n] if isinstance(v, Weight) and not is_coded(v)]
    if not ctx.hoist or not mergeable:
        return values
    reasons: dict[str, Equation | None] = {}

    def materialise(value: Any, eqn: Equation | None) -> jax.Array:
        if not isinstance(value, Weight):
            return value
        if not value.is_lookup:
            place = None if eqn is None else compat.located(eqn)
            reasons.update((part.path, place) for part in value.parts)
        return array_of(value)

    dry = dataclasses.replace(ctx.within(ctx.key), hoist=False, materialise=materialise)
    jax.eval_shape(lambda values: rule(dry, eqn, *values), list(values))
    return [
        ctx.materialise(v, reasons[v.parts[0].path])
        if i < n
        and isinstance(v, Weight)
        and not is_coded(v)
        and v.parts[0].path in reasons
        else v
        for i, v in enumerate(values)
    ]


def shard_map(ctx: Context, eqn: Equation, *values: Value) -> list[Value]:
    """`jax.shard_map`: factors are laid out as the axes of the weight that they share.

    A shard of the fan-in gives a part of the sum, in the base product as in the
    low-rank one, so the collectives of the body are right for both. All devices get the
    key of dropout.
    """
    for v in values:
        if ctx.gate is not None and isinstance(v, Weight) and v.terms:
            raise no_gate(v, eqn, "is divided over devices by hand")
    in_specs, out_specs = eqn.params["in_specs"], eqn.params["out_specs"]
    mesh = eqn.params["mesh"]
    code = compat.inner_code(eqn)
    operands = [
        ctx.materialise(v, eqn)
        if isinstance(v, Weight) and any(len(g) > 1 for g in v.dims)
        else v
        for v in values
    ]

    key = ctx.next_key()
    if key is not None:
        cuts = zip(eqn.invars, compat.in_axes(eqn), strict=True)
        axes = [ctx.axes_of(v) | cut for v, cut in cuts]
        ctx = dataclasses.replace(ctx, varies={**ctx.varies, **varied_axes(code, axes)})

    def inner(key: jax.Array | None, values: Sequence[Value]) -> list[Value]:
        local = [
            _local(v, compat.kind(var).shape) if isinstance(v, Weight) else v
            for v, var in zip(values, code.invars, strict=True)
        ]
        results = interpret(ctx.within(key), code, local)
        return [ctx.materialise(v, eqn) for v in results]

    specs = [
        _specs(v, spec, mesh) if isinstance(v, Weight) else spec
        for v, spec in zip(operands, in_specs, strict=True)
    ]
    if any(spec is None for spec in specs):
        return NotImplemented
    return jax.shard_map(
        inner,
        mesh=mesh,
        in_specs=(jax.P(), specs),
        out_specs=list(out_specs),
        axis_names=eqn.params["newly_manual_axes"],
        check_vma=eqn.params["check_vma"],
    )(key, operands)


def _specs(weight: Weight, spec: Any, mesh: Any) -> Weight | None:
    """Returns `weight` with a `PartitionSpec` in place of each array.

    The result is None if shards would cut blocks of codes.
    """
    entries = [*spec, *(None for _ in range(weight.w.ndim - len(spec)))]
    of = {g[0]: e for g, e in zip(weight.dims, entries, strict=True) if g}

    def place(_: Any, labels: Labels) -> tuple[Any, Labels]:
        return jax.P(*(of.get(s) for s in labels)), labels

    w = spec
    if isinstance(weight.w, Coded):
        w = placed(weight.w, of, mesh)
    return None if w is None else weight.map(place, w=w)


def _local(weight: Weight, shape: Sequence[int]) -> Weight:
    """Returns `weight` with the sizes that its atoms have in one shard."""
    sizes = {
        g[0]: g[0]._replace(size=n)
        for g, n in zip(weight.dims, shape, strict=True)
        if g
    }

    def relabel(x: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
        return x, tuple(sizes.get(s, s) for s in labels)

    dims = tuple(tuple(sizes[a] for a in group) for group in weight.dims)
    w = weight.w
    if isinstance(w, Coded):
        w = relabelled(w, {a: (b,) for a, b in sizes.items()})
        w = w.replace(shape=tuple(shape))
    return weight.map(relabel, w=w, dims=dims)


def _cut(values: Sequence[Value], *counts: int) -> list[list[Value]]:
    """Returns consecutive pieces of `values` of the given lengths, then the rest."""
    pieces, start = [], 0
    for n in counts:
        pieces.append(list(values[start : start + n]))
        start += n
    return [*pieces, list(values[start:])]


def _hoist(
    ctx: Context, eqn: Equation, body: compat.Code, carry: list[Value], n_consts: int
) -> dict[int, Value]:
    """Returns the weights in `carry` that the body hands on; materialises others."""
    fixed = {}
    for i, value in enumerate(carry):
        if is_special(value):
            if source(body.jaxpr, i) == n_consts + i:
                fixed[i] = value
            else:
                carry[i] = ctx.materialise(value, eqn)
    return fixed


def source(jaxpr: compat.Jaxpr, j: int) -> int | None:
    """Returns which argument of `jaxpr` its result `j` is, also through calls."""
    var = jaxpr.outvars[j]
    while not isinstance(var, compat.Literal):
        if var in jaxpr.invars:
            return jaxpr.invars.index(var)
        made = [e for e in jaxpr.eqns if any(v is var for v in e.outvars)]
        if not made or made[0].primitive.name not in CALLS:
            return None
        (eqn,) = made
        k = next(k for k, v in enumerate(eqn.outvars) if v is var)
        i = source(compat.inner_code(eqn).jaxpr, k)
        if i is None:
            return None
        var = eqn.invars[i]
    return None


def _scannable(ctx: Context, eqn: Equation, x: Value) -> Value:
    """Returns `x`, a stack to scan over, with the stacked axis of codes in front."""
    if not isinstance(x, Weight):
        return x
    if len(x.dims[0]) > 1:
        return ctx.materialise(x, eqn)
    if not isinstance(x.w, Coded) or not holds(x.w, x.dims[0]):
        return x
    coded = ctx.run.apply(functools.partial(stacked_first, group=x.dims[0]), x.w)
    return ctx.widen(x, eqn) if coded is None else x.replace(w=coded)


def _unstack(weight: Weight) -> tuple[Any, Any]:
    """Returns `w`, and each factor and gain with the stacked axis moved to the front.

    None stands for one that does not have the axis.
    """
    slices = []

    def front(x: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
        held = [i for i, s in enumerate(labels) if s in weight.dims[0]]
        slices.append(jnp.moveaxis(x, held[0], 0) if held else None)
        return x, labels

    weight.map(front)
    w = weight.w
    if isinstance(w, Coded):
        w = w.q if holds(w, weight.dims[0]) else None
    return w, slices


def _layer(stack: Weight, part: Any) -> Weight:
    """Returns one layer of `stack` from a slice of the result of `_unstack`."""
    w, slices = part
    remaining = iter(slices)

    def cut(whole: Any, labels: Labels) -> tuple[Any, Labels]:
        sliced = next(remaining)
        rest = tuple(s for s in labels if s not in stack.dims[0])
        return (whole if sliced is None else sliced), rest

    if isinstance(stack.w, Coded):
        w = layer_of(stack.w, w)
    return stack.map(cut, w=w, dims=stack.dims[1:])

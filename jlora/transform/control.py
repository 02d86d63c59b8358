"""Code inside code: calls, rematerialisation, loops and branches.

The inner jaxpr is interpreted again under the JAX function that made it. Weights go in
as pytrees; those that a loop or branch hands out are made plain arrays first.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import compat
from .interpret import Context, interpret, is_special
from .values import Labels, Weight


def call(ctx: Context, eqn: Any, *values: Any) -> list[Any]:
    """A nested `jit`: its name, shardings and being called twice are kept."""
    code = compat.inner_code(eqn)
    if not compat.is_staging(values):
        return interpret(ctx, code, values)
    signature = (id(code.jaxpr), jax.tree.structure(values))
    if signature not in ctx.calls:
        ins, outs = compat.call_shardings(eqn)

        def inner(key: Any, *values: Any) -> list[Any]:
            placed = [_place(v, s) for v, s in zip(values, ins, strict=True)]
            results = interpret(ctx.within(key), code, placed)
            return [_place(v, s) for v, s in zip(results, outs, strict=True)]

        inner.__name__ = compat.call_name(eqn)
        # The jaxpr is kept alive, so that its id stays its own.
        ctx.calls[signature] = (jax.jit(inner), code)
    return ctx.calls[signature][0](ctx.next_key(), *values)


def _place(value: Any, sharding: Any) -> Any:
    if sharding is None:
        return value
    if isinstance(value, Weight):
        return value.replace(w=lax.with_sharding_constraint(value.w, sharding))
    return lax.with_sharding_constraint(value, sharding)


def closed_call(ctx: Context, eqn: Any, *values: Any) -> list[Any]:
    """A call without settings of its own is inlined."""
    name = "jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"
    return interpret(ctx, compat.inner_code(eqn, name), values)


def remat(ctx: Context, eqn: Any, *values: Any) -> list[Any]:
    """`jax.checkpoint` with the same policy."""
    code = compat.inner_code(eqn)

    def inner(key: Any, *values: Any) -> list[Any]:
        return interpret(ctx.within(key), code, values)

    return jax.checkpoint(
        inner, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"]
    )(ctx.next_key(), *values)


def scan(ctx: Context, eqn: Any, *values: Any) -> list[Any]:
    """`lax.scan`: constant weights stay whole, stacked ones go a layer at a time.

    Of a stacked weight, whichever of `w`, `a` and `b` has the stacked axis is scanned,
    the others are constants. A carry that the body hands on as it came is a constant.
    """
    code = compat.inner_code(eqn)
    n_consts, n_carry = compat.scan_counts(eqn)
    length = eqn.params["length"]
    consts, carry, xs = _cut(values, n_consts, n_carry)
    fixed = _hoist(ctx, eqn, code, carry, n_consts)
    init = [None if i in fixed else v for i, v in enumerate(carry)]
    xs = [
        ctx.settle(x, eqn) if isinstance(x, Weight) and len(x.dims[0]) > 1 else x
        for x in xs
    ]
    keys = None if ctx.key is None else jax.random.split(ctx.next_key(), length)

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
            None if i in fixed else inner.settle(v, eqn) for i, v in enumerate(out)
        ]
        return plain[:n_carry], plain[n_carry:]

    final, ys = lax.scan(
        body,
        init,
        (keys, [_unstack(x) if isinstance(x, Weight) else x for x in xs]),
        length=length,
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    return [*(fixed.get(i, v) for i, v in enumerate(final)), *ys]


def while_loop(ctx: Context, eqn: Any, *values: Any) -> list[Any]:
    """`lax.while_loop`: constant weights, and carries handed on, stay factored."""
    cond = compat.inner_code(eqn, "cond_jaxpr")
    body = compat.inner_code(eqn, "body_jaxpr")
    cond_consts, body_consts, carry = _cut(
        values, eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    )
    fixed = _hoist(ctx, eqn, body, carry, len(body_consts))
    init = [None if i in fixed else v for i, v in enumerate(carry)]

    def fill(state: Sequence[Any]) -> list[Any]:
        return [fixed.get(i, v) for i, v in enumerate(state)]

    def step(loop: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        key, state = loop
        key, now = (None, None) if key is None else jax.random.split(key)
        inner = ctx.within(now)
        out = interpret(inner, body, [*body_consts, *fill(state)])
        return key, [
            None if i in fixed else inner.settle(v, eqn) for i, v in enumerate(out)
        ]

    def go_on(loop: tuple[Any, list[Any]]) -> Any:
        (out,) = interpret(ctx.within(None), cond, [*cond_consts, *fill(loop[1])])
        return out

    _, final = lax.while_loop(go_on, step, (ctx.next_key(), init))
    return [fixed.get(i, v) for i, v in enumerate(final)]


def cond(ctx: Context, eqn: Any, index: Any, *values: Any) -> list[Any]:
    """`lax.cond` and `lax.switch`: every branch gets the weights with their factors."""
    index = ctx.settle(index, eqn)
    key = ctx.next_key()

    def branch(code: compat.Code) -> Any:
        def run(key: Any, *values: Any) -> list[Any]:
            inner = ctx.within(key)
            return [inner.settle(v, eqn) for v in interpret(inner, code, values)]

        return run

    branches = [branch(compat.code(closed)) for closed in eqn.params["branches"]]
    return lax.switch(index, branches, key, *values)


def _cut(values: Sequence[Any], *counts: int) -> list[list[Any]]:
    """Returns consecutive pieces of `values` of the given lengths, and the rest."""
    pieces, start = [], 0
    for n in counts:
        pieces.append(list(values[start : start + n]))
        start += n
    return [*pieces, list(values[start:])]


def _hoist(
    ctx: Context, eqn: Any, body: compat.Code, carry: list[Any], n_consts: int
) -> dict[int, Any]:
    """Returns the weights among `carry` that the body hands on; settles the others."""
    fixed = {}
    for i, value in enumerate(carry):
        if is_special(value):
            if forwards(body.jaxpr, n_consts + i, i):
                fixed[i] = value
            else:
                carry[i] = ctx.settle(value, eqn)
    return fixed


def forwards(jaxpr: Any, i: int, j: int) -> bool:
    """Returns whether result `j` of `jaxpr` is its argument `i`, through calls too."""
    var = jaxpr.outvars[j]
    while var is not jaxpr.invars[i]:
        made = [e for e in jaxpr.eqns if any(v is var for v in e.outvars)]
        if not made or made[0].primitive.name not in ("jit", "pjit", "closed_call"):
            return False
        (eqn,) = made
        inner = compat.inner_code(eqn).jaxpr
        k = next(k for k, v in enumerate(eqn.outvars) if v is var)
        sources = [v for m, v in enumerate(eqn.invars) if forwards(inner, m, k)]
        if len(sources) != 1 or isinstance(sources[0], compat.Literal):
            return False
        (var,) = sources
    return True


def _unstack(weight: Weight) -> tuple[Any, Any]:
    """Returns `w`, and of each factor with its axis 0 the factor, that axis first."""

    def front(x: Any, labels: Labels) -> Any:
        held = [i for i, s in enumerate(labels) if s in weight.dims[0]]
        return jnp.moveaxis(x, held[0], 0) if held else None

    return weight.w, [
        (front(t.a, t.a_labels), front(t.b, t.b_labels)) for t in weight.terms
    ]


def _layer(stack: Weight, part: Any) -> Weight:
    """Returns one layer of `stack` from a slice of what `_unstack` gave."""
    w, slices = part

    def factor(sliced: Any, whole: Any, labels: Labels) -> tuple[Any, Labels]:
        rest = tuple(s for s in labels if s not in stack.dims[0])
        return (whole if sliced is None else sliced), rest

    terms = []
    for (a, b), term in zip(slices, stack.terms, strict=True):
        a, a_labels = factor(a, term.a, term.a_labels)
        b, b_labels = factor(b, term.b, term.b_labels)
        terms.append(
            dataclasses.replace(term, a=a, b=b, a_labels=a_labels, b_labels=b_labels)
        )
    return stack.replace(w=w, terms=tuple(terms), dims=stack.dims[1:])

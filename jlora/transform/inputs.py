"""Second moments of the inputs of weights, inside any function.

A weight carries a probe of zeros in the place of A, and a selector, the identity over
its fan-in, in the place of B. So all structural rules act on both. Where the weight
meets an activation, `x . selector` is the input in the leaf's own coordinates, whatever
was sliced, joined, reshaped or scaled before. The product's derivative with respect to
the probe is declared to be the sum of the outer products of that input. So the moments
are a gradient: `scan` gives one for each layer, and `jit`, `cond` and `checkpoint` are
not special cases.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..factors import Axes
from ..quantised import is_quantized, typed_as
from . import CONTROL, LINEAR, STRUCTURE, compat, control, structure
from .atoms import OTHER, RANK, Atom, Labels, lay_out, leaf_dims, regroup, size
from .compat import Equation
from .interpret import Context, Rule, interpret
from .thin import Dims
from .values import Operand, Term, Value, Weight, array_of, contract, leaf

SECOND = Atom((-5,), 0)  # labels the probe's last axis; its size is never read
CallPath = tuple[int, ...]


@dataclasses.dataclass
class Trace:
    """What one trace has met, for errors.

    Attributes:
      products: the leaves of each product, and where it stands.
      reached: the products that a derivative came back through.
      missed: for each leaf with a use that gives no input, the reason.
      kept: keeps the code alive, so that no other object gets its ids.
    """

    products: dict[CallPath, tuple[tuple[str, ...], str]] = dataclasses.field(
        default_factory=dict
    )
    reached: set[CallPath] = dataclasses.field(default_factory=set)
    missed: dict[str, str] = dataclasses.field(default_factory=dict)
    kept: list[Any] = dataclasses.field(default_factory=list)

    def problems(self) -> dict[str, str]:
        """Returns why the moments of a leaf would be wrong, by leaf."""
        lost = {
            path: f"its product{where} reaches no result through derivatives "
            "(stop_gradient, argmax, integers): return it from the function"
            for product, (paths, where) in self.products.items()
            if product not in self.reached
            for path in paths
        }
        return {**lost, **self.missed}


def input_moments(
    code: compat.Code,
    values: Sequence[jax.Array],
    weights: Mapping[int, tuple[str, Axes]],
    trace: Trace,
) -> dict[str, jax.Array]:
    """Returns sums of outer products of `[x, 1]` for each weight, by path.

    Shapes: `[*batch, n + 1, n + 1]` with `n` the product of the fan-in's sizes.

    Args:
      code: the staged function.
      values: its arguments.
      weights: for the position of each argument to look at, its path and its axes.
      trace: filled with facts that the caller has to check.
    """
    trace.kept.append(code)

    def total(probes: Mapping[str, jax.Array]) -> jax.Array:
        placed: list[Value] = [
            leaf(f"argument {i}", x) if is_quantized(x) else x
            for i, x in enumerate(values)
        ]
        for slot, (path, axes) in weights.items():
            placed[slot] = _probed(path, values[slot], axes, probes[path])
        ctx = _context(trace)
        outs = [ctx.materialise(v, None) for v in interpret(ctx, code, placed)]
        floats = [x for x in outs if jnp.issubdtype(x.dtype, jnp.inexact)]
        sums = [jnp.sum(jnp.real(x)).astype(jnp.float32) for x in floats]
        return sum(sums, jnp.zeros((), jnp.float32))

    probes = {}
    for slot, (path, axes) in weights.items():
        shape = values[slot].shape
        n = math.prod(shape[i] for i in axes.fan_in) + 1
        probes[path] = jnp.zeros([*(shape[i] for i in axes.batch), n, n], jnp.float32)
    return jax.grad(total)(probes)


def _probed(path: str, w: jax.Array, axes: Axes, probe: jax.Array) -> Weight:
    """Returns `w` with its probe as A and the identity over its fan-in as B."""
    dims = leaf_dims(w.shape)
    batch, fan_in = (
        tuple(dims[i][0] for i in role) for role in (axes.batch, axes.fan_in)
    )
    sizes = [atom.size for atom in (*batch, *fan_in)]
    n = size(fan_in)
    eye = jnp.eye(n, dtype=jnp.float32).reshape(*(atom.size for atom in fan_in), n)
    term = Term(
        probe,
        jnp.broadcast_to(eye, (*sizes, n)),
        (*batch, RANK, SECOND),
        (*batch, *fan_in, RANK),
        1.0,
        0.0,
    )
    return leaf(path, w, (term,))


def _context(trace: Trace) -> Context:
    def materialise(value: Any, eqn: Equation | None) -> jax.Array:
        if not isinstance(value, Weight):
            return value
        if value.terms and eqn is not None:
            where = f"`{eqn.primitive.name}`{compat.place(eqn)}"
            for part in value.parts:
                trace.missed.setdefault(part.path, f"{where} is not a matrix product")
        return array_of(value)

    return Context(rules=_rules(trace, ()), materialise=materialise)


def _rules(trace: Trace, calls: CallPath) -> dict[str, Rule]:
    """Returns the rules for code inside the equations `calls`."""

    def nested(rule: Rule) -> Rule:
        def inside(ctx: Context, eqn: Equation, *values: Value) -> Sequence[Value]:
            rules = _rules(trace, (*calls, id(eqn)))
            return rule(dataclasses.replace(ctx, rules=rules), eqn, *values)

        return inside

    calls_inlined = {"jit": control.closed_call, "pjit": control.closed_call}
    linear = dict.fromkeys(LINEAR, _unseen)
    return {
        **linear,
        "dot_general": _watched(LINEAR["dot_general"], trace, calls),
        **STRUCTURE,
        "stop_gradient": structure.keep,
        "select_n": _unseen,  # the branches of a `vmap` of `cond` run on every example
        **{name: nested(rule) for name, rule in (CONTROL | calls_inlined).items()},
        "shard_map": _unseen,
    }


def _unseen(ctx: Context, eqn: Equation, *operands: Value) -> Sequence[Value]:
    """Leaves the equation to the fallback, which reports the weights in it."""
    return NotImplemented


def _watched(rule: Rule, trace: Trace, calls: CallPath) -> Rule:
    """Returns `rule`, which ties the inputs of a weight to the probe of the weight."""

    def watched(
        ctx: Context, eqn: Equation, lhs: Operand, rhs: Operand
    ) -> Sequence[Value]:
        operands = (lhs, rhs)
        bare = [v.replace(terms=()) if isinstance(v, Weight) else v for v in operands]
        met: list[Weight] = []
        own = dataclasses.replace(ctx, used=lambda weight, *_, **__: met.append(weight))
        results = rule(own, eqn, *bare)
        if results is NotImplemented:
            return NotImplemented
        y: Any = results[0]
        for side, weight in enumerate(operands):
            if not isinstance(weight, Weight) or not weight.terms:
                continue
            if not any(bare[side] is seen for seen in met):
                ctx.materialise(weight, eqn)  # it is an activation here
                continue
            x = array_of(bare[1 - side])
            x, x_labels, summed = _labelled(eqn, side, x, weight)
            paths = tuple(part.path for part in weight.parts)
            product = (*calls, id(eqn), side)
            for term in weight.terms:
                rows = _rows(x, x_labels, summed, term)
                if rows is None:
                    where = compat.place(eqn)
                    trace.missed.update(
                        (path, f"the product{where} sums over other axes of it")
                        for path in paths
                    )
                    continue
                trace.products[product] = (paths, compat.place(eqn))
                reach = functools.partial(trace.reached.add, product)
                y = _tied(y, rows, term.a, reach)
        return [y]

    return watched


def _labelled(
    eqn: Equation, side: int, x: jax.Array, weight: Weight
) -> tuple[jax.Array, Labels, Labels]:
    """Returns the activation, the labels of its axes, and the labels summed over."""
    contracted, batch = eqn.params["dimension_numbers"]
    partner = {
        **dict(zip(contracted[1 - side], contracted[side], strict=True)),
        **dict(zip(batch[1 - side], batch[side], strict=True)),
    }
    groups = [
        weight.dims[partner[i]] if i in partner else (Atom((OTHER, i), n),)
        for i, n in enumerate(x.shape)
    ]
    labels = tuple(atom for group in groups for atom in group)
    wide = jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32
    x = lax.reshape(x, [atom.size for atom in labels]).astype(wide)
    summed = tuple(atom for i in contracted[side] for atom in weight.dims[i])
    return x, labels, summed


def _rows(
    x: jax.Array, x_labels: Labels, summed: Labels, term: Term
) -> jax.Array | None:
    """Returns the inputs `[x, 1]` of a leaf as `[*batch, rows, n + 1]`.

    A row that does not meet the leaf, since another leaf is stacked there, is zero,
    also in the last entry. A complex row counts as two: its real and its imaginary
    part. The result is None unless the product sums over exactly the leaf's fan-in.
    """
    probe_labels, labels = term.a_labels, term.b_labels
    batch = [s for s in probe_labels if s not in (RANK, SECOND)]
    fan_in = [s for s in labels if s.root >= 0 and s not in batch]
    if not set(fan_in) <= set(summed) or not set(summed) <= {*fan_in, *batch}:
        return None

    def exact(x: jax.Array, y: jax.Array, numbers: Dims) -> jax.Array:
        return lax.dot_general(x, y, numbers, precision=lax.Precision.HIGHEST)

    others = [s for s in (*x_labels, *labels) if s not in fan_in]
    t, t_labels = contract(exact, x, x_labels, term.b, labels, keep=others)
    tokens = [s for s in t_labels if s not in batch and s != RANK]
    rows = regroup(t, t_labels, [*((s,) for s in batch), tuple(tokens), (RANK,)])
    gone = [i for i, s in enumerate(labels) if s in fan_in or s == RANK]
    meets = jnp.max(jnp.abs(term.b), axis=gone) > 0
    meets = lay_out(
        meets,
        tuple(s for i, s in enumerate(labels) if i not in gone),
        [*batch, *tokens],
        (*rows.shape[:-1], 1),
    )
    parts = (rows.real, rows.imag) if jnp.iscomplexobj(rows) else (rows,)
    first = jax.lax.slice_in_dim(parts[0], 0, 1, axis=-1)
    ones = jnp.ones_like(first, jnp.float32) * meets.astype(jnp.float32)
    real = [jnp.concatenate([part, ones], axis=-1) for part in parts]
    return jnp.concatenate(real, axis=-2)


def _tied(
    y: jax.Array, rows: jax.Array, probe: jax.Array, reach: Callable[[], object]
) -> jax.Array:
    """Returns `y`; its derivative with respect to `probe` is the sum of `rows rowsᵀ`.

    The derivative is the same for any cotangent of `y`; `reach` is called if there is
    one.
    """

    def moments(rows: jax.Array) -> jax.Array:
        exact = lax.Precision.HIGHEST
        squared = functools.partial(jnp.einsum, "...ti,...tj->...ij", precision=exact)
        return typed_as(probe, squared, rows, rows)

    few = rows.shape[-2] < rows.shape[-1]  # then rows take less memory than moments

    @jax.custom_vjp
    def tie(y: jax.Array, rows: jax.Array, probe: jax.Array) -> jax.Array:
        return y

    def forward(y: Any, rows: Any, probe: Any) -> Any:
        return y, rows if few else moments(rows)

    def backward(kept: Any, dy: Any) -> Any:
        reach()
        return dy, None, moments(kept) if few else kept

    tie.defvjp(forward, backward)
    return tie(y, rows, probe)

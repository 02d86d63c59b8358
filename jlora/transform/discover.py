"""Finding out how a function uses each of its parameters, without running it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from . import CONTROL, LINEAR, STRUCTURE, compat
from .interpret import Context, interpret
from .values import Atom, Derived, Part, Weight, leaf

FACTORED, MERGED = "factored", "merged"
DERIVED, ELEMENTWISE = "derived", "elementwise"

Roles = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
_NONE: Roles = ((), (), ())

# Where one of these meets a parameter and data, the parameter is a bias, a norm's
# scale, a position table or the like, not the weight of a linear operation.
_POINTWISE = frozenset(
    {
        "add",
        "add_any",
        "and",
        "atan2",
        "clamp",
        "concatenate",
        "div",
        "dynamic_update_slice",
        "eq",
        "ge",
        "gt",
        "le",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "nextafter",
        "or",
        "pad",
        "pow",
        "rem",
        "scatter",
        "scatter-add",
        "select_n",
        "sub",
        "xor",
    }
)


@dataclasses.dataclass(frozen=True)
class Use:
    """One place where a leaf is used.

    Attributes:
      path: the leaf.
      op: name of the primitive.
      route: `"factored"`; `"merged"`, a linear or opaque operation that needs the whole
        weight; `"derived"`, something computed from weights alone; or `"elementwise"`.
      batch: the leaf's axes with a matrix each.
      fan_in: the leaf's axes that are summed over or looked up.
      fan_out: the leaf's axes that remain.
      where: the user's source line.
      scope: the name stack, as profilers show it.
      forms: how a product's value gets the low-rank term on a CPU and on an
        accelerator, see `cost`; empty for other operations.
    """

    path: str
    op: str
    route: str
    batch: tuple[int, ...]
    fan_in: tuple[int, ...]
    fan_out: tuple[int, ...]
    where: str
    scope: str
    forms: tuple[str, ...] = ()


_JOINS = frozenset({"add", "add_any", "concatenate", "stack", "sub"})


def discover(
    code: compat.Code, inputs: Sequence[Any], paths: Sequence[Any]
) -> list[Use]:
    """Returns every use of the leaves in `code`, in order, each once.

    Args:
      code: the staged function.
      inputs: its arguments, arrays or shapes.
      paths: for each input the leaf's path, or None for data.
    """
    shapes = {p: x.shape for p, x in zip(paths, inputs, strict=True) if p is not None}
    uses: dict[Use, None] = {}

    def record(
        path: str,
        op: str,
        route: str,
        eqn: Any,
        roots: Roles = _NONE,
        forms: Sequence[str] = (),
    ) -> None:
        where, scope = "", ""
        if eqn is not None:
            where, scope = compat.where(eqn), compat.scope(eqn)
        uses[Use(path, op, route, *roots, where, scope, tuple(forms))] = None

    def used(
        weight: Weight,
        op: str,
        *,
        fan_in: Sequence[Atom],
        batch: Sequence[Atom],
        eqn: Any,
        forms: Sequence[str] = (),
    ) -> None:
        for part in weight.parts:
            roles = _roles(
                weight, part, shapes[part.path], fan_in, batch, op == "gather"
            )
            record(part.path, op, FACTORED, eqn, roles, forms)

    def settle(value: Any, eqn: Any) -> Any:
        if isinstance(value, Weight):
            if value.is_rows:
                used(value, "gather", fan_in=(), batch=(), eqn=eqn)
            else:
                op = "return" if eqn is None else eqn.primitive.name
                for path in _sources(value):
                    record(path, op, MERGED, eqn)
        return value.w if isinstance(value, Weight | Derived) else value

    def fallback(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
        operands = [
            settle(v, eqn) if isinstance(v, Weight) and v.is_rows else v
            for v in operands
        ]
        sources = dict.fromkeys(path for v in operands for path in _sources(v))
        results = compat.bind(
            eqn, *(v.w if isinstance(v, Weight | Derived) else v for v in operands)
        )
        name = eqn.primitive.name
        if _has_data(eqn, operands):
            route = ELEMENTWISE if name in _POINTWISE else MERGED
            for path in sources:
                record(path, name, route, eqn)
            return results
        for v in operands:
            for path in _sources(v) if isinstance(v, Weight) else ():
                record(path, name, DERIVED, eqn)
        return [Derived(x, tuple(sources)) for x in results]

    def unless_derived(rule):
        def guarded(ctx, eqn, *operands):
            name = eqn.primitive.name
            scales = name in ("mul", "div")
            sources = [path for v in operands for path in _sources(v)]
            operands = [
                v.w if isinstance(v, Derived) and (scales or not v.paths) else v
                for v in operands
            ]
            if name in _JOINS and not all(isinstance(v, Weight) for v in operands):
                return NotImplemented  # with data: a bias, a position table, a token
            derived = [v for v in operands if isinstance(v, Derived)]
            if derived and name in LINEAR:  # learned queries, normalised: activations
                operands = [v.w if isinstance(v, Derived) else v for v in operands]
            elif derived:
                return NotImplemented
            if not any(isinstance(v, Weight) for v in operands):
                return NotImplemented
            results = rule(ctx, eqn, *operands)
            if derived and results is not NotImplemented:
                made_of = dict.fromkeys(path for v in derived for path in v.paths)
                return [Derived(x, tuple(made_of)) for x in results]
            if scales and results is not NotImplemented:
                scaled = _sources(results[0])
                for path in sources:
                    if path not in scaled:
                        record(path, name, ELEMENTWISE, eqn)
            return results

        return guarded

    def with_constants(rule):
        """A literal that enters inner code is a constant there, too."""

        def guarded(ctx, eqn, *operands):
            return rule(
                ctx,
                eqn,
                *(
                    Derived(v, ()) if isinstance(atom, compat.Literal) else v
                    for v, atom in zip(operands, eqn.invars, strict=True)
                ),
            )

        return guarded

    rules = {k: unless_derived(rule) for k, rule in (LINEAR | STRUCTURE).items()}
    ctx = Context(
        rules=rules | {k: with_constants(rule) for k, rule in CONTROL.items()},
        used=used,
        fallback=fallback,
        settle=settle,
        constant=lambda x: Derived(x, ()),
    )

    def run(arrays: Sequence[Any]) -> list[Any]:
        values = [
            x if path is None else leaf(path, x)
            for x, path in zip(arrays, paths, strict=True)
        ]
        outs = interpret(ctx, code, values)
        return [settle(v, None) for v in outs]

    jax.eval_shape(run, list(inputs))
    return list(uses)


def _sources(value: Any) -> tuple[str, ...]:
    """Returns the leaves that `value` is made of."""
    if isinstance(value, Weight):
        return tuple(part.path for part in value.parts)
    return value.paths if isinstance(value, Derived) else ()


def _has_data(eqn: Any, operands: Sequence[Any]) -> bool:
    """Returns whether an operand comes from the function's inputs.

    An array closed over or computed from nothing is data too where it meets a vector
    (it is then an input that the function closes over), but a mask where it meets a
    matrix. What data chooses among weights is a weight.
    """
    pairs = list(zip(operands, eqn.invars, strict=True))
    if eqn.primitive.name == "select_n":
        del pairs[0]
    vectors = any(
        isinstance(v, Weight) and sum(map(bool, v.dims)) < 2 for v in operands
    )
    return any(
        vectors and not v.paths and jnp.ndim(v.w) > 0
        if isinstance(v, Derived)
        else not isinstance(v, Weight) and not isinstance(atom, compat.Literal)
        for v, atom in pairs
    )


def _roles(
    weight: Weight,
    part: Part,
    shape: Sequence[int],
    fan_in: Sequence[Atom],
    batch: Sequence[Atom],
    rows: bool,
) -> Roles:
    """Returns the leaf's batch, fan-in and fan-out axes in a use.

    An axis that was indexed or scanned on the way is a batch axis, or the fan-in where
    rows were looked up.
    """
    axis = dict(part.roots)
    present = {axis.get(atom.root) for group in weight.dims for atom in group}
    summed, shared = ({axis.get(a.root) for a in atoms} for atoms in (fan_in, batch))
    batch_axes, in_axes, out_axes = [], [], []
    for i, n in enumerate(shape):
        free = any(
            axis.get(a.root) == i and a not in fan_in and a not in batch
            for group in weight.dims
            for a in group
        )
        gone = i not in present and n > 1
        if i in summed or (gone and rows):
            in_axes.append(i)
        elif gone or (i in shared and not free):
            batch_axes.append(i)
        else:
            out_axes.append(i)
    return tuple(batch_axes), tuple(in_axes), tuple(out_axes)

"""Finding out how a function uses each of its parameters, without running it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ..quantised import is_quantized
from . import CONTROL, LINEAR, STRUCTURE, compat
from .atoms import Atom
from .compat import Equation, kind
from .interpret import Context, Rule, interpret
from .linear import is_elementwise
from .primitives import JOINS, POINTWISE, PREPARES, SCALES
from .running import ON_ARRAYS, ON_TYPES
from .values import Derived, Part, Value, Weight, array_of, is_coded, leaf

FACTORED, MERGED, WIDENED = "factored", "merged", "widened"
DERIVED, ELEMENTWISE = "derived", "elementwise"

Roles = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
_NONE: Roles = ((), (), ())


@dataclasses.dataclass(frozen=True)
class Use:
    """One place where a leaf is used.

    Attributes:
      path: the leaf.
      op: name of the primitive.
      route: `"factored"`; `"merged"`, a linear or opaque operation that needs the whole
        weight; `"widened"`, where a quantised weight becomes an array; `"derived"`, a
        result of weights only; or `"elementwise"`.
      batch: the leaf's axes along which each entry is a matrix.
      fan_in: the leaf's axes that are summed over or looked up.
      fan_out: the leaf's axes that remain.
      where: the user's source line, or an empty text.
      scope: the name stack, as profilers show it.
      forms: how a product's value gets the low-rank term on a CPU and on an
        accelerator, see `cost`; empty where there is no choice.
      mixed: whether an array was added to the leaf before, so it may be an activation.
      doubtful: whether the leaf's axes decide if a factor serves this use.
      stacked: the batch axes that were scanned or indexed before, one layer at a time.
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
    mixed: bool = False
    doubtful: bool = False
    stacked: tuple[int, ...] = ()

    @property
    def place(self) -> str:
        """The operation and where it stands, in words."""
        if self.op == "return":
            return "returned by the function"
        return f"`{self.op}`" + compat.place_text(self.where, self.scope)


def discover(
    code: compat.Code, inputs: Sequence[Any], paths: Sequence[str | None]
) -> list[Use]:
    """Returns every use of the leaves in `code`, in order and without repeats.

    Args:
      code: the staged function.
      inputs: its arguments, arrays or shapes.
      paths: for each input the leaf's path, or None for data.
    """
    shapes = {p: x.shape for p, x in zip(paths, inputs, strict=True) if p is not None}
    found = _Discovery(shapes)
    # The code has the types of dense arguments, and `types_of` those of codes.
    types: list[Any] = list(map(kind, code.invars))
    codes = {i: x for i, x in enumerate(inputs) if is_quantized(x)}
    for i, x in compat.types_of(lambda codes: codes, codes).items():
        types[i] = x
    values = [
        x if path is None else leaf(path, x)
        for x, path in zip(types, paths, strict=True)
    ]
    for value in interpret(found.context(), code, values):
        found.materialise(value, None)
    return list(found.uses)


class _Discovery:
    """Notes every use of a leaf during one trace.

    Attributes:
      shapes: the shape of each leaf.
      uses: the uses found so far, in order.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self.shapes = shapes
        self.uses: dict[Use, None] = {}

    def context(self) -> Context:
        """Returns the context that makes `interpret` report uses to this object."""
        rules = LINEAR | {name: _on_codes(rule) for name, rule in STRUCTURE.items()}
        guarded = {name: self.unless_derived(rule) for name, rule in rules.items()}
        shard_map = {"shard_map": _traced(CONTROL["shard_map"])}
        return Context(
            run=ON_TYPES,
            rules=guarded | CONTROL | shard_map,
            used=self.used,
            fallback=self.fallback,
            materialise=self.materialise,
            widen=self.widen,
            constant=lambda x: Derived(x, ()),
        )

    def record(
        self,
        path: str,
        op: str,
        route: str,
        eqn: Equation | None,
        roles: Roles = _NONE,
        forms: Sequence[str] = (),
        mixed: bool = False,
        doubtful: bool = False,
        stacked: tuple[int, ...] = (),
    ) -> None:
        """Notes one use of the leaf `path`; `eqn` is None where it is returned."""
        where, scope = "", ""
        if eqn is not None:
            where, scope = compat.where(eqn), compat.scope(eqn)
        more = tuple(forms), mixed, doubtful, stacked
        use = Use(path, op, route, *roles, where, scope, *more)
        self.uses[use] = None

    def used(
        self,
        weight: Weight,
        op: str,
        *,
        fan_in: Sequence[Atom],
        batch: Sequence[Atom],
        eqn: Equation | None,
        forms: Sequence[str] = (),
    ) -> None:
        """Notes a linear use of each leaf that `weight` comes from."""
        flags = bool(weight.mixed), weight.doubtful
        for part in weight.parts:
            shape = self.shapes[part.path]
            roles = _roles(weight, part, shape, fan_in, batch, op == "gather")
            stacked = tuple(i for i in roles[0] if i not in _present(weight, part))
            self.record(part.path, op, FACTORED, eqn, roles, forms, *flags, stacked)
        for path in weight.joined:
            self.record(path, op, MERGED, eqn)

    def widen(self, weight: Any, eqn: Equation | None) -> Weight:
        """Returns `weight` as an array, and notes it if the leaf is quantised."""
        if is_coded(weight) and not weight.is_lookup:
            for path in _sources(weight):
                op = "return" if eqn is None else eqn.primitive.name
                self.record(path, op, WIDENED, eqn)
        return weight.replace(w=array_of(weight))

    def materialise(self, value: Value, eqn: Equation | None) -> jax.Array:
        """Returns `value` as an array, and notes the use if it is a weight."""
        if isinstance(value, Weight):
            value = self.widen(value, eqn)
            if value.is_lookup:
                self.used(value, "gather", fan_in=(), batch=(), eqn=eqn)
            elif value.with_data:
                self.met_data(value)
            else:
                op = "return" if eqn is None else eqn.primitive.name
                route = MERGED if value.is_matrix else DERIVED
                for path in _sources(value):
                    self.record(path, op, route, eqn)
        return array_of(value)

    def met_data(self, weight: Weight) -> None:
        """Notes that `weight` is an activation since data became part of it."""
        op, where, scope = weight.mixed
        for path in _sources(weight):
            self.uses[Use(path, op, ELEMENTWISE, *_NONE, where, scope)] = None

    def fallback(
        self, ctx: Context, eqn: Equation, operands: Sequence[Value]
    ) -> Sequence[Value]:
        """Returns the results of an equation without a rule, and notes its route."""
        operands = [
            self.materialise(v, eqn)
            if isinstance(v, Weight) and (v.is_lookup or v.with_data)
            else v
            for v in operands
        ]
        operands = [self.widen(v, eqn) if is_coded(v) else v for v in operands]
        sources = dict.fromkeys(path for v in operands for path in _sources(v))
        results = ctx.run.bind(eqn, *map(array_of, operands))
        name = eqn.primitive.name
        if _has_data(eqn, operands):
            pointwise = name in POINTWISE or is_elementwise(eqn, operands)
            route = ELEMENTWISE if pointwise else MERGED
            for path in sources:
                roles = self.kernel_roles(path, eqn, operands)
                self.record(path, name, route, eqn, roles)
            return results
        for v in operands:
            for path in _sources(v) if isinstance(v, Weight) else ():
                self.record(path, name, DERIVED, eqn)
        return [Derived(x, tuple(sources)) for x in results]

    def kernel_roles(
        self, path: str, eqn: Equation, operands: Sequence[Value]
    ) -> Roles:
        """Returns the axes' roles of a leaf whose kernel a convolution merges.

        They are not known, and empty, for other operations, and where the kernel has
        another shape than the leaf.
        """
        shape = self.shapes[path]
        if eqn.primitive.name != "conv_general_dilated":
            return _NONE
        kernel = operands[1]
        if path not in _sources(kernel) or array_of(kernel).shape != shape:
            return _NONE
        out, *ins = eqn.params["dimension_numbers"].rhs_spec
        return (), tuple(sorted(ins)), (out,)

    def unless_derived(self, rule: Rule) -> Rule:
        """Returns `rule` for operands that may be computed from weights or constants.

        Such an array scales a weight, or is added to it, as data does. In a product it
        is an activation (learned or normalised queries), so the result is computed too.
        Anywhere else the rule does not hold.
        """

        def guarded(ctx: Context, eqn: Equation, *operands: Value) -> Sequence[Value]:
            name = eqn.primitive.name
            combines = name in SCALES or name in JOINS
            values: Sequence[Any] = operands
            derived = [v for v in operands if isinstance(v, Derived)]
            if derived:
                derived = [v for v in derived if v.paths]
                if derived and not combines and name not in LINEAR:
                    return NotImplemented
                values = [v.w if isinstance(v, Derived) else v for v in operands]
                if not any(isinstance(v, Weight) for v in values):
                    return NotImplemented
            results = rule(ctx, eqn, *values)
            if results is NotImplemented:
                return results
            if combines:
                return self.combined(eqn, operands, results)
            if derived:
                made_of = dict.fromkeys(path for v in derived for path in v.paths)
                return [Derived(x, tuple(made_of)) for x in results]
            return results

        return guarded

    def combined(
        self, eqn: Equation, operands: Sequence[Value], results: Sequence[Value]
    ) -> Sequence[Value]:
        """Returns the weight that `operands` make, with what became part of it noted.

        Where parameters scale every entry of a weight, any of them may be the weight.
        """
        (weight,) = results
        assert isinstance(weight, Weight)
        scaled = _sources(weight)
        others = [p for v in operands for p in _sources(v) if p not in scaled]
        has_data = not all(isinstance(v, Weight | Derived) for v in operands)
        if eqn.primitive.name in SCALES:
            if weight.mixed and not weight.with_data and others:
                return NotImplemented
            for path in others:
                self.record(path, eqn.primitive.name, ELEMENTWISE, eqn)
            others = []
        return [
            weight.replace(
                with_data=bool(weight.mixed) and (weight.with_data or has_data),
                joined=(*weight.joined, *dict.fromkeys(others)),
            )
        ]


def _traced(rule: Rule) -> Rule:
    """Returns `rule`, which computes with arrays, for types: JAX traces what it does.

    Types of codes, and those of the shards of an array, are JAX's to find.
    """

    def traced(ctx: Context, eqn: Equation, *values: Value) -> Sequence[Value]:
        if ctx.run is not ON_TYPES:
            return rule(ctx, eqn, *values)  # inside code that is traced already
        own = dataclasses.replace(ctx, run=ON_ARRAYS)
        holds = []

        def run(*values: Value) -> Sequence[Value]:
            results = rule(own, eqn, *values)
            holds.append(results is not NotImplemented)
            return results if holds[0] else []

        results = compat.types_of(run, *values)
        return results if holds[0] else NotImplemented

    return traced


def _on_codes(rule: Rule) -> Rule:
    """Returns `rule`, traced where it computes with codes."""
    traced = _traced(rule)

    def on_codes(ctx: Context, eqn: Equation, *values: Value) -> Sequence[Value]:
        computes = eqn.primitive.name not in PREPARES and any(map(is_coded, values))
        own = traced if computes else rule
        return own(ctx, eqn, *values)

    return on_codes


def _sources(value: Value) -> tuple[str, ...]:
    """Returns the leaves that `value` is made of."""
    if isinstance(value, Weight):
        return (*(part.path for part in value.parts), *value.joined)
    return value.paths if isinstance(value, Derived) else ()


def _has_data(eqn: Equation, operands: Sequence[Value]) -> bool:
    """Returns whether an operand comes from the function's inputs.

    An array that the function closes over, or computes from constants, is a mask where
    it meets a matrix, and data where it meets a vector. A choice that data makes among
    weights is a weight.
    """
    chosen = operands[1:] if eqn.primitive.name == "select_n" else operands
    vectors = any(isinstance(v, Weight) and _is_vector(v) for v in operands)
    return any(
        vectors and not v.paths and np.ndim(v.w) > 0
        if isinstance(v, Derived)
        else not isinstance(v, Weight)
        for v in chosen
    )


def _is_vector(weight: Weight) -> bool:
    """Returns whether `weight` has fewer than two axes of a leaf, also if joined."""
    return len({a.root for group in weight.dims for a in group if a.root >= 0}) < 2


def _present(weight: Weight, part: Part) -> set[int | None]:
    """Returns the leaf's axes that `weight` still has."""
    axis = dict(part.roots)
    return {axis.get(atom.root) for group in weight.dims for atom in group}


def _roles(
    weight: Weight,
    part: Part,
    shape: Sequence[int],
    fan_in: Sequence[Atom],
    batch: Sequence[Atom],
    rows: bool,
) -> Roles:
    """Returns the leaf's batch, fan-in and fan-out axes in a use.

    An axis that was indexed or scanned before the use is a batch axis; where rows were
    looked up it is the fan-in.
    """
    axis = dict(part.roots)
    held = [(axis.get(atom.root), atom) for group in weight.dims for atom in group]
    present = _present(weight, part)
    summed = {i for i, atom in held if atom in fan_in}
    shared = {i for i, atom in held if atom in batch}
    free = {i for i, atom in held if atom not in fan_in and atom not in batch}
    batch_axes, in_axes, out_axes = [], [], []
    for i, n in enumerate(shape):
        gone = i not in present and n > 1
        if i in summed or (gone and rows):
            in_axes.append(i)
        elif gone or (i in shared and i not in free):
            batch_axes.append(i)
        else:
            out_axes.append(i)
    return tuple(batch_axes), tuple(in_axes), tuple(out_axes)

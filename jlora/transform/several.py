"""Steps that make one weight of several: concatenations, stacks, sums and choices."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._numerics import at_least_float32
from .atoms import STACKED, Atom, Group, Labels, regroup
from .coded import Coded, relabelled, side_by_side, with_axis
from .compat import Equation, Literal, kind, marked
from .interpret import Context
from .values import Operand, Part, Term, Weight, array_of, is_coded, new_atom


def concatenate(ctx: Context, eqn: Equation, *values: Operand) -> list[Weight]:
    """`[w1 + s a1 b1 | w2 + s a2 b2]`: each term is padded with zeros."""
    return _side_by_side(ctx, eqn, values, eqn.params["dimension"])


def stack(ctx: Context, eqn: Equation, *values: Operand) -> list[Weight]:
    """`concatenate` along a new axis."""
    axis = eqn.params["axis"]
    parts = [
        v.replace(w=with_axis(v.w, axis), dims=(*v.dims[:axis], (), *v.dims[axis:]))
        if isinstance(v, Weight)
        else with_axis(v, axis)
        for v in values
    ]
    return _side_by_side(ctx, eqn, values, axis, parts)


def _side_by_side(
    ctx: Context,
    eqn: Equation,
    values: Sequence[Operand],
    axis: int,
    parts: Sequence[Operand] | None = None,
) -> list[Weight]:
    parts = values if parts is None else parts
    aligned = _align(parts, but=axis)
    if aligned is None:
        return NotImplemented
    first, weights = aligned
    shapes = [_shape(v) for v in parts]
    total = sum(shape[axis] for shape in shapes)
    old = first.dims[axis]
    atom = old[0]._replace(size=total) if old else new_atom(first, STACKED, total)
    joint_gain = _joint_gain(weights, shapes, axis, atom)
    if joint_gain is NotImplemented:
        return joint_gain
    terms: list[Term] = []
    start = 0
    for weight, shape in zip(weights, shapes, strict=True):
        if weight is not None:
            before, after = start, total - start - shape[axis]
            own = weight.dims[axis]
            terms += [_padded(t, own, atom, before, after) for t in weight.terms]
        start += shape[axis]
    w = _joined(ctx, eqn, values, weights, axis, atom)
    if w is None:
        return NotImplemented
    dims = (*first.dims[:axis], (atom,), *first.dims[axis + 1 :])
    parts_of = tuple(p for weight in weights if weight for p in weight.parts)
    joint = first.replace(w=w, terms=tuple(terms), dims=dims, parts=parts_of)
    joint = _of_all(joint, eqn, weights)
    if joint_gain is not None:
        gain, gain_labels = joint_gain
        joint = joint.replace(gain=gain, gain_labels=gain_labels)
    return [joint]


def _joined(
    ctx: Context,
    eqn: Equation,
    values: Sequence[Operand],
    weights: Sequence[Weight | None],
    axis: int,
    atom: Atom,
) -> Any:
    """Returns the frozen arrays side by side; None if codes do not fit together."""
    coded = [weight.w for weight in weights if weight and isinstance(weight.w, Coded)]
    if not coded:
        return ctx.run.bind(eqn, *map(array_of, values))[0]
    if len(coded) < len(weights):
        return None
    own = [weight.dims[axis] for weight in weights if weight]
    return side_by_side(coded, own, atom, kind(eqn.outvars[0]).shape)


def _joint_gain(
    weights: Sequence[Weight | None],
    shapes: Sequence[tuple[int, ...]],
    axis: int,
    atom: Atom,
) -> Any:
    """Returns the gains side by side along `atom`, and their labels.

    A weight without a gain counts as a gain of one. The result is None if no weight has
    one. Gains that differ in their other axes, or lack the joined axis, give
    NotImplemented.
    """
    held = [weight for weight in weights if weight and weight.gain is not None]
    if not held:
        return None
    own, labels = held[0].dims[axis], held[0].gain_labels
    rest = tuple(s for s in labels if s not in own)
    if any(set(weight.gain_labels) != {*weight.dims[axis], *rest} for weight in held):
        return NotImplemented
    others = tuple(s.size for s in rest)
    dtype = held[0].gain.dtype
    pieces = []
    for weight, shape in zip(weights, shapes, strict=True):
        length = (shape[axis], *others)
        if weight is None or weight.gain is None:
            pieces.append(jnp.ones(length, dtype))
        else:
            groups = [weight.dims[axis], *((s,) for s in rest)]
            gain = regroup(weight.gain, weight.gain_labels, groups)
            pieces.append(gain.astype(dtype))
    return jnp.concatenate(pieces), (atom, *rest)


def _padded(term: Term, own: Group, atom: Atom, before: int, after: int) -> Term:
    """Returns `term` with the axis `own` padded with zeros to the size of `atom`."""
    if not own:
        term = dataclasses.replace(
            term,
            b=jnp.expand_dims(term.b, -1),
            b_labels=(*term.b_labels, Atom(atom.name, 1)),
        )
        own = (Atom(atom.name, 1),)

    def pad(x: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
        if own[0] not in labels:
            return x, labels
        i = labels.index(own[0])
        widths = [(0, 0, 0)] * x.ndim
        widths[i] = (before, after, 0)
        x = lax.pad(x, jnp.zeros((), x.dtype), widths)
        return x, (*labels[:i], atom, *labels[i + 1 :])

    return term.map(pad)


def add(ctx: Context, eqn: Equation, x: Operand, y: Operand) -> list[Weight]:
    """`(w1 + s a1 b1) + (w2 + s a2 b2)`: the terms of both."""
    return _sum(ctx, eqn, x, y, 1)


def sub(ctx: Context, eqn: Equation, x: Operand, y: Operand) -> list[Weight]:
    """`(w1 + s a1 b1) - (w2 + s a2 b2)`: the terms of both, the second's negated."""
    return _sum(ctx, eqn, x, y, -1)


def complex_(ctx: Context, eqn: Equation, x: Operand, y: Operand) -> list[Weight]:
    """`(w1 + s a1 b1) + i (w2 + s a2 b2)`: the terms of both, the second's times i."""
    return _sum(ctx, eqn, x, y, 1j)


def _sum(
    ctx: Context, eqn: Equation, x: Operand, y: Operand, factor: complex
) -> list[Weight]:
    aligned = _align((x, y))
    if aligned is None:
        return NotImplemented
    first, (left, right) = aligned
    if any(map(is_coded, (x, y))):
        return NotImplemented
    (w,) = ctx.run.bind(eqn, array_of(x), array_of(y))
    if any(weight and weight.gain is not None for weight in (left, right)):
        return NotImplemented
    if w.shape != first.w.shape:
        return NotImplemented
    terms = left.terms if left else ()
    for term in right.terms if right else ():
        b = term.b
        if isinstance(factor, complex):
            b = b.astype(at_least_float32(b.dtype, w.dtype))
        terms += (dataclasses.replace(term, b=factor * b),)
    parts = tuple(p for weight in (left, right) if weight for p in weight.parts)
    summed = first.replace(w=w, terms=terms, parts=parts)
    return [_of_all(summed, eqn, (left, right))]


def _of_all(joint: Weight, eqn: Equation, weights: Sequence[Weight | None]) -> Weight:
    """Returns `joint` with the marks of `weights`; None stands for an array."""
    marks = [w.mixed for w in weights if w is not None and w.mixed]
    marks += [marked(eqn)] if None in weights else []
    joined = [path for w in weights if w is not None for path in w.joined]
    return joint.replace(
        mixed=marks[0] if marks else (),
        with_data=any(w is not None and w.with_data for w in weights),
        joined=tuple(dict.fromkeys(joined)),
        doubtful=True,
    )


def select_n(
    ctx: Context, eqn: Equation, which: Operand, *cases: Operand
) -> list[Weight]:
    """A choice among versions of one weight is a choice among their factors.

    `vmap` of `cond` makes such choices, of a weight and itself without its derivative.
    The choice may differ along axes that count matrices, and not inside a matrix. Both
    factors get these axes.
    """
    (first, *_) = cases
    if isinstance(which, Weight) or not isinstance(first, Weight):
        return NotImplemented
    if any(jax.tree.structure(v) != jax.tree.structure(first) for v in cases[1:]):
        return NotImplemented
    varied = ctx.varied_axes(eqn.invars[0])
    if varied is None or first.looked_up or not _leaves_matrices(first, varied):
        return NotImplemented
    atoms = [first.dims[i][0] for i in varied]
    for term in first.terms:
        if any((s in term.a_labels) != (s in term.b_labels) for s in atoms):
            return NotImplemented
    w = _chosen(ctx, eqn, which, cases)
    if w is None:
        return NotImplemented
    picked = tuple(slice(None) if i in varied else 0 for i in range(which.ndim))
    some: Any = which[picked] if first.terms else None

    def choose(labels: Labels, *factors: jax.Array) -> tuple[jax.Array, Labels]:
        new = tuple(s for s in atoms if s not in labels)
        sizes = tuple(s.size for s in new)
        spread = [jnp.broadcast_to(x, (*sizes, *x.shape)) for x in factors]
        labels = (*new, *labels)
        held = [s for s in labels if s in atoms]
        ordered = lax.transpose(some, [atoms.index(s) for s in held])
        along = [labels.index(s) for s in held]
        mask = lax.broadcast_in_dim(ordered, spread[0].shape, along)
        return lax.select_n(mask, *spread), labels

    versions = [_factors(v) for v in cases]
    chosen = iter(
        [choose(own[0][1], *(x for x, _ in own)) for own in zip(*versions, strict=True)]
    )
    return [first.map(lambda *_: next(chosen), w=w)]


def _chosen(ctx: Context, eqn: Equation, which: jax.Array, cases: Sequence[Any]) -> Any:
    """Returns the frozen array that is chosen; None if it is one of several codes.

    Codes and scales have no derivative to choose, so one array, with and without its
    derivative, is one. The derivative with respect to scales is that of all cases.
    """
    first, *others = (case.w for case in cases)
    if not isinstance(first, Coded):
        return ctx.run.bind(eqn, which, first, *others)[0]
    made = [_made_by(ctx, v) for v in eqn.invars[1:]]
    stops = [m is not None and m.primitive.name == "stop_gradient" for m in made]
    own = zip(eqn.invars[1:], made, stops, strict=True)
    if len({m.invars[0] if m and stop else v for v, m, stop in own}) > 1:
        return None
    return cases[stops.index(False) if False in stops else 0].w


def _made_by(ctx: Context, v: Any) -> Equation | None:
    return None if isinstance(v, Literal) else ctx.made.get(v)


def _factors(weight: Operand) -> list[tuple[jax.Array, Labels]]:
    """Returns each factor, and the gain, with its labels, in the order of `map`."""
    assert isinstance(weight, Weight)
    found: list[tuple[jax.Array, Labels]] = []

    def note(x: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
        found.append((x, labels))
        return x, labels

    weight.map(note)
    return found


def _leaves_matrices(weight: Weight, varied: Sequence[int]) -> bool:
    """Returns whether matrices are left at each entry of the axes `varied`."""
    own = [i for i, g in enumerate(weight.dims) if any(a.root >= 0 for a in g)]
    single = all(len(weight.dims[i]) == 1 for i in varied)
    return single and len(set(own) - set(varied)) > 1


def _shape(value: Operand) -> tuple[int, ...]:
    return value.w.shape if isinstance(value, Weight) else value.shape


def _align(
    values: Sequence[Operand], but: int | None = None
) -> tuple[Weight, list[Weight | None]] | None:
    """Returns the first weight, and the weights with their atoms named as in it.

    None stands for a value that is not a weight. Axis `but` may differ in size. The
    result is None where the weights are not matrices of one layout, or hold looked-up
    rows.
    """
    weights = [v for v in values if isinstance(v, Weight)]
    first = weights[0]
    shapes = {tuple(n for i, n in enumerate(_shape(v)) if i != but) for v in values}
    if len(shapes) != 1 or any(v.looked_up or not v.is_matrix for v in weights):
        return None
    out: list[Weight | None] = []
    for value in values:
        if not isinstance(value, Weight):
            out.append(None)
            continue
        names = {}
        for i, (theirs, ours) in enumerate(zip(value.dims, first.dims, strict=True)):
            if i == but and (len(theirs) > 1 or len(theirs) != len(ours)):
                return None
            if i != but and [a.size for a in theirs] != [a.size for a in ours]:
                return None
            pairs = zip(theirs, ours, strict=True)
            names |= {a: b._replace(size=a.size) for a, b in pairs}
        out.append(_renamed(value, names))
    return first, out


def _renamed(weight: Weight, names: dict[Atom, Atom]) -> Weight:
    def rename(x: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
        return x, tuple(names.get(s, s) for s in labels)

    now = {old.root: new.root for old, new in names.items()}
    parts = tuple(
        Part(part.path, tuple((now[r], axis) for r, axis in part.roots if r in now))
        for part in weight.parts
    )
    dims = tuple(tuple(names[a] for a in group) for group in weight.dims)
    w = relabelled(weight.w, {old: (new,) for old, new in names.items()})
    return weight.map(rename, w=w, dims=dims, parts=parts)

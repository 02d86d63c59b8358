"""Linear steps between a parameter and its use: they move, split or scale its axes.

Each rule does the step to `w` as it was written, and to the factor that holds the axes
concerned, which is small. A step that no factor can express returns NotImplemented.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .compat import Equation, bind, kind, marked
from .interpret import Context
from .values import (
    BROADCAST,
    INDEX,
    Atom,
    Group,
    Labels,
    Operand,
    Step,
    Term,
    Weight,
    array_of,
    new_atom,
)


def keep(ctx: Context, eqn: Equation, weight: Weight) -> list[Weight]:
    """Casts, copies, names and placements: `f(w + s a b) = f(w) + s a b`."""
    (w,) = bind(eqn, weight.w)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        return NotImplemented
    return [weight.replace(w=w)]


def stop_gradient(ctx: Context, eqn: Equation, weight: Weight) -> list[Weight]:
    """Derivatives stop before the factors too."""
    (w,) = bind(eqn, weight.w)
    return [weight.map(lambda x, labels: (lax.stop_gradient(x), labels), w=w)]


def optimization_barrier(
    ctx: Context, eqn: Equation, *values: Operand
) -> list[Operand]:
    """The barrier applies to `w`, and not to the factors."""
    out = bind(eqn, *map(array_of, values))
    return [
        v.replace(w=w) if isinstance(v, Weight) else w
        for v, w in zip(values, out, strict=True)
    ]


def transpose(ctx: Context, eqn: Equation, weight: Weight) -> list[Weight]:
    """The groups change places; the factors stay as they are."""
    (w,) = bind(eqn, weight.w)
    dims = tuple(weight.dims[i] for i in eqn.params["permutation"])
    return [weight.replace(w=w, dims=dims)]


def reshape(ctx: Context, eqn: Equation, weight: Weight, *_: Operand) -> list[Weight]:
    """Axes are split or joined where the new sizes end between atoms, or divide one."""
    order = eqn.params["dimensions"]  # the axes are first put in this order
    (w,) = bind(eqn, weight.w)
    if order is not None:
        weight = weight.replace(dims=tuple(weight.dims[i] for i in order))
    weight = _squeeze_atoms(weight, [a for g in weight.dims for a in g if a.size == 1])
    split = _split_to(weight, eqn.params["new_sizes"])
    if split is None:
        return NotImplemented
    weight, dims = split
    return [weight.replace(w=w, dims=dims)]


def _split_to(
    weight: Weight, sizes: Sequence[int]
) -> tuple[Weight, tuple[Group, ...]] | None:
    """Returns `weight` with atoms split, and groups with the products `sizes`."""
    atoms = [atom for group in weight.dims for atom in group]
    dims: list[Group] = []
    for n in sizes:
        group: list[Atom] = []
        while (done := math.prod(atom.size for atom in group)) < n:
            missing = n // done
            if n % done:
                return None
            atom = atoms.pop(0)
            if atom.size > missing and atom.size % missing == 0:
                parts = (
                    Atom((*atom.name, 0), missing),
                    Atom((*atom.name, 1), atom.size // missing),
                )
                weight = weight.map(
                    _splitter(atom, parts),
                    dims=tuple(
                        tuple(p for a in g for p in (parts if a == atom else (a,)))
                        for g in weight.dims
                    ),
                )
                atom, rest = parts
                atoms.insert(0, rest)
            group.append(atom)
        if done != n:
            return None
        dims.append(tuple(group))
    return (weight, tuple(dims)) if not atoms else None


def _splitter(atom: Atom, parts: tuple[Atom, ...]) -> Step:
    def split(x: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
        if atom not in labels:
            return x, labels
        i = labels.index(atom)
        shape = (*x.shape[:i], *(p.size for p in parts), *x.shape[i + 1 :])
        return lax.reshape(x, shape), (*labels[:i], *parts, *labels[i + 1 :])

    return split


def _squeeze_atoms(weight: Weight, atoms: Sequence[Atom]) -> Weight:
    """Returns `weight` without `atoms`, all of size one; `w` keeps its axes."""
    if not atoms:
        return weight

    def squeeze_factor(x: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
        gone = [i for i, s in enumerate(labels) if s in atoms]
        rest = tuple(s for s in labels if s not in atoms)
        return lax.squeeze(x, gone), rest

    dims = tuple(tuple(a for a in g if a not in atoms) for g in weight.dims)
    return weight.map(squeeze_factor, dims=dims)


def squeeze(ctx: Context, eqn: Equation, weight: Weight) -> list[Weight]:
    """Axes of size one are removed, also from the factors."""
    (w,) = bind(eqn, weight.w)
    gone = eqn.params["dimensions"]
    weight = _squeeze_atoms(weight, [a for i in gone for a in weight.dims[i]])
    dims = tuple(g for i, g in enumerate(weight.dims) if i not in gone)
    return [weight.replace(w=w, dims=dims)]


def broadcast_in_dim(
    ctx: Context, eqn: Equation, weight: Weight, *_: Operand
) -> list[Weight]:
    """Neither factor has the new axes."""
    shape = eqn.params["shape"]
    source = {j: i for i, j in enumerate(eqn.params["broadcast_dimensions"])}
    (w,) = bind(eqn, weight.w)
    grown = [i for j, i in source.items() if shape[j] != weight.w.shape[i]]
    weight = _squeeze_atoms(weight, [a for i in grown for a in weight.dims[i]])
    out = weight.replace(w=w)
    dims: list[Group] = []
    for j, n in enumerate(shape):
        if j in source and source[j] not in grown:
            dims.append(weight.dims[source[j]])
        else:
            known = weight.replace(dims=(*weight.dims, *dims))
            dims.append(() if n == 1 else (new_atom(known, BROADCAST, n),))
    return [out.replace(dims=tuple(dims))]


def rev(ctx: Context, eqn: Equation, weight: Weight) -> list[Weight]:
    """Reversal along axes of single atoms."""
    groups = [weight.dims[i] for i in eqn.params["dimensions"]]
    if any(len(group) > 1 for group in groups):
        return NotImplemented
    atoms = {atom for group in groups for atom in group}

    def reverse(x: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
        return lax.rev(x, [i for i, s in enumerate(labels) if s in atoms]), labels

    (w,) = bind(eqn, weight.w)
    return [weight.map(reverse, w=w)]


def slice_(ctx: Context, eqn: Equation, weight: Weight) -> list[Weight]:
    """A static slice along axes of single atoms."""
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    (w,) = bind(eqn, weight.w)
    return _cut(
        weight,
        w,
        lambda x, axis, i: lax.slice_in_dim(
            x, starts[i], limits[i], strides[i], axis=axis
        ),
    )


def split(ctx: Context, eqn: Equation, weight: Weight) -> list[Weight]:
    """Slices side by side along one axis; those of `unstack` lose the axis."""
    axis, start, pieces = eqn.params["axis"], 0, []
    for w in bind(eqn, weight.w):
        loses_axis = w.ndim < weight.w.ndim
        slab = lax.expand_dims(w, [axis]) if loses_axis else w
        stop = start + slab.shape[axis]
        cut = _cut(
            weight,
            slab,
            lambda x, axis, _, start=start, stop=stop: lax.slice_in_dim(
                x, start, stop, axis=axis
            ),
        )
        if cut is NotImplemented:
            return cut
        (piece,) = cut
        if loses_axis:
            piece = _squeeze_atoms(piece, piece.dims[axis])
            dims = (*piece.dims[:axis], *piece.dims[axis + 1 :])
            piece = piece.replace(w=w, dims=dims)
        pieces.append(piece)
        start = stop
    return pieces


def dynamic_slice(
    ctx: Context, eqn: Equation, weight: Weight, *starts: Any
) -> list[Weight]:
    """A slice at computed positions; an axis of which one entry is left is removed."""
    if any(isinstance(s, Weight) for s in starts):
        return NotImplemented
    sizes = eqn.params["slice_sizes"]
    (w,) = bind(eqn, weight.w, *starts)
    cut = _cut(
        weight,
        w,
        lambda x, axis, i: lax.dynamic_slice_in_dim(x, starts[i], sizes[i], axis),
    )
    if cut is NotImplemented:
        return cut
    picked = [i for i, n in enumerate(sizes) if n == 1 and weight.w.shape[i] != 1]
    (out,) = cut
    out = _squeeze_atoms(out, [atom for i in picked for atom in out.dims[i]])
    return [out.replace(looked_up=weight.looked_up or bool(picked))]


def _cut(
    weight: Weight, w: jax.Array, cut: Callable[[jax.Array, int, int], jax.Array]
) -> list[Weight]:
    """Returns `weight` with `w`, its factors cut along the axes on which `w` is cut."""
    changed = {}
    for i, group in enumerate(weight.dims):
        if w.shape[i] != weight.w.shape[i]:
            if len(group) != 1:
                return NotImplemented
            changed[group[0]] = (i, group[0]._replace(size=w.shape[i]))

    def cut_factor(x: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
        for axis, atom in enumerate(labels):
            if atom in changed:
                x = cut(x, axis, changed[atom][0])
        return x, tuple(changed[s][1] if s in changed else s for s in labels)

    dims = tuple(
        tuple(changed[a][1] if a in changed else a for a in g) for g in weight.dims
    )
    return [weight.map(cut_factor, w=w, dims=dims)]


def gather(
    ctx: Context, eqn: Equation, weight: Weight, indices: Operand
) -> list[Weight]:
    """`w[ids]`: whole entries of indexed axes, picked in the factors that have them.

    The result is still a weight, with the axes of `indices` in place of the indexed
    ones. So experts that are picked for each token stay factored in the product that
    follows, and an embedding becomes an activation at its first use.
    """
    if isinstance(indices, Weight):
        return NotImplemented
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    columns, along = _picked_axes(eqn, weight.w.shape)
    moved = {*columns, *along}
    if (
        any(sizes[i] != 1 for i in columns)
        or any(len(weight.dims[i]) != 1 for i in moved)
        or any(sizes[i] != n for i, n in enumerate(weight.w.shape) if i not in moved)
    ):
        return NotImplemented
    (w,) = bind(eqn, weight.w, indices)
    paired = {j: weight.dims[i][0] for i, j in along.items()}
    atoms: list[Atom] = []
    for j, n in enumerate(indices.shape[:-1]):
        known = weight.replace(dims=(*weight.dims, tuple(atoms)))
        atoms.append(paired.get(j) or new_atom(known, INDEX, n))
    pick = functools.partial(
        _pick,
        eqn=eqn,
        indices=indices,
        columns={weight.dims[i][0]: k for i, k in columns.items()},
        along={atom: j for j, atom in paired.items()},
        atoms=tuple(atoms),
    )
    dims: list[Group] = [()] * w.ndim
    positions = [i for i in range(w.ndim) if i not in numbers.offset_dims]
    for i, atom in zip(positions, atoms, strict=True):
        dims[i] = (atom,)
    gone = {*numbers.collapsed_slice_dims, *along}
    kept = [i for i in range(weight.w.ndim) if i not in gone]
    for i, j in zip(kept, numbers.offset_dims, strict=True):
        dims[j] = () if i in columns else weight.dims[i]
    out = weight.map(pick, w=w, dims=tuple(dims), looked_up=True)
    pairs = zip(weight.terms, out.terms, strict=True)
    return [out.replace(terms=tuple(_drop_rows(ctx, *p, len(atoms)) for p in pairs))]


def _picked_axes(
    eqn: Equation, shape: Sequence[int]
) -> tuple[dict[int, int], dict[int, int]]:
    """Returns the axes of the operand that a `gather` indexes, and its batching axes.

    The first maps an axis to its column of the indices. The second maps a batching axis
    to the axis of the indices that it is paired with.
    """
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    clamps = eqn.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP
    columns = {
        i: k
        for k, i in enumerate(numbers.start_index_map)
        if not (clamps and sizes[i] == shape[i])  # a whole slice starts at zero
    }
    batching = numbers.operand_batching_dims, numbers.start_indices_batching_dims
    return columns, dict(zip(*batching, strict=True))


def _pick(
    x: jax.Array,
    labels: Labels,
    *,
    eqn: Equation,
    indices: jax.Array,
    columns: Mapping[Atom, int],
    along: Mapping[Atom, int],
    atoms: Labels,
) -> tuple[jax.Array, Labels]:
    """Returns the entries of a factor at `indices`, whose axes `atoms` come first.

    `columns` and `along` are the results of `_picked_axes`, by label. A factor without
    an indexed axis stays as it is.
    """
    held = {labels.index(atom): k for atom, k in columns.items() if atom in labels}
    if not held:
        return x, labels
    pairs = {labels.index(atom): j for atom, j in along.items() if atom in labels}
    rest = [i for i in range(x.ndim) if i not in {*held, *pairs}]
    # A promise about whole index vectors does not hold for some of their entries.
    promised = len(held) == indices.shape[-1] and len(pairs) == len(along)
    picked = lax.gather(
        x,
        jnp.take(indices, jnp.asarray(list(held.values())), axis=-1),
        lax.GatherDimensionNumbers(
            offset_dims=tuple(range(len(atoms), len(atoms) + len(rest))),
            collapsed_slice_dims=tuple(sorted(held)),
            start_index_map=tuple(held),
            operand_batching_dims=tuple(sorted(pairs)),
            start_indices_batching_dims=tuple(pairs[i] for i in sorted(pairs)),
        ),
        slice_sizes=[n if i in rest else 1 for i, n in enumerate(x.shape)],
        unique_indices=promised and eqn.params["unique_indices"],
        indices_are_sorted=promised and eqn.params["indices_are_sorted"],
        mode=eqn.params["mode"],
        fill_value=0,
    )
    return picked, (*atoms, *(labels[i] for i in rest))


def _drop_rows(ctx: Context, before: Term, after: Term, n: int) -> Term:
    """Returns `after`, whose A has looked-up rows, with dropout on the input of A.

    An index stands for a one-hot vector. Its one entry is dropped or kept, and with it
    a whole row of A, whose first `n` axes count the positions. Where B was picked, or
    both factors were (experts), the input comes later.
    """
    if after.a is before.a or after.b is not before.b or not ctx.drops(after.dropout):
        return after
    a = after.a
    kept = ctx.drop(jnp.ones(a.shape[:n], a.dtype), after.dropout)
    kept = jnp.expand_dims(kept, range(n, a.ndim))
    return dataclasses.replace(
        after, a=a * jnp.broadcast_to(kept, a.shape), dropout=0.0
    )


def mul(ctx: Context, eqn: Equation, x: Operand, y: Operand) -> list[Weight]:
    """`(w + s a b) * c` where `c` varies along axes of one factor, or is a scalar."""
    first = _scaled_side(x, y, kind(eqn.outvars[0]).shape) == 0
    return _scale(eqn, *((x, y) if first else (y, x)), lax.mul)


def div(ctx: Context, eqn: Equation, x: Operand, y: Operand) -> list[Weight]:
    """`(w + s a b) / c`, as `mul`."""
    if not isinstance(x, Weight):
        return NotImplemented
    return _scale(eqn, x, y, lax.div)


def neg(ctx: Context, eqn: Equation, weight: Weight) -> list[Weight]:
    """`-(w + s a b)`."""
    (w,) = bind(eqn, weight.w)
    terms = tuple(dataclasses.replace(t, b=-t.b) for t in weight.terms)
    return [weight.replace(w=w, terms=terms)]


def _scale(
    eqn: Equation, weight: Operand, other: Operand, op: Callable[..., jax.Array]
) -> list[Weight]:
    """Returns `op(weight, other)`, where `other` varies along axes of one factor.

    The scale may have axes that the leaf does not have (a modulation for each example).
    They become axes of the factor that it scales.
    """
    shape = kind(eqn.outvars[0]).shape
    assert isinstance(weight, Weight)
    if isinstance(other, Weight) and other.terms:
        return NotImplemented
    scale = jnp.asarray(array_of(other))
    (w,) = bind(eqn, weight.w, scale)
    if weight.w.ndim != len(shape):
        return NotImplemented
    grown = [i for i, n in enumerate(shape) if weight.w.shape[i] != n]
    weight = _squeeze_atoms(weight, [a for i in grown for a in weight.dims[i]])
    for i in grown:
        new = (new_atom(weight, BROADCAST, shape[i]),)
        weight = weight.replace(dims=(*weight.dims[:i], new, *weight.dims[i + 1 :]))
    varied = [i for i, n in enumerate(scale.shape) if n != 1]
    if varied and (weight.is_lookup or not weight.is_matrix):
        # It meets the scale of a norm, or looked-up rows: an activation.
        return NotImplemented
    atoms = tuple(atom for i in varied for atom in weight.dims[i])
    terms = [_scaled(term, scale, atoms, op) for term in weight.terms]
    kept = [term for term in terms if term is not None]
    if len(kept) < len(terms):
        return NotImplemented
    own = {i for i, g in enumerate(weight.dims) if any(a.root >= 0 for a in g)}
    if own <= set(varied):
        weight = weight.replace(mixed=weight.mixed or marked(eqn))
    doubtful = weight.doubtful or len(atoms) > 1
    return [weight.replace(w=w, terms=tuple(kept), doubtful=doubtful)]


def _scaled_side(x: Operand, y: Operand, shape: Sequence[int]) -> int:
    """Returns which operand is the weight that the other one scales."""
    if not (isinstance(x, Weight) and isinstance(y, Weight)):
        return 0 if isinstance(x, Weight) else 1
    fits = [v.w.shape == tuple(shape) for v in (x, y)]
    if fits[0] != fits[1]:
        return fits.index(True)
    return 0 if sum(map(bool, x.dims)) >= sum(map(bool, y.dims)) else 1


def _scaled(
    term: Term, scale: jax.Array, atoms: Labels, op: Callable[..., jax.Array]
) -> Term | None:
    """Returns `term` with one factor scaled along `atoms`; None if neither can be.

    It needs all those `atoms` that are axes of the leaf. It is given the others.
    """
    for own in (term.swapped(), term):
        extra = [s for s in atoms if s not in own.a_labels]
        if any(s.root >= 0 for s in extra):
            continue
        labels = (*extra, *own.a_labels)
        shape = [s.size if s in atoms else 1 for s in labels]
        order = sorted(range(len(atoms)), key=lambda k: labels.index(atoms[k]))
        flat = lax.reshape(scale, [atom.size for atom in atoms])
        along = lax.reshape(lax.transpose(flat, order), shape)
        full = (*(s.size for s in extra), *own.a.shape)
        a = op(
            jnp.broadcast_to(own.a, full),
            jnp.broadcast_to(along.astype(own.a.dtype), full),
        )
        done = dataclasses.replace(own, a=a, a_labels=labels)
        return done if own is term else done.swapped()
    return None

"""Steps that pick entries of a weight: slices, and lookups at computed positions.

The factors that have the axes concerned are picked from in the same way.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .atoms import INDEX, Atom, Group, Labels
from .coded import Coded, cut_along, picked_along, with_axis
from .compat import Equation, kind
from .gate import gated, no_gate
from .interpret import Context
from .structure import squeeze_atoms
from .values import Operand, Term, Weight, new_atom


def slice_(ctx: Context, eqn: Equation, weight: Weight) -> list[Weight]:
    """A static slice along axes of single atoms."""
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    return _cut(
        weight,
        _results(ctx, eqn, weight)[0],
        lambda x, axis, i: lax.slice_in_dim(
            x, starts[i], limits[i], strides[i], axis=axis
        ),
        starts,
    )


def split(ctx: Context, eqn: Equation, weight: Weight) -> list[Weight]:
    """Slices side by side along one axis; those of `unstack` lose the axis."""
    axis, start, pieces = eqn.params["axis"], 0, []
    for w in _results(ctx, eqn, weight):
        loses_axis = w.ndim < weight.w.ndim
        slab = with_axis(w, axis) if loses_axis else w
        stop = start + slab.shape[axis]
        cut = _cut(
            weight,
            slab,
            lambda x, axis, _, start=start, stop=stop: lax.slice_in_dim(
                x, start, stop, axis=axis
            ),
            {axis: start},
        )
        if cut is NotImplemented:
            return cut
        (piece,) = cut
        if loses_axis:
            piece = squeeze_atoms(piece, piece.dims[axis])
            dims = (*piece.dims[:axis], *piece.dims[axis + 1 :])
            if isinstance(piece.w, Coded):
                w = piece.w.replace(shape=tuple(w.shape))
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
    cut = _cut(
        weight,
        _results(ctx, eqn, weight, *starts)[0],
        lambda x, axis, i: lax.dynamic_slice_in_dim(x, starts[i], sizes[i], axis),
        starts,
    )
    if cut is NotImplemented:
        return cut
    picked = [i for i, n in enumerate(sizes) if n == 1 and weight.w.shape[i] != 1]
    (out,) = cut
    out = squeeze_atoms(out, [atom for i in picked for atom in out.dims[i]])
    return [out.replace(looked_up=weight.looked_up or bool(picked))]


def _results(
    ctx: Context, eqn: Equation, weight: Weight, *others: jax.Array
) -> list[Any]:
    """Returns the frozen array's slices; if it is quantised, only their types."""
    if isinstance(weight.w, Coded):
        return list(map(kind, eqn.outvars))
    return ctx.run.bind(eqn, weight.w, *others)


def _cut(
    weight: Weight,
    w: Any,
    cut: Callable[[jax.Array, int, int], jax.Array],
    starts: Any,
) -> list[Weight]:
    """Returns `weight` with `w`, its factors cut along the axes on which `w` is cut.

    Args:
      weight: the weight; if it is quantised, its codes are cut too.
      w: the frozen array's slice, or its type.
      cut: `(array, axis, i) -> array`, where `i` is the weight's axis.
      starts: the position of the first entry left along each of the weight's axes.
    """
    changed = {}
    for i, group in enumerate(weight.dims):
        if w.shape[i] != weight.w.shape[i]:
            if len(group) != 1:
                return NotImplemented
            changed[group[0]] = (i, group[0]._replace(size=w.shape[i]))
    if isinstance(weight.w, Coded):
        single = {
            atom: jnp.clip(_position(starts[i], atom.size), 0, atom.size - 1)
            for atom, (i, new) in changed.items()
            if new.size == 1
        }
        w = cut_along(weight.w, changed, cut, w.shape, single)
        if w is None:
            return NotImplemented

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
    shape = kind(eqn.outvars[0]).shape
    w = _looked_up(ctx, weight, eqn, indices, columns, tuple(paired.values()), pick)
    if w is None:
        return NotImplemented
    dims: list[Group] = [()] * len(shape)
    positions = [i for i in range(len(shape)) if i not in numbers.offset_dims]
    for i, atom in zip(positions, atoms, strict=True):
        dims[i] = (atom,)
    gone = {*numbers.collapsed_slice_dims, *along}
    kept = [i for i in range(weight.w.ndim) if i not in gone]
    for i, j in zip(kept, numbers.offset_dims, strict=True):
        dims[j] = () if i in columns else weight.dims[i]
    out = weight.map(pick, w=w, dims=tuple(dims), looked_up=True)
    pairs = zip(weight.terms, out.terms, strict=True)
    drop = functools.partial(_drop_rows, ctx, weight, eqn, n=len(atoms))
    return [out.replace(terms=tuple(drop(*pair) for pair in pairs))]


def _looked_up(
    ctx: Context,
    weight: Weight,
    eqn: Equation,
    indices: jax.Array,
    columns: Mapping[int, int],
    paired: Labels,
    pick: Callable[..., tuple[jax.Array, Labels]],
) -> Any:
    """Returns the frozen array's entries; None if codes do not have them."""
    if not isinstance(weight.w, Coded):
        return ctx.run.bind(eqn, weight.w, indices)[0]
    empty = eqn.params["fill_value"]
    empty = math.nan if empty is None else empty
    if not (empty == 0 or math.isnan(empty)):
        return None

    positions = {
        weight.dims[i][0]: _in_range(indices[..., k], weight.w.shape[i], eqn)
        for i, k in columns.items()
    }
    shape = kind(eqn.outvars[0]).shape
    return picked_along(weight.w, positions, paired, pick, shape, empty)


def _position(at: Any, n: int) -> jax.Array:
    """Returns positions as int32; what is beyond its range counts as beyond `n`."""
    at = jnp.asarray(at)
    if at.dtype.itemsize >= 4:
        least = 0 if jnp.issubdtype(at.dtype, jnp.unsignedinteger) else -1
        at = jnp.clip(at, jnp.asarray(least, at.dtype), jnp.asarray(n, at.dtype))
    return at.astype(jnp.int32)


def _in_range(at: jax.Array, n: int, eqn: Equation) -> jax.Array:
    """Returns the positions that a `gather` means: clamped, or -1 for a missing one."""
    at = _position(at, n)
    if eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        return jnp.where((at < 0) | (at >= n), -1, at)
    return jnp.clip(at, 0, n - 1)  # as XLA does, also where it was promised


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
    positions: Mapping[Atom, jax.Array] | None = None,
    empty: Any = 0,
    *,
    eqn: Equation,
    indices: jax.Array,
    columns: Mapping[Atom, int],
    along: Mapping[Atom, int],
    atoms: Labels,
) -> tuple[jax.Array, Labels]:
    """Returns the entries of a factor at `indices`, whose axes `atoms` come first.

    `columns` and `along` are the results of `_picked_axes`, by label. A factor without
    an indexed axis stays as it is. `positions` stand for the columns of `indices`.
    """
    held = {labels.index(atom): k for atom, k in columns.items() if atom in labels}
    if not held:
        return x, labels
    pairs = {labels.index(atom): j for atom, j in along.items() if atom in labels}
    rest = [i for i in range(x.ndim) if i not in {*held, *pairs}]
    # A promise about whole index vectors does not hold for some of their entries.
    promised = len(held) == indices.shape[-1] and len(pairs) == len(along)
    if positions is None:
        own = jnp.take(indices, jnp.asarray(list(held.values())), axis=-1)
    else:  # several may be one now
        own = jnp.stack([positions[labels[axis]] for axis in held], axis=-1)
        promised = False
    picked = lax.gather(
        x,
        own,
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
        fill_value=empty,
    )
    return picked, (*atoms, *(labels[i] for i in rest))


def _drop_rows(
    ctx: Context, weight: Weight, eqn: Equation, before: Term, after: Term, *, n: int
) -> Term:
    """Returns `after`, whose A has looked-up rows, with dropout and gate on A's input.

    An index stands for a one-hot vector. Its one entry is dropped or kept, and with it
    a whole row of A, whose first `n` axes count the positions. Where B was picked, or
    both factors were (experts), the input comes later.
    """
    if ctx.gate is not None and after.a is before.a and after.b is not before.b:
        raise no_gate(weight, eqn, "is looked up along its fan-out")
    if after.a is before.a or after.b is not before.b:
        return after
    if ctx.gate is None and not ctx.drops(after.dropout):
        return after
    a = after.a
    ones = jnp.ones(a.shape[:n], a.dtype)
    ones, _ = gated(ctx, ones, None, weight, eqn)
    kept, _ = ctx.drop(ones, after.dropout, eqn.invars[1], None)
    kept = jnp.expand_dims(kept, range(n, a.ndim))
    return dataclasses.replace(
        after, a=a * jnp.broadcast_to(kept, a.shape), dropout=0.0
    )

"""Linear steps between a parameter and its use: they move, split or scale its axes.

Each rule does the step to `w` as it was written, and to the factor that holds the axes
concerned, which is small. A step that no factor can express returns NotImplemented.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._numerics import is_inexact
from .atoms import BROADCAST, Atom, Group, Labels, Step
from .coded import Coded, placed, relabelled, retyped, reversed_along
from .compat import Equation, bind
from .interpret import Context
from .primitives import PLACES
from .values import Operand, Weight, is_coded, new_atom


def moved(ctx: Context, eqn: Equation, w: Any) -> Any:
    """Returns what `eqn`, which moves or adds axes, casts or copies, makes of `w`."""
    return retyped(eqn, w) if isinstance(w, Coded) else ctx.run.bind(eqn, w)[0]


def keep(ctx: Context, eqn: Equation, weight: Weight) -> list[Weight]:
    """Casts, copies, names and placements: `f(w + s a b) = f(w) + s a b`.

    A weight cast to complex keeps its factors. The way back is a real part, which is
    not the product of the factors' real parts.
    """
    if isinstance(weight.w, Coded) and eqn.primitive.name in PLACES:
        w = _placed(eqn, weight.w, weight.dims)
    else:
        w = moved(ctx, eqn, weight.w)
    was_complex, is_complex = (
        jnp.issubdtype(x.dtype, jnp.complexfloating) for x in (weight.w, w)
    )
    loses_imaginary = was_complex and not is_complex
    if loses_imaginary or not is_inexact(w.dtype):
        return NotImplemented
    return [weight.replace(w=w)]


def _placed(eqn: Equation, coded: Coded, dims: Sequence[Group]) -> Coded:
    """Returns it where `eqn` puts it; where shards would cut blocks it stays."""
    (where,) = eqn.params.get("devices", (None,))
    if not isinstance(where, jax.sharding.NamedSharding) or not any(where.spec):
        return jax.tree.map(lambda x: bind(eqn, x)[0], coded)
    cut = [(g, entry) for g, entry in zip(dims, where.spec, strict=False) if entry]
    entries = {group[0]: entry for group, entry in cut if len(group) == 1}
    specs = placed(coded, entries, where.mesh)
    if specs is None or len(entries) < len(cut):
        return coded
    return jax.tree.map(
        lambda x, spec: jax.device_put(x, where.update(spec=spec)), coded, specs
    )


def name(ctx: Context, eqn: Equation, weight: Weight) -> list[Weight]:
    """As `keep`, except for looked-up rows: a policy that keeps them keeps the sum."""
    matrices = [g for g in weight.dims if any(atom.root >= 0 for atom in g)]
    if weight.is_lookup and len(matrices) <= 1:
        return NotImplemented
    return keep(ctx, eqn, weight)


def stop_gradient(ctx: Context, eqn: Equation, weight: Weight) -> list[Weight]:
    """Derivatives stop before the factors too."""
    w = weight.w
    w = lax.stop_gradient(w) if isinstance(w, Coded) else moved(ctx, eqn, w)
    return [weight.map(lambda x, labels: (lax.stop_gradient(x), labels), w=w)]


def optimization_barrier(
    ctx: Context, eqn: Equation, *values: Operand
) -> list[Operand]:
    """The barrier applies to `w`, and not to the factors."""
    whole = [v.w if isinstance(v, Weight) else v for v in values]
    if any(map(is_coded, values)):
        out = lax.optimization_barrier(whole)
    else:
        out = ctx.run.bind(eqn, *whole)
    return [
        v.replace(w=w) if isinstance(v, Weight) else w
        for v, w in zip(values, out, strict=True)
    ]


def transpose(ctx: Context, eqn: Equation, weight: Weight) -> list[Weight]:
    """The groups change places; the factors stay as they are."""
    w = moved(ctx, eqn, weight.w)
    dims = tuple(weight.dims[i] for i in eqn.params["permutation"])
    return [weight.replace(w=w, dims=dims)]


def reshape(ctx: Context, eqn: Equation, weight: Weight, *_: Operand) -> list[Weight]:
    """Axes are split or joined where the new sizes end between atoms, or divide one."""
    order = eqn.params["dimensions"]  # the axes are first put in this order
    if order is not None:
        weight = weight.replace(dims=tuple(weight.dims[i] for i in order))
    weight = squeeze_atoms(weight, [a for g in weight.dims for a in g if a.size == 1])
    split = _split_to(weight, eqn.params["new_sizes"])
    if split is None:
        return NotImplemented
    weight, dims = split
    return [weight.replace(w=moved(ctx, eqn, weight.w), dims=dims)]


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
                    w=relabelled(weight.w, {atom: parts}),
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


def squeeze_atoms(weight: Weight, atoms: Sequence[Atom]) -> Weight:
    """Returns `weight` without `atoms`, all of size one; `w` keeps its axes."""
    if not atoms:
        return weight

    def squeeze_factor(x: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
        gone = [i for i, s in enumerate(labels) if s in atoms]
        rest = tuple(s for s in labels if s not in atoms)
        return lax.squeeze(x, gone), rest

    dims = tuple(tuple(a for a in g if a not in atoms) for g in weight.dims)
    w = relabelled(weight.w, dict.fromkeys(atoms, ()))
    return weight.map(squeeze_factor, w=w, dims=dims)


def squeeze(ctx: Context, eqn: Equation, weight: Weight) -> list[Weight]:
    """Axes of size one are removed, also from the factors."""
    gone = eqn.params["dimensions"]
    weight = squeeze_atoms(weight, [a for i in gone for a in weight.dims[i]])
    dims = tuple(g for i, g in enumerate(weight.dims) if i not in gone)
    return [weight.replace(w=moved(ctx, eqn, weight.w), dims=dims)]


def broadcast_in_dim(
    ctx: Context, eqn: Equation, weight: Weight, *_: Operand
) -> list[Weight]:
    """Neither factor has the new axes."""
    shape = eqn.params["shape"]
    source = {j: i for i, j in enumerate(eqn.params["broadcast_dimensions"])}
    grown = [i for j, i in source.items() if shape[j] != weight.w.shape[i]]
    weight = squeeze_atoms(weight, [a for i in grown for a in weight.dims[i]])
    dims: list[Group] = []
    for j, n in enumerate(shape):
        if j in source and source[j] not in grown:
            dims.append(weight.dims[source[j]])
        else:
            known = weight.replace(dims=(*weight.dims, *dims))
            dims.append(() if n == 1 else (new_atom(known, BROADCAST, n),))
    return [weight.replace(w=moved(ctx, eqn, weight.w), dims=tuple(dims))]


def rev(ctx: Context, eqn: Equation, weight: Weight) -> list[Weight]:
    """Reversal along axes of single atoms."""
    groups = [weight.dims[i] for i in eqn.params["dimensions"]]
    if any(len(group) > 1 for group in groups):
        return NotImplemented
    atoms = {atom for group in groups for atom in group}

    def reverse(x: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
        return lax.rev(x, [i for i, s in enumerate(labels) if s in atoms]), labels

    w = weight.w
    w = reversed_along(w, atoms) if isinstance(w, Coded) else moved(ctx, eqn, w)
    return NotImplemented if w is None else [weight.map(reverse, w=w)]

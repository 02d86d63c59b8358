"""Steps that scale a weight: by a number, or along the axes of one factor."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._numerics import at_least_float32
from .atoms import BROADCAST, Labels
from .coded import Coded, negated, times
from .compat import Equation, kind, marked
from .interpret import Context
from .structure import squeeze_atoms
from .values import Operand, Term, Weight, array_of, is_coded, new_atom


def mul(ctx: Context, eqn: Equation, x: Operand, y: Operand) -> list[Weight]:
    """`(w + s a b) * c` where `c` varies along axes of one factor, or is a scalar."""
    first = _scaled_side(x, y, kind(eqn.outvars[0]).shape) == 0
    return _scale(ctx, eqn, *((x, y) if first else (y, x)), lax.mul)


def div(ctx: Context, eqn: Equation, x: Operand, y: Operand) -> list[Weight]:
    """`(w + s a b) / c`, as `mul`."""
    if not isinstance(x, Weight):
        return NotImplemented
    return _scale(ctx, eqn, x, y, lax.div)


def neg(ctx: Context, eqn: Equation, weight: Weight) -> list[Weight]:
    """`-(w + s a b)`."""
    w = weight.w
    w = negated(w) if isinstance(w, Coded) else ctx.run.bind(eqn, w)[0]
    terms = tuple(dataclasses.replace(t, b=-t.b) for t in weight.terms)
    return [weight.replace(w=w, terms=terms)]


def _scale(
    ctx: Context,
    eqn: Equation,
    weight: Operand,
    other: Operand,
    op: Callable[..., jax.Array],
) -> list[Weight]:
    """Returns `op(weight, other)`, where `other` varies along axes of one factor.

    The scale may have axes that the leaf does not have (a modulation for each example).
    They become axes of the factor that it scales.
    """
    shape = kind(eqn.outvars[0]).shape
    assert isinstance(weight, Weight)
    if isinstance(other, Weight) and (other.terms or is_coded(other)):
        return NotImplemented
    scale = array_of(other)
    if weight.w.ndim != len(shape):
        return NotImplemented
    grown = [i for i, n in enumerate(shape) if weight.w.shape[i] != n]
    weight = squeeze_atoms(weight, [a for i in grown for a in weight.dims[i]])
    for i in grown:
        new = (new_atom(weight, BROADCAST, shape[i]),)
        weight = weight.replace(dims=(*weight.dims[:i], new, *weight.dims[i + 1 :]))
    varied = [i for i, n in enumerate(np.shape(scale)) if n != 1]
    if varied and (weight.is_lookup or not weight.is_matrix):
        # It meets the scale of a norm, or looked-up rows: an activation.
        return NotImplemented
    atoms = tuple(atom for i in varied for atom in weight.dims[i])
    terms = [_scaled(term, jnp.asarray(scale), atoms, op) for term in weight.terms]
    kept = [term for term in terms if term is not None]
    if len(kept) < len(terms):
        return NotImplemented
    w = weight.w
    if not isinstance(w, Coded):
        (w,) = ctx.run.bind(eqn, w, scale)
    else:
        by = lax.reshape(jnp.asarray(scale), [atom.size for atom in atoms])
        w = times(w, by, atoms, op, kind(eqn.outvars[0]).dtype)
        if w is None:
            return NotImplemented
        w = w.replace(shape=tuple(shape))
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
        wide = at_least_float32(own.a.dtype, scale.dtype)
        a = op(
            jnp.broadcast_to(own.a.astype(wide), full),
            jnp.broadcast_to(along.astype(wide), full),
        )
        done = dataclasses.replace(own, a=a, a_labels=labels)
        return done if own is term else done.swapped()
    return None

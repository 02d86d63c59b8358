"""An activation that meets several weights meets their A factors once.

Queries, keys and values, or gate and up, read the same activation. `x . [A | A | A]` is
one product that reads it once, and so is its derivative. Factors side by side are a
copy, so they stay separate where the activation is smaller, as with a single token.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from .._numerics import at_least_float32, dtype_of_activation
from .atoms import RANK, Group, regroup
from .compat import INLINE, Equation, Literal, Var, has_typed_placement, kind
from .primitives import PREPARES
from .thin import PrecisionLike, thin_dot
from .trail import Cast, Source
from .values import Term, Weight

# An activation, the axes of it that are summed over, and the precision.
Site = tuple[Var | Literal, tuple[int, ...], PrecisionLike]
Uses = Mapping[Site, Sequence[tuple[int, int]]]


def weights_first(eqns: Sequence[Equation], weights: Iterable[Var]) -> list[Equation]:
    """Returns `eqns` with those first that only prepare `weights`, such as casts."""
    ready: set[Var] = set(weights)
    early, late = [], []
    for eqn in eqns:
        if eqn.primitive.name in PREPARES and all(
            isinstance(v, Var) and v in ready for v in eqn.invars
        ):
            ready.update(eqn.outvars)
            early.append(eqn)
        else:
            late.append(eqn)
    return early + late


def sites(eqns: Sequence[Equation]) -> Uses:
    """Returns the products, `(equation, side)`, of activations that have several."""
    found: dict[Site, list[tuple[int, int]]] = {}
    for i, eqn in enumerate(eqns):
        if eqn.primitive.name == "dot_general":
            for side, v in enumerate(eqn.invars):
                if isinstance(v, Var):
                    found.setdefault(_site(eqn, side), []).append((i, side))
    return {site: uses for site, uses in found.items() if len(uses) > 1}


def _site(eqn: Equation, side: int) -> Site:
    (contracted, _) = eqn.params["dimension_numbers"]
    axes = tuple(sorted(contracted[side]))
    return eqn.invars[side], axes, eqn.params["precision"]


def products(
    i: int,
    eqns: Sequence[Equation],
    uses: Uses,
    env: Mapping[Any, Any],
    source_of: Callable[[jax.Array], Source | None],
) -> dict[int, Weight]:
    """Returns the weights that meet the activation of equation `i`, there and later.

    Their terms hold `x . a`, a slice of one product. The result is empty where there is
    nothing to share.
    """
    eqn = eqns[i]
    if eqn.primitive.name != "dot_general":
        return {}
    sides = [k for k, v in enumerate(eqn.invars) if not _is_weight(v, env)]
    if len(sides) != 1 or not isinstance(eqn.invars[sides[0]], Var):
        return {}
    (side,) = sides
    site = _site(eqn, side)
    x = env[eqn.invars[side]]
    ready = {}
    for j, own in uses.get(site, ()):
        v = eqns[j].invars[1 - own]
        if j >= i and _is_weight(v, env):
            prepared = _prepared(env[v], eqns[j], own)
            if prepared is not None:
                ready[j] = prepared
    if len(ready) < 2 or len({a.dtype for _, _, a in ready.values()}) > 1:
        return {}
    meets = {
        dtype_of_activation(x.dtype, weight.w.dtype, kind(eqns[j].outvars[0]).dtype)
        for j, (weight, _, _) in ready.items()
    }
    if len(meets) > 1 or has_typed_placement(x):
        return {}
    factors = [a for _, _, a in ready.values()]
    if not _pays(x, site[1], factors):
        return {}
    source = source_of(x)
    chain, roots = (source.chain, source.roots) if source else (None, ())
    parts = _together(meets.pop(), site[1], site[2], chain, x, factors, *roots)
    return {
        j: weight.replace(terms=(dataclasses.replace(term, product=product),))
        for (j, (weight, term, _)), product in zip(ready.items(), parts, strict=True)
    }


@functools.partial(jax.jit, static_argnums=range(4), inline=INLINE)
def _together(
    compute: DTypeLike,
    summed: tuple[int, ...],
    precision: PrecisionLike,
    chain: Callable[..., jax.Array] | None,
    x: jax.Array,
    factors: Sequence[jax.Array],
    *roots: jax.Array,
) -> list[jax.Array]:
    """Returns the products of `x` and each factor: slices of one product."""
    source = None if chain is None else Source(chain, roots).then(Cast(compute))
    together = thin_dot(
        x.astype(compute),
        jnp.concatenate(factors, axis=-1),
        ((summed, range(len(summed))), ((), ())),
        dtype=at_least_float32(compute),
        precision=precision,
        source=source,
    )
    stops = itertools.accumulate(a.shape[-1] for a in factors)
    return [
        lax.slice_in_dim(together, stop - a.shape[-1], stop, axis=-1)
        for a, stop in zip(factors, stops, strict=True)
    ]


def _pays(x: jax.Array, summed: Sequence[int], factors: Sequence[jax.Array]) -> bool:
    """Returns whether the reads of `x` that are saved outweigh a copy of the factors.

    Rows of `x` and columns of the factors have the same length. Rows that `vmap` adds
    come with factors of their own, so they change nothing.
    """
    rows = [n for i, n in enumerate(x.shape) if i not in summed]
    if not all(isinstance(n, int) for n in rows):
        return True  # a program exported for any number of rows
    columns = sum(a.shape[-1] for a in factors)
    return (len(factors) - 1) * math.prod(rows) >= columns


def _is_weight(v: Var | Literal, env: Mapping[Any, Any]) -> bool:
    return isinstance(v, Var) and isinstance(env.get(v), Weight)


def _prepared(
    weight: Weight, eqn: Equation, side: int
) -> tuple[Weight, Term, jax.Array] | None:
    """Returns the weight, its term, and the factor to meet first as `[*summed, rank]`.

    The result is None unless that factor has exactly the axes that are summed over.
    """
    contracted, batch = eqn.params["dimension_numbers"]
    if len(weight.terms) != 1 or weight.looked_up or batch[0]:
        return None
    if any(map(has_typed_placement, jax.tree.leaves(weight.w))):
        return None
    pairs = sorted(zip(contracted[side], contracted[1 - side], strict=True))
    groups: list[Group] = [weight.dims[k] for _, k in pairs]
    summed = {RANK, *(atom for group in groups for atom in group)}
    if summed & set(weight.gain_labels):
        return None  # the activation is scaled first
    (term,) = weight.terms
    if set(term.a_labels) != summed:
        if set(term.b_labels) != summed:
            return None
        term = term.swapped()
    return weight, term, regroup(term.a, term.a_labels, [*groups, (RANK,)])

"""The product of an activation and an adapted weight.

Products that are alike, such as those of every layer, are traced and derived once.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax

from .._numerics import dtype_of_activation
from ..factors import Form, Leaf
from ..quantised import typed_as
from .adapted import adapted_dot, form_of
from .alike import Like, like
from .atoms import OTHER, Atom, Group
from .coded import Coded
from .compat import INLINE, Equation, has_typed_placement, is_staging, kind
from .gate import gated
from .interpret import Context
from .low_rank import Site, join_groups, low_rank_product
from .quantised_linear import base_product
from .thin import Dims
from .trail import Chain, Source, cast_both
from .values import Weight, rescaled, with_terms
from .views import view_of

Input = tuple[jax.Array, Source | None]  # of a term, and how it follows from its roots


def meet(
    eqn: Equation, weight: Weight, x: jax.Array, side: int
) -> tuple[jax.Array, Weight, Site] | None:
    """Returns the activation, the weight and the site of their product.

    A gain that the product sums over scales the activation. The result is None where
    the gain fits neither.
    """
    weight = join_groups(weight)
    site = _site(eqn, weight, x, side)
    if not set(weight.gain_labels) <= set(site.want):
        if not set(weight.gain_labels) <= set(site.x_labels):
            return None
        x = rescaled(x.astype(site.compute), weight, site.x_labels)
        weight = weight.replace(gain=None, gain_labels=())
    return x, weight, site


def _site(eqn: Equation, weight: Weight, x: jax.Array, side: int) -> Site:
    """Returns the site where `x` meets `weight`, which is the operand `side`."""
    (contracted, batch) = eqn.params["dimension_numbers"]
    met = dict(zip(contracted[1 - side], contracted[side], strict=True))
    met |= dict(zip(batch[1 - side], batch[side], strict=True))
    x_groups: list[Group] = [
        weight.dims[met[i]] if i in met else (Atom((OTHER, i), n),)
        for i, n in enumerate(x.shape)
    ]
    w_free = [g for i, g in enumerate(weight.dims) if i not in met.values()]
    x_free = [g for i, g in enumerate(x_groups) if i not in met]
    free = w_free + x_free if side == 0 else x_free + w_free
    want = [*(weight.dims[i] for i in batch[side]), *free]
    out = kind(eqn.outvars[0])
    return Site(
        tuple(x_groups),
        want=tuple(atom for group in want for atom in group),
        x_first=side == 1,
        shape=out.shape,
        dtype=out.dtype,
        compute=dtype_of_activation(x.dtype, weight.w.dtype, out.dtype),
        precision=eqn.params["precision"],
    )


def adapted_product(
    ctx: Context,
    eqn: Equation,
    x: jax.Array,
    weight: Weight,
    site: Site,
    dims: Sequence[Group],
) -> jax.Array:
    """Returns the product of `x` and an adapted weight, in one of its forms.

    `dims` are the groups of the frozen array's axes.
    """
    if weight.gain is not None:
        view = view_of(eqn.outvars[0], ctx.read)
        site = dataclasses.replace(site, view=view)
    known, source = like(eqn), None
    if any(term.product is None for term in weight.terms):
        source = ctx.source(x)
    is_whole = ctx.gate is None and not any(ctx.drops(t.dropout) for t in weight.terms)
    if known is not None and is_whole and _can_repeat(x, weight.w):
        bare = weight.replace(parts=(), mixed=())
        chain, roots = (source.chain, source.roots) if source else (None, ())
        return _repeated(known, site, ctx.form, chain, x, bare, *roots)
    side = int(site.x_first)
    operands = (x, weight.w) if site.x_first else (weight.w, x)
    base = functools.partial(base_product, ctx.run, eqn, operands, side, dims)
    numbers = eqn.params["dimension_numbers"]

    def inputs(x: jax.Array, source: Source | None) -> list[Input]:
        met = [i for axes in numbers for i in axes[1 - side]]
        x, source = gated(ctx, x, source, weight, eqn, met)
        var = eqn.invars[1 - side]
        return [ctx.drop(x, term.dropout, var, source) for term in weight.terms]

    entered = None if is_whole else inputs
    return _in_a_form(x, weight, site, numbers, ctx.form, source, base, entered)


def _can_repeat(x: jax.Array, w: Leaf) -> bool:
    """Returns whether types and static settings decide all that is traced."""
    if isinstance(w, Coded) or not is_staging(x, w):
        return False
    return not (has_typed_placement(x) or has_typed_placement(w))


@functools.partial(jax.jit, static_argnums=range(4), inline=INLINE)
def _repeated(
    known: Like,
    site: Site,
    form: Form,
    chain: Chain | None,
    x: jax.Array,
    weight: Weight,
    *roots: jax.Array,
) -> jax.Array:
    source = None if chain is None else Source(chain, roots)
    operands = (x, weight.w) if site.x_first else (weight.w, x)
    numbers = known.params["dimension_numbers"]
    base = functools.partial(known.bind_one, *operands)
    return _in_a_form(x, weight, site, numbers, form, source, base)


def _in_a_form(
    x: jax.Array,
    weight: Weight,
    site: Site,
    numbers: Dims,
    form: Form,
    source: Source | None,
    base: Callable[[], jax.Array],
    inputs: Callable[[jax.Array, Source | None], list[Input]] | None = None,
) -> jax.Array:
    """Returns the product: `adapted_dot`, or the sum of `base` and low-rank terms.

    `inputs` makes the input of each term, where it is not the activation itself.
    """
    (first, *more) = weight.terms
    own = form_of(x, weight, site, form if first.form == "auto" else first.form)
    if own is not None and not more and inputs is None:
        return adapted_dot(x, weight, site, numbers, own, source)
    y = base()
    x, source = cast_both(x, source, site.compute)
    entered = [(x, source)] * len(weight.terms) if inputs is None else inputs(x, source)
    zs = []
    for term, (x, roots) in zip(weight.terms, entered, strict=True):
        product = functools.partial(low_rank_product, site=site, source=roots)
        zs.append(typed_as(y, product, x, term))
    return with_terms(y, zs, weight, site.want, site.view)
